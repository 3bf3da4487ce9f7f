"""From an image of a source to images of a dataset: filtered, decoded, cropped to the bucket of each resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmscale.batch import BadSample
from fmscale.data import reasons
from fmscale.data.buckets import assign
from fmscale.data.captions import look_up
from fmscale.data.images import Pixels, fit, load_image, looks_padded, measure, was_squared
from fmscale.data.reasons import ImageError
from fmscale.data.sources import SourceImage

Size = tuple[int, int]


@dataclass(frozen=True)
class Prepared:
    """An image that fits its bucket, on its way to the encoders.

    Attributes:
        key: unique in the dataset.
        pixels: shape (3, H, W).
        caption: as given.
        meta: what the sample's json will say.
        padded: whether it seems to have been padded to a square before it came here.
    """

    key: str
    pixels: Pixels
    caption: str
    meta: dict[str, Any]
    padded: bool = False


def as_floats(images: Sequence[Prepared], device: torch.device | str = "cpu") -> Tensor:
    """Pixels of images of one shape as the VAE takes them: shape (B, 3, H, W), float32 in [-1, 1]."""
    return to_floats(torch.from_numpy(np.stack([image.pixels for image in images])).to(device))


def to_floats(pixels: Tensor) -> Tensor:
    """Pixels from 0 to 255 as numbers in [-1, 1], float32."""
    return pixels.float() / 127.5 - 1


@dataclass(frozen=True)
class Filters:
    """Which images are wanted.

    Attributes:
        min_side_px: shorter side, at least.
        max_aspect: long side over short side, at most; None for any.
        scores: least and largest value of fields of the json, either of them None for any; an image without the field
            is not wanted.
    """

    min_side_px: int = 0
    max_aspect: float | None = None
    scores: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)

    def check_scores(self, meta: Mapping[str, Any]) -> None:
        """Raise ImageError if the json of an image says that it is not wanted."""
        for name, (least, largest) in self.scores.items():
            value = _number(look_up(meta, name))
            if not isinstance(value, int | float) or value != value:
                raise ImageError(f"no {name}", f"the json says {value!r}")
            if (least is not None and value < least) or (largest is not None and value > largest):
                raise ImageError(f"{name} out of range", f"{value}")

    def check_size(self, height: int, width: int) -> None:
        """Raise ImageError if an image of this size, in pixels, is not wanted."""
        if min(height, width) < self.min_side_px:
            raise ImageError(reasons.TOO_SMALL, f"{height} x {width} px, the shorter side needs {self.min_side_px}")
        if self.max_aspect and max(height, width) > self.max_aspect * min(height, width):
            raise ImageError(reasons.TOO_LONG, f"{height} x {width} px, the limit is {self.max_aspect:g} to 1")


@dataclass(frozen=True)
class Preparation:
    """What is done to every image. It can be pickled: workers do it.

    Attributes:
        resolutions: (height, width) in pixels of the buckets of each resolution, by the ending that it gives to keys.
        max_pixels: larger images are refused before they are decoded.
        max_upscale: an image goes into no bucket for which it would be enlarged more than so many times.
        filters: which images are wanted.
    """

    resolutions: Mapping[str, Sequence[Size]]
    max_pixels: int
    max_upscale: float
    filters: Filters = Filters()

    def prepare(self, source: SourceImage | BadSample) -> list[Prepared]:
        """Bring an image to its bucket of every resolution that it is large enough for.

        Args:
            source: bytes and caption, or why they cannot be had.

        Returns:
            At least one image.

        Raises:
            ImageError: it cannot be used, or is not wanted.
        """
        source = self._wanted(source)
        picture = load_image(source.data, self.max_pixels)
        self.filters.check_size(picture.image.height, picture.image.width)
        about = {
            "caption": source.caption,
            "caption_from": source.caption_from,
            **({"captions": dict(source.captions)} if len(source.captions) > 1 else {}),
            "source": source.source,
            "original_size_px": [picture.image.height, picture.image.width],
            "colour_profile": picture.colour_profile,
        }
        padded = was_squared(source.meta) or looks_padded(picture.image)
        prepared = []
        for ending, bucket in self._buckets(picture.image.height, picture.image.width):
            pixels, crop = fit(picture.image, *bucket)
            meta = about | {"crop_px": list(crop), "size_px": list(bucket)}
            prepared.append(Prepared(source.key + ending, pixels, source.caption, meta, padded))
        return prepared

    def buckets(self, source: SourceImage | BadSample) -> list[Size]:
        """The buckets of what `prepare` makes of an image; pixels are decoded only where its head does not tell.

        Args:
            source: as for `prepare`.

        Raises:
            ImageError: as for `prepare`, except for damage that only decoding shows.
        """
        height, width = measure(self._wanted(source).data, self.max_pixels)
        self.filters.check_size(height, width)
        return [bucket for _, bucket in self._buckets(height, width)]

    def _wanted(self, source: SourceImage | BadSample) -> SourceImage:
        """An image that can be had, and whose json does not say that it is not wanted."""
        if isinstance(source, BadSample):
            raise ImageError(source.reason, source.detail)
        self.filters.check_scores(source.meta)
        return source

    def _buckets(self, height: int, width: int) -> list[tuple[str, Size]]:
        """Endings and buckets of the resolutions that an image is large enough for."""
        nearest = [(ending, assign(height, width, sizes)) for ending, sizes in self.resolutions.items()]
        upscales = [max(bucket[0] / height, bucket[1] / width) for _, bucket in nearest]
        if min(upscales) > self.max_upscale:
            detail = (
                f"{height} x {width} px would be enlarged {min(upscales):.2f} times, the limit is {self.max_upscale}"
            )
            raise ImageError(reasons.TOO_SMALL, detail)
        return [place for place, upscale in zip(nearest, upscales, strict=True) if upscale <= self.max_upscale]


def _number(value: Any) -> Any:
    """What a text says if it is a number, which is how a CSV file has them; any other value as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def decode_image(source: SourceImage | BadSample, preparation: Preparation) -> list[Prepared] | dict[str, str]:
    """What a source gives, or why it gives nothing, as `failures.jsonl` says it."""
    try:
        return preparation.prepare(source)
    except ImageError as error:
        name = source.key or source.shard if isinstance(source, BadSample) else source.key
        return {"key": name, "reason": error.reason, "detail": error.detail}
