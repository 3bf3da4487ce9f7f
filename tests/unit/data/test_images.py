from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fmscale.data import reasons
from fmscale.data.images import fit, load_image, looks_padded, measure, was_squared
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
    assert not was_squared(sizes | {"original_width": 10**400 + 1, "original_height": 10**400})  # too large for a float


def test_load_turns_pictures_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255
    image = load_image(encode(pixels, "JPEG", exif=exif, quality=100), MAX_PIXELS).image
    assert image.size == (8, 16)
    assert np.asarray(image)[:6].min() > 240


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8])
def test_the_measure_is_that_of_the_loaded_picture(form: str, orientation: int | None) -> None:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    data = encode(np.zeros((8, 16, 3), dtype=np.uint8), form, exif=exif)
    width, height = load_image(data, MAX_PIXELS).image.size
    assert measure(data, MAX_PIXELS) == (height, width)
    assert form in ("BMP", "GIF") or (height > width) == ((orientation or 1) >= 5)


def test_heads_are_measured_where_pixels_are_cut() -> None:
    data = encode(Image.open(io.BytesIO(NOISE)), "JPEG")[:-400]
    assert measure(data, MAX_PIXELS) == (40, 40)
    with pytest.raises(ImageError, match=reasons.TRUNCATED):
        measure(NOISE[:-900], MAX_PIXELS)
    with pytest.raises(ImageError, match=reasons.TOO_MANY_PIXELS):
        measure(data, 1599)
    with pytest.raises(ImageError, match=reasons.NOT_AN_IMAGE):
        measure(b"", MAX_PIXELS)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_load_lays_transparency_on_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 4))
    pixels = np.asarray(load_image(encode(image.convert(mode)), MAX_PIXELS).image)
    assert pixels.shape == (4, 4, 3)
    assert pixels[:, :2].max() == 0
    assert pixels[:, 2:].min() == 255


def png(colour_type: int, rows: np.ndarray, clear: list[int] | None = None) -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write; colour types: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = rows.shape[:2]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    transparent = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) if clear else b""
    packed = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + head + transparent + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6])
