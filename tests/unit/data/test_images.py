from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fmscale.batch import BadSample
from fmscale.data.images import ImageError, SourceImage, fit, load_image, read_images, safe_key, was_squared
from fmscale.errors import UserError

WriteTar = Callable[[Path, list[tuple[str, bytes]]], None]

MAX_PIXELS = 10_000


def encode(pixels: np.ndarray | Image.Image, form: str = "PNG", **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


RED = encode(np.full((6, 4, 3), (255, 0, 0), dtype=np.uint8))


def test_a_folder_gives_pictures_with_the_text_beside_them(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("z.png", "b/c/x.v1.JPG", "b/no_text.png", "b/empty.webp", "b/latin.png"):
        (tmp_path / name).write_bytes(RED)
    (tmp_path / "z.txt").write_text(" a red thing\n")
    (tmp_path / "b/c/x.v1.txt").write_text("rouge é")
    (tmp_path / "b/empty.txt").write_text(" \n")
    (tmp_path / "b/latin.txt").write_bytes(b"\xe9")
    found = list(read_images(tmp_path))
    assert found[0] == SourceImage("z", RED, "a red thing", "z.png")
    assert found[1:4] == [
        BadSample("b__empty", "b/empty.webp", "its caption is empty"),
        BadSample("b__latin", "b/latin.png", "its caption is no UTF-8 text (unexpected end of data)"),
        BadSample("b__no_text", "b/no_text.png", "no caption: there is no no_text.txt beside it"),
    ]
    assert isinstance(found[4], SourceImage)
    assert (found[4].caption, found[4].source) == ("rouge é", "b/c/x.v1.JPG")
    assert found[4].key.startswith("b__c__x_v1-")


def test_two_pictures_of_one_name_are_not_both_taken(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.jq.png", "a.png"):
        (tmp_path / name).write_bytes(RED)
        (tmp_path / name).with_suffix(".txt").write_text("text")
    found = list(read_images(tmp_path))
    assert [type(item) for item in found] == [SourceImage, BadSample, SourceImage]
    assert found[1] == BadSample("a", "a.png", "same name as a.jpg: one caption cannot serve two images")


def test_tars_give_txt_or_json_captions(tmp_path: Path, write_tar: WriteTar) -> None:
    meta = {"caption": "from json", "width": 4}
    write_tar(tmp_path / "00000.tar", [("000000001.jpg", RED), ("000000001.txt", b"from txt"), ("000000002.png", RED)])
    write_tar(tmp_path / "00001.tar", [("d/1.webp", RED), ("d/1.json", json.dumps(meta).encode()), ("d/2.json", b"{}")])
    assert list(read_images(tmp_path)) == [
        SourceImage("00000__000000001", RED, "from txt", "00000.tar/000000001"),
        BadSample("00000__000000002", "00000.tar", "no caption: neither a .txt nor a json with 'caption'"),
        SourceImage("00001__d__1", RED, "from json", "00001.tar/d/1", meta),
        BadSample("00001__d__2", "00001.tar", "needs one image, has none (a key ends at the first dot of a name)"),
    ]
    assert len(list(read_images(tmp_path / "00001.tar"))) == 2


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (
            [("v1.5_a.jpg", RED), ("v1.7_b.jpg", RED), ("v1.txt", b"x")],
            "needs one image, has 'v1.5_a.jpg', 'v1.7_b.jpg'",
        ),
        ([("a.jpg", RED), ("a.json", b"{")], "its json cannot be read"),
        ([("a.jpg", RED), ("a.json", b"[]")], "its json is no object"),
        ([("a.jpg", RED), ("a.json", b'{"caption": null}')], "no caption"),
    ],
)
def test_tar_samples_that_cannot_be_used_are_named(tmp_path: Path, members, reason: str, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "x.tar", [*members, ("z.jpg", RED), ("z.txt", b"sound")])
    bad, sound = read_images(tmp_path)
    assert isinstance(bad, BadSample)
    assert reason in bad.reason
    assert isinstance(sound, SourceImage)


def test_a_key_that_comes_twice_is_named(tmp_path: Path, write_tar: WriteTar) -> None:
    sample = [("a.jpg", RED), ("a.txt", b"x")]
    write_tar(tmp_path / "x.tar", [*sample, ("b.jpg", RED), ("b.txt", b"x"), *sample])
    *sound, bad = read_images(tmp_path)
    assert [item.key for item in sound] == ["x__a", "x__b"]
    assert bad == BadSample("x__a", "x.tar", "its key comes twice in the tar, or its members do not lie side by side")


def test_a_cut_tar_is_named_and_the_others_are_read(tmp_path: Path, write_tar: WriteTar) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(
            tmp_path / name, [(f"{key}.{end}", data) for key in "xyz" for end, data in (("jpg", RED), ("txt", b"t"))]
        )
    with (tmp_path / "a.tar").open("r+b") as file:
        file.truncate(4096)  # of three samples of 2048 bytes; who knows whether the second is whole
    found = list(read_images(tmp_path))
    assert [item.key for item in found] == ["a__x", "", "b__x", "b__y", "b__z"]
    reason = "it stops at byte 4096 without an end mark: it was cut short; the rest of this tar is not read"
    assert found[1] == BadSample("", "a.tar", reason)


def test_sources_that_hold_nothing_are_the_users_error_at_once(tmp_path: Path, write_tar: WriteTar) -> None:
    with pytest.raises(UserError, match="no such folder or tar"):
        read_images(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no \*.tar and no image"):
        read_images(tmp_path)
    write_tar(tmp_path / "x.tar", [])
    (tmp_path / "a.png").write_bytes(RED)
    with pytest.raises(UserError, match=r"holds both tars and images \(a.png\)"):
        read_images(tmp_path)


def test_safe_keys_are_safe_and_never_fall_together() -> None:
    names = ["a/b", "a__b", "a.b", "a_b", "a_/b", "a/_b", "a\nb", "a/b.c", "a\udc80b", "é/ü 1"]
    keys = [safe_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(key.isprintable() and not set(key) & set("./") for key in keys)
    assert (keys[0], keys[3], keys[9]) == ("a__b", "a_b", "é__ü 1")


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
    image = load_image(encode(pixels, "JPEG", exif=exif, quality=100), MAX_PIXELS)
    assert image.size == (8, 16)
    assert np.asarray(image)[:6].min() > 240


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_load_lays_transparency_on_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 4))
    pixels = np.asarray(load_image(encode(image.convert(mode)), MAX_PIXELS))
    assert pixels.shape == (4, 4, 3)
    assert pixels[:, :2].max() == 0
    assert pixels[:, 2:].min() == 255


def test_load_scales_sixteen_bit_pictures() -> None:
    ramp = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    pixels = np.asarray(load_image(encode(ramp), MAX_PIXELS))
    assert pixels.shape == (4, 4, 3)
    assert np.abs(pixels[..., 0] - ramp / 257).max() <= 1


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "RGB"])
def test_load_makes_rgb_of_other_modes(mode: str) -> None:
    form = "JPEG" if mode == "CMYK" else "PNG"
    image = load_image(encode(Image.new("RGB", (4, 4), "white").convert(mode), form), MAX_PIXELS)
    assert image.mode == "RGB"
    assert np.asarray(image).min() >= 254


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
        (encode(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))[:-900], "cannot be decoded"),
        (RED[:50] + b"xx" + RED[52:], "cannot be decoded"),
        (encode(np.zeros((101, 100), dtype=np.uint8)), "100 x 101 pixels, more than the limit of 10000"),
        (encode(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
    ],
)
def test_broken_pictures_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        load_image(data, MAX_PIXELS)
    assert "\n" not in str(caught.value)


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
