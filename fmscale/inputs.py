"""What a config says of the images that go into a dataset: the units they are read from, and what is done to each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fmscale.config import EncodeConfig
from fmscale.data.buckets import make_buckets
from fmscale.data.captions import Captions
from fmscale.data.prepare import Filters, Preparation, Size
from fmscale.data.raw import RawImages
from fmscale.data.sources import Unit, open_source
from fmscale.errors import UserError


def open_units(config: EncodeConfig) -> Sequence[Unit]:
    """The units of the source of images.

    Raises:
        UserError: there is no such source, or nothing in it.
    """
    return open_source(config.images, captions(config), config.shard_samples)


def captions(config: EncodeConfig) -> Captions:
    """Which captions are taken."""
    return Captions(config.captions, config.seed)


def preparation(config: EncodeConfig) -> Preparation:
    """What is done to every image.

    Raises:
        UserError: there are no such buckets.
    """
    scores = {name: (limits.min, limits.max) for name, limits in config.filters.scores.items()}
    filters = Filters(config.filters.min_side_px, config.filters.max_aspect, scores)
    return Preparation(_resolutions(config), config.max_pixels, config.max_upscale, filters)


def raw_images(config: EncodeConfig, vae: Mapping[str, Any]) -> RawImages:
    """How training makes samples of images that are not encoded before.

    Args:
        config: how they would be encoded.
        vae: identity of the VAE.

    Raises:
        UserError: there are no such buckets.
    """
    return RawImages(preparation(config), captions(config), vae, config.latents, config.flip)


def check_raw(config: EncodeConfig) -> None:
    """Refuse what can only be done to images that are encoded before training.

    Raises:
        UserError: says what, and what to do.
    """
    if len(preparation(config).resolutions) > 1:
        raise UserError("resolutions_px: images that training encodes are taken at one resolution; give one")
    if config.latents == "sample":
        raise UserError(
            "latents: `sample` is one that is stored; for images that training encodes give `posterior`, of which each "
            "step draws a sample, or `mean`"
        )


def _resolutions(config: EncodeConfig) -> dict[str, list[Size]]:
    """The buckets of each resolution, by the ending of its keys."""
    if config.buckets_px:
        return {"": list(config.buckets_px)}
    made = {px: make_buckets(px, config.bucket_step_px, config.max_aspect) for px in config.resolutions_px}
    return {f"-{px}px" if len(made) > 1 else "": sizes for px, sizes in made.items()}