def test_load_scales_every_png_of_sixteen_bits(colour_type: int) -> None:
    """Its own alpha, or a transparent colour, laid on white."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels))
    colours = values[..., : 1 if channels < 3 else 3] / 257
    if channels in (2, 4):
        opacity = values[..., -1:] / 65535
        expected, data = colours * opacity + 255 * (1 - opacity), png(colour_type, values)
    else:
        expected, data = colours.copy(), png(colour_type, values, clear=values[0, 0].tolist())
        expected[0, 0] = 255
    pixels = np.asarray(load_image(data, MAX_PIXELS).image)
    assert pixels.shape == (5, 7, 3)
    assert np.abs(pixels - expected).max() <= 2


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_load_lays_a_transparent_colour_on_white(mode: str) -> None:
    image = Image.new(mode, (4, 4))
    data = encode(image, transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert np.asarray(load_image(data, MAX_PIXELS).image).min() == 255
    assert np.asarray(load_image(encode(image), MAX_PIXELS).image).max() == 0


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_load_takes_the_first_frame(form: str) -> None:
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    image = load_image(encode(first, form, save_all=True, append_images=[second]), MAX_PIXELS).image
    assert np.abs(np.asarray(image).astype(int) - (255, 0, 0)).max() <= 4


def test_load_takes_the_first_picture_of_a_stereo_jpeg() -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encode(first, "MPO", save_all=True, append_images=[second])
    assert np.abs(np.asarray(load_image(data, MAX_PIXELS).image).astype(int) - (255, 0, 0)).max() <= 4


def icc(red: tuple[int, int, int], gamma: float) -> bytes:
    """A colour profile, version 2: sRGB's but for the red primary, in XYZ times 65,536 (D50), and the curve."""
    xyz = {
        b"rXYZ": red,
        b"gXYZ": (25_240, 46_983, 6_363),
        b"bXYZ": (9_376, 3_972, 46_799),
        b"wtpt": (63_190, 65_536, 54_061),
    }
    tags = {name: b"XYZ " + bytes(4) + struct.pack(">3i", *value) for name, value in xyz.items()}
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    offset, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    size = offset + len(body)
    head = struct.pack(">I4sI", size, b"lcms", 0x02400000) + b"mntrRGB XYZ " + struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    head += b"acsp" + bytes(28) + struct.pack(">3I", 63_190, 65_536, 54_061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def test_load_brings_colours_to_srgb() -> None:
    """In a space of gamma 1, half of the light is 188 of 255 in sRGB; one of gamma 2.2 nearly is sRGB."""
    red = (28_578, 14_581, 912)
    grey = Image.new("RGB", (4, 4), (128, 128, 128))
    linear = load_image(encode(grey, icc_profile=icc(red, 1.0)), MAX_PIXELS)
    assert linear.colour_profile == "converted"
    assert np.abs(np.asarray(linear.image).astype(int) - 188).max() <= 2
    near = load_image(encode(grey, icc_profile=icc(red, 2.2)), MAX_PIXELS)
    assert np.abs(np.asarray(near.image).astype(int) - 128).max() <= 2
    wide = load_image(encode(Image.new("RGB", (4, 4), (200, 60, 60)), icc_profile=icc((39_000, 17_500, 500), 2.2)), 99)
    assert np.asarray(wide.image)[0, 0, 0] >= 225  # a wider red is redder in sRGB


def test_colours_under_alpha_are_brought_to_srgb() -> None:
    image = Image.new("RGBA", (4, 4), (128, 128, 128, 128))
    picture = load_image(encode(image, icc_profile=icc((28_578, 14_581, 912), 1.0)), MAX_PIXELS)
    assert np.abs(np.asarray(picture.image).astype(int) - (188 + 255) / 2).max() <= 2


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_profile_that_does_not_fit_is_noted_and_left_out(mode: str) -> None:
    form = "JPEG" if mode == "CMYK" else "PNG"
    image = Image.new("RGB", (4, 4), (128, 128, 128)).convert(mode)
    for profile in (b"no profile", *([icc((28_578, 14_581, 912), 1.0)] if mode != "RGB" else [])):
        picture = load_image(encode(image, form, icc_profile=profile), MAX_PIXELS)
        assert picture.colour_profile == "unusable"
        assert np.abs(np.asarray(picture.image).astype(int) - 128).max() <= 2
    assert load_image(encode(image, form), MAX_PIXELS).colour_profile == "none"


def test_bars_on_two_sides_of_a_square_are_padding() -> None:
    noise = Image.open(io.BytesIO(NOISE)).resize((100, 60))
    for colour in ("white", "black", "gray"):
        padded = Image.new("RGB", (100, 100), colour)
        padded.paste(noise, (0, 20))
        assert looks_padded(padded)
        assert looks_padded(padded.transpose(Image.Transpose.ROTATE_90))
        assert looks_padded(load_image(encode(padded, "JPEG", quality=80), MAX_PIXELS).image)
        assert not looks_padded(padded.crop((0, 1, 100, 100)))  # no square
        assert not looks_padded(padded.resize((40, 40)))
    alone = Image.new("RGB", (100, 100), "white")  # a thing on white has room on all four sides
    alone.paste(noise.resize((50, 50)), (25, 25))
    assert not looks_padded(alone)
    assert not looks_padded(noise.resize((100, 100)))
    sky = Image.new("RGB", (100, 100), "skyblue")
    sky.paste(noise, (0, 40))
    assert not looks_padded(sky)


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
        (encode(Image.new("I", (4, 4), 70_000), "TIFF"), reasons.UNKNOWN_RANGE),
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
    fitted, box = fit(Image.fromarray(pixels), 20, 20)
    assert (fitted.shape, fitted.dtype) == ((3, 20, 20), np.uint8)
    assert fitted.flags.c_contiguous
    assert box == (10, 0, 20, 10)
    assert (fitted[:, :, 5:-5] == 255).all()  # the filter sees past the edges, as it should


def test_fit_at_the_same_size_changes_nothing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    fitted, box = fit(Image.fromarray(pixels), 8, 12)
    assert box == (0, 0, 12, 8)
    assert np.array_equal(fitted, pixels.transpose(2, 0, 1))


def test_fit_averages_where_it_shrinks() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # a resize without antialiasing would keep one kind of stripe
    fitted, _ = fit(Image.fromarray(stripes), 8, 8)
    assert np.abs(fitted - 127.5).max() < 13


@pytest.mark.parametrize("size", [(1, 1), (7, 1000), (1000, 7), (333, 501)])
def test_fit_crops_to_the_shape_inside_the_picture(size: tuple[int, int]) -> None:
    width, height = size
    fitted, (left, top, right, bottom) = fit(Image.new("RGB", size), 24, 40)
    assert fitted.shape == (3, 24, 40)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert (right - left) / (bottom - top) == pytest.approx(40 / 24)
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)
