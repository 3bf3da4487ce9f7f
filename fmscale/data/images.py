"""Where pictures and captions come from, and how a picture becomes a tensor of its bucket's size."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fmscale.batch import BadSample
from fmscale.data.tar import MAX_MEMBER_BYTES, DamageError, Member, find_tars, walk
from fmscale.errors import UserError

SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # decoders that start no other program


class ImageError(Exception):
    """A picture that cannot be used; the text is the reason."""


@dataclass(frozen=True)
class SourceImage:
    """A picture as it lies in its source.

    Attributes:
        key: unique in the source, without dots or slashes: the key of the sample made of it.
        data: the encoded file.
        caption: not empty.
        source: where it came from, for people: a path, or shard and member.
        meta: its json, where the source has one.
    """

    key: str
    data: bytes
    caption: str
    source: str
    meta: dict[str, Any] = field(default_factory=dict)


def read_images(path: str | Path) -> Iterator[SourceImage | BadSample]:
    """Stream the pictures of a source, one at a time, in an order that never changes.

    Args:
        path: a folder of pictures (at any depth) with a .txt beside each; or a WebDataset tar, or a folder of them,
            as img2dataset writes them: KEY.jpg with KEY.txt, or with "caption" in KEY.json.

    Returns:
        Every picture, or why it cannot be used: no caption, two files of one name, a damaged tar.

    Raises:
        UserError: at once, if there is no such path, or it holds neither pictures nor tars, or both.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".tar":
        return _from_tar(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder or tar: give a folder of images with captions, or of WebDataset tars")
    tars, first_picture = find_tars(path), next(_picture_paths(path), None)
    if tars and first_picture:
        raise UserError(f"{path} holds both tars and images ({first_picture.name}): give a folder that holds one kind")
    if not tars and not first_picture:
        raise UserError(f"{path} holds no *.tar and no image ({', '.join(sorted(SUFFIXES))}): give another folder")
    return chain.from_iterable(map(_from_tar, tars)) if tars else _from_folder(path)


def _picture_paths(folder: Path) -> Iterator[Path]:
    """Pictures at any depth, in an order that is the same everywhere: files of one name follow one another."""
    for root, folders, files in os.walk(folder, onerror=_refuse_folder):
        folders.sort()
        for name in sorted(files, key=os.path.splitext):
            if name.rpartition(".")[2].lower() in SUFFIXES and not name.startswith("."):
                yield Path(root, name)


def _refuse_folder(error: OSError) -> NoReturn:
    raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def _from_folder(folder: Path) -> Iterator[SourceImage | BadSample]:
    previous: Path | None = None
    for path in _picture_paths(folder):
        relative = path.relative_to(folder)
        key = safe_key(relative.with_suffix("").as_posix())
        if previous is not None and previous.with_suffix("") == path.with_suffix(""):
            yield BadSample(key, str(relative), f"same name as {previous.name}: one caption cannot serve two images")
            continue
        previous = path
        words = path.with_suffix(".txt")
        try:
            if not words.is_file():
                raise ImageError(f"no caption: there is no {words.name} beside it")
            yield SourceImage(key, path.read_bytes(), _text(words.read_bytes()), str(relative))
        except (OSError, ImageError) as error:
            yield BadSample(key, str(relative), str(error))


def _from_tar(tar: Path) -> Iterator[SourceImage | BadSample]:
    try:
        with tar.open("rb") as file:
            yield from _tar_samples(file, tar.name)
    except (DamageError, OSError) as error:
        yield BadSample("", tar.name, f"{error}; the rest of this tar is not read")


def _tar_samples(file: BinaryIO, tar_name: str) -> Iterator[SourceImage | BadSample]:
    seen: set[str] = set()
    for name, run in groupby(walk(file), key=lambda member: member.key):
        key = safe_key(f"{tar_name.removesuffix('.tar')}/{name}")
        members = list(run)
        if name in seen:
            yield BadSample(key, tar_name, "its key comes twice in the tar, or its members do not lie side by side")
            continue
        seen.add(name)
        try:
            yield _tar_sample(file, members, key, f"{tar_name}/{name}")
        except ImageError as error:
            yield BadSample(key, tar_name, str(error))


def _tar_sample(file: BinaryIO, members: Sequence[Member], key: str, source: str) -> SourceImage:
    pictures = [member for member in members if member.extension in SUFFIXES]
    if len(pictures) != 1:
        names = ", ".join(repr(member.name) for member in pictures) or "none"
        raise ImageError(f"needs one image, has {names} (a key ends at the first dot of a name)")
    by_extension = {member.extension: member for member in members}
    meta = _object(_content(file, by_extension["json"])) if "json" in by_extension else {}
    if "txt" in by_extension:
        caption = _text(_content(file, by_extension["txt"]))
    else:
        caption = str(meta.get("caption") or "").strip()
    if not caption:
        raise ImageError("no caption: neither a .txt nor a json with 'caption'")
    if any("\ud800" <= char <= "\udfff" for char in caption):
        raise ImageError("its caption is no text: it holds half a character")
    return SourceImage(key, _content(file, pictures[0]), caption, source, meta)


def _content(file: BinaryIO, member: Member) -> bytes:
    if member.size > MAX_MEMBER_BYTES:
        raise ImageError(f"member {member.name!r} has {member.size} bytes, more than the limit of {MAX_MEMBER_BYTES}")
    file.seek(member.start)
    return file.read(member.size)


def _text(data: bytes) -> str:
    try:
        text = data.decode().strip()
    except UnicodeDecodeError as error:
        raise ImageError(f"its caption is no UTF-8 text ({error.reason})") from error
    if not text:
        raise ImageError("its caption is empty")
    return text


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"its json cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise ImageError("its json is no object")
    return value


def safe_key(name: str) -> str:
    """A sample key made of a path: no slash, dot or unprintable character.

    Slashes become `__`; where the path cannot be told from the key, a digest of the path is added.
    """
    key = "".join(char if char.isprintable() and char != "." else "_" for char in name).replace("/", "__")
    if key.replace("__", "/") == name:
        return key
    return f"{key}-{hashlib.blake2b(os.fsencode(name), digest_size=6).hexdigest()}"


def was_squared(meta: dict[str, Any]) -> bool:
    """Whether a downloader forced this picture into a square (img2dataset's default `border` mode pads it with white).

    Args:
        meta: the json that img2dataset wrote: `width`, `height` and the same with `original_`.
    """
    sizes: list[Any] = [meta.get(name) for name in ("width", "height", "original_width", "original_height")]
    if not all(isinstance(size, int | float) for size in sizes):
        return False
    width, height, original_width, original_height = sizes
    return width == height > 0 and abs(original_width - original_height) > 0.02 * original_height


def load_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decode a picture: upright, RGB, transparency laid on white.

    Args:
        data: the encoded file.
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        ImageError: it is no picture of a known format, is too large, or is broken.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(f"{image.width} x {image.height} pixels, more than the limit of {max_pixels}")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"cannot be decoded: it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders meet broken files with nearly any exception
        raise ImageError(f"cannot be decoded ({type(error).__name__}: {error})".replace("\n", " ")) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 8
        pixels = np.asarray(image).astype(np.int64).clip(0, 65535) // 257
        return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def fit(image: Image.Image, height: int, width: int) -> tuple[Tensor, tuple[float, float, float, float]]:
    """Crop the centre of a picture to a shape and resize it, antialiased, in one pass.

    Args:
        image: RGB.
        height: to reach, in pixels.
        width: to reach, in pixels.

    Returns:
        The pixels, shape (3, height, width), float32 in [-1, 1], and the crop box in pixels of `image`: left, top,
        right, bottom.
    """
    scale = min(image.width / width, image.height / height)  # source pixels per target pixel
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    right, bottom = min(left + scale * width, image.width), min(top + scale * height, image.height)
    box = (max(left, 0.0), max(top, 0.0), float(right), float(bottom))
    pixels = np.array(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 127.5 - 1, box
