"""What a config says of the images that go into a dataset: the units they are read from, and what is done to each."""

from __future__ import annotations

from collections.abc import Sequence

from fmscale.config import EncodeConfig
from fmscale.data.buckets import make_buckets
from fmscale.data.captions import Captions
from fmscale.data.prepare import Filters, Preparation, Size
from fmscale.data.sources import Unit, open_source


def open_units(config: EncodeConfig) -> Sequence[Unit]:
    """The units of the source of images.

    Raises:
        UserError: there is no such source, or nothing in it.
    """
    return open_source(config.images, Captions(config.captions, config.seed), config.shard_samples)


def preparation(config: EncodeConfig) -> Preparation:
    """What is done to every image.

    Raises:
        UserError: there are no such buckets.
    """
    scores = {name: (limits.min, limits.max) for name, limits in config.filters.scores.items()}
    filters = Filters(config.filters.min_side_px, config.filters.max_aspect, scores)
    return Preparation(_resolutions(config), config.max_pixels, config.max_upscale, filters)


def _resolutions(config: EncodeConfig) -> dict[str, list[Size]]:
    """The buckets of each resolution, by the ending of its keys."""
    if config.buckets_px:
        return {"": list(config.buckets_px)}
    made = {px: make_buckets(px, config.bucket_step_px, config.max_aspect) for px in config.resolutions_px}
    return {f"-{px}px" if len(made) > 1 else "": sizes for px, sizes in made.items()}
