from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fmscale.data import reasons
from fmscale.data.images import fit, load_image, was_squared
from fmscale.data.reasons import ImageError

MAX_PIXELS = 10_000


def encode(pixels: np.ndarray | Image.Image, form: str = "PNG", **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


NOISE = encode(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
RED = encode(np.full((6, 4, 3), (255, 0, 0), dtype=np.uint8))


def test_was_squared_sees_pictures_that_lost_their_shape() -> None:
    sizes = {"width": 256, "height": 256, "original_width": 640, "original_height": 480}
    assert was_squared(sizes)
    assert not was_squared(sizes | {"width": 341})
    assert not was_squared(sizes | {"original_width": 480})
    assert not was_squared({"width": 256, "height": 256})
    assert not was_squared({})


def test_load_turns_pictures_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255
    image = load_image(encode(pixels, "JPEG", exif=exif, quality=100), MAX_PIXELS).image
    assert image.size == (8, 16)
    assert np.asarray(image)[:6].min() > 240


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_load_lays_transparency_on_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 4))
    pixels = np.asarray(load_image(encode(image.convert(mode)), MAX_PIXELS).image)
    assert pixels.shape == (4, 4, 3)
    assert pixels[:, :2].max() == 0
    assert pixels[:, 2:].min() == 255


def test_load_scales_sixteen_bit_pictures() -> None:
    ramp = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    pixels = np.asarray(load_image(encode(ramp), MAX_PIXELS).image)
    assert pixels.shape == (4, 4, 3)
    assert np.abs(pixels[..., 0] - ramp / 257).max() <= 1


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "RGB"])
def test_load_makes_rgb_of_other_modes(mode: str) -> None:
    form = "JPEG" if mode == "CMYK" else "PNG"
    image = load_image(encode(Image.new("RGB", (4, 4), "white").convert(mode), form), MAX_PIXELS).image
    assert image.mode == "RGB"
    assert np.asarray(image).min() >= 254


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", reasons.NOT_AN_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", reasons.NOT_AN_IMAGE),
        (NOISE[:-900], reasons.TRUNCATED),
        (encode(Image.open(io.BytesIO(NOISE)), "JPEG")[:-400], reasons.TRUNCATED),
        (encode(Image.open(io.BytesIO(NOISE)), "GIF")[:-400], reasons.TRUNCATED),
        (encode(Image.open(io.BytesIO(NOISE)), "TIFF")[:-400], reasons.TRUNCATED),
        (encode(Image.open(io.BytesIO(NOISE)), "BMP")[:-400], reasons.TRUNCATED),
        (encode(Image.open(io.BytesIO(NOISE)), "WEBP")[:-400], reasons.BROKEN),
        (RED[:50] + b"xx" + RED[52:], reasons.BROKEN),
        (encode(np.zeros((101, 100), dtype=np.uint8)), reasons.TOO_MANY_PIXELS),
        (encode(np.zeros((20_000, 20_000), dtype=np.uint8)), reasons.TOO_MANY_PIXELS),
        (encode(Image.new("F", (4, 4)), "TIFF"), reasons.UNKNOWN_RANGE),
    ],
)
def test_broken_pictures_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(data, MAX_PIXELS)
    assert caught.value.reason == reason
    assert caught.value.detail
    assert "\n" not in caught.value.detail


def test_fit_keeps_the_range_and_the_centre() -> None:
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 255
    tensor, box = fit(Image.fromarray(pixels), 20, 20)
    assert (tensor.shape, tensor.dtype) == ((3, 20, 20), torch.float32)
    assert tensor.is_contiguous()
    assert box == (10, 0, 20, 10)
    assert torch.equal(tensor[:, :, 5:-5], torch.ones(3, 20, 10))  # the filter sees past the edges, as it should


def test_fit_at_the_same_size_changes_nothing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    tensor, box = fit(Image.fromarray(pixels), 8, 12)
    assert box == (0, 0, 12, 8)
    assert torch.equal(tensor, torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)


def test_fit_averages_where_it_shrinks() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # a resize without antialiasing would keep one kind of stripe
    tensor, _ = fit(Image.fromarray(stripes), 8, 8)
    assert tensor.abs().max() < 0.1


@pytest.mark.parametrize("size", [(1, 1), (7, 1000), (1000, 7), (333, 501)])
def test_fit_crops_to_the_shape_inside_the_picture(size: tuple[int, int]) -> None:
    width, height = size
    tensor, (left, top, right, bottom) = fit(Image.new("RGB", size), 24, 40)
    assert tensor.shape == (3, 24, 40)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert (right - left) / (bottom - top) == pytest.approx(40 / 24)
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)
