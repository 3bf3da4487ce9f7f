"""How a picture becomes a tensor of its bucket's size."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fmscale.data import reasons
from fmscale.data.reasons import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # decoders that start no other program


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
                raise ImageError(reasons.TOO_MANY_PIXELS, f"{image.width} x {image.height}, the limit is {max_pixels}")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(reasons.TOO_MANY_PIXELS, str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageError(reasons.NOT_AN_IMAGE, f"none of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders meet broken files with nearly any exception
        reason = reasons.TRUNCATED if "truncated" in str(error).lower() else reasons.BROKEN
        raise ImageError(reason, f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError(reasons.UNKNOWN_RANGE, "floating-point numbers")
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
