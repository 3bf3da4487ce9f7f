"""Aspect-ratio buckets: the few sizes to which all images are brought."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from math import log
from typing import TypeVar

from fmscale.errors import UserError

Item = TypeVar("Item")


def make_buckets(resolution_px: int, step_px: int, max_aspect: float) -> list[tuple[int, int]]:
    """Sizes of nearly the same area, one for each short side that is a multiple of the step.

    Args:
        resolution_px: side of the square whose area the buckets have.
        step_px: both sides are multiples of it: VAE downscaling times patch size, or more.
        max_aspect: long side over short side, at most; 1 gives the square alone.

    Returns:
        (height_px, width_px) of each, sorted, without repeats; with every size its transpose.

    Raises:
        UserError: the resolution is not a positive multiple of the step, or max_aspect is less than 1.
    """
    if step_px < 1 or resolution_px < step_px or resolution_px % step_px:
        raise UserError(
            f"a resolution of {resolution_px} px is no positive multiple of bucket_step_px {step_px}: change one"
        )
    if max_aspect < 1:
        raise UserError(f"max_aspect {max_aspect} is less than 1: give the long side over the short side, e.g. 2")
    sizes = set()
    for short in range(step_px, resolution_px + 1, step_px):
        long = round(resolution_px**2 / short / step_px) * step_px
        if long <= max_aspect * short:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def assign(height: int, width: int, buckets: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose shape is nearest to an image's, in the logarithm of height over width; of equals, the larger.

    Args:
        height: of the image, in pixels, > 0.
        width: of the image, in pixels, > 0.
        buckets: (height, width) of each, not empty.
    """

    def distance(size: tuple[int, int]) -> tuple[float, int]:
        return abs(log(height / width) - log(size[0] / size[1])), -size[0] * size[1]

    return min(buckets, key=distance)


def grouped(items: Iterable[Item], bucket_of: Callable[[Item], Hashable], size: int) -> Iterator[list[Item]]:
    """Groups of `size` items of one bucket, as soon as each is full; at the end, what is left in every bucket.

    Args:
        items: in any order of buckets.
        bucket_of: which bucket an item is of.
        size: items in a full group.
    """
    waiting: dict[Hashable, list[Item]] = defaultdict(list)
    for item in items:
        bucket = bucket_of(item)
        waiting[bucket].append(item)
        if len(waiting[bucket]) == size:
            yield waiting.pop(bucket)
    yield from waiting.values()
