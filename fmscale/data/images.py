"""How a picture becomes a tensor of its bucket's size."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from fmscale.data import reasons
from fmscale.data.reasons import ImageError

Image.MAX_IMAGE_PIXELS = None  # `max_pixels` is looked at instead, before anything is decoded
Pixels = NDArray[np.uint8]
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # decoders that start no other program
HEADED = frozenset({"JPEG", "MPO", "WEBP"})  # whose head tells how they are turned, and whose reader leaves that to us
SIDEWAYS = frozenset({5, 6, 7, 8})  # orientations of EXIF that exchange height and width
FLAT = 12  # levels of 255 by which a bar of one colour varies after a JPEG
MIN_PADDED_PX = 64  # in smaller pictures a flat border says nothing


class Picture(NamedTuple):
    """A decoded picture.

    Attributes:
        image: RGB, upright.
        colour_profile: what became of the profile in the file: `none`, `converted`, or `unusable`.
    """

    image: Image.Image
    colour_profile: str


def was_squared(meta: dict[str, Any]) -> bool:
    """Whether a downloader forced this picture into a square (img2dataset's default `border` mode pads it with white).

    Args:
        meta: the json that img2dataset wrote: `width`, `height` and the same with `original_`.
    """
    sizes: list[Any] = [meta.get(name) for name in ("width", "height", "original_width", "original_height")]
    if not all(isinstance(size, int | float) for size in sizes):
        return False
    width, height, original_width, original_height = sizes
    return width == height > 0 and 50 * abs(original_width - original_height) > original_height


def looks_padded(image: Image.Image) -> bool:
    """Whether a square picture has bars on two opposite sides, all of one colour, and none on the other two.

    Args:
        image: RGB.
    """
    if image.width != image.height or image.width < MIN_PADDED_PX:
        return False
    pixels, bar = np.asarray(image), max(2, image.width // 50)
    rows = np.concatenate([pixels[:bar], pixels[-bar:]]).reshape(-1, 3)
    columns = np.concatenate([pixels[:, :bar], pixels[:, -bar:]]).reshape(-1, 3)
    flat = [int(np.ptp(side, axis=0).max()) <= FLAT for side in (rows, columns)]
    return flat[0] != flat[1]


def load_image(data: bytes, max_pixels: int) -> Picture:
    """Decode a picture: the first frame, upright, sRGB, transparency laid on white.

    Args:
        data: the encoded file.
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        ImageError: it is no picture of a known format, is too large, or is broken.
    """
    with _opened(data, max_pixels) as image:
        image.load()
        return _to_srgb(ImageOps.exif_transpose(image), image.info.get("icc_profile"))


def measure(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Height and width of the picture that `load_image` gives; the commonest formats are not decoded for that.

    Args:
        data, max_pixels: as for `load_image`.

    Raises:
        ImageError: as for `load_image`, as far as was read.
    """
    with _opened(data, max_pixels) as image:
        if image.format in HEADED:
            turned = image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
            return (image.width, image.height) if turned else (image.height, image.width)
    whole = load_image(data, max_pixels).image
    return whole.height, whole.width


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """A picture of which only the head was read; what goes wrong with it in the block becomes an ImageError."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(reasons.TOO_MANY_PIXELS, f"{image.width} x {image.height}, the limit is {max_pixels}")
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(reasons.NOT_AN_IMAGE, f"none of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders meet broken files with nearly any exception
        reason = reasons.TRUNCATED if "truncated" in str(error).lower() else reasons.BROKEN
        raise ImageError(reason, f"{type(error).__name__}: {error}") from error


def _to_srgb(image: Image.Image, profile: bytes | None) -> Picture:
    colours, alpha = _eight_bits(image)
    transform = _transform(profile, colours.mode) if profile else None
    note = "none" if not profile else "converted" if transform else "unusable"
    colours = transform.apply(colours) if transform else colours.convert("RGB")
    if alpha is not None:
        colours = Image.composite(colours, Image.new("RGB", colours.size, "white"), alpha)
    return Picture(colours, note)


def _eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours as L, RGB, CMYK or LAB, 8 bits each, and their opacity, or None where all is opaque."""
    if image.mode == "F":
        raise ImageError(reasons.UNKNOWN_RANGE, "floating-point numbers")
    if image.mode.startswith("I"):
        return _from_sixteen_bits(image)
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:  # Pillow cuts a PNG's 16 bits to 8, but not those of this colour
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        return image.convert(image.mode[:-1]), image.getchannel("A")
    if image.mode in ("1", "P"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image, None


def _from_sixteen_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """A grey picture of 16 bits, which Pillow would clip to 8."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ImageError(reasons.UNKNOWN_RANGE, f"integers from {pixels.min()} to {pixels.max()}")
    grey = Image.fromarray(np.rint(pixels / 257).astype(np.uint8))
    clear = image.info.get("transparency")
    return grey, None if clear is None else Image.fromarray(np.where(pixels == clear, 0, 255).astype(np.uint8))


@lru_cache(maxsize=64)  # most pictures share a few profiles, and a transform takes milliseconds to make
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What brings pixels of a mode from a colour profile to sRGB; None where the profile is broken or of other colours.

    Viewers, too, show a picture with such a profile as if it had none.
    """
    try:
        return ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError):
        return None


def fit(image: Image.Image, height: int, width: int) -> tuple[Pixels, tuple[float, float, float, float]]:
    """Crop the centre of a picture to a shape and resize it, antialiased, in one pass.

    Args:
        image: RGB.
        height: to reach, in pixels.
        width: to reach, in pixels.

    Returns:
        The pixels, shape (3, height, width), and the crop box in pixels of `image`: left, top, right, bottom.
    """
    scale = min(image.width / width, image.height / height)  # source pixels per target pixel
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    right, bottom = min(left + scale * width, image.width), min(top + scale * height, image.height)
    box = (max(left, 0.0), max(top, 0.0), float(right), float(bottom))
    pixels = np.array(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), box
