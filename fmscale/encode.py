"""Pre-encoding: images and captions -> aspect buckets -> indexed latent shards.

data/sources (bytes, caption) -> bucket -> resize and crop -> VAE ─┐
                                        caption -> text encoders ─┴─► data/shards -> data/index
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch

from fmscale import inputs
from fmscale.batch import BadSample
from fmscale.config import EncodeConfig
from fmscale.data.buckets import grouped
from fmscale.data.index import Index
from fmscale.data.index_build import build_index
from fmscale.data.prepare import Preparation, Prepared
from fmscale.data.reasons import ImageError
from fmscale.data.shards import ShardWriter
from fmscale.data.sources import SourceImage
from fmscale.encoders.null import save_null
from fmscale.encoders.vae import Vae
from fmscale.errors import UserError
from fmscale.features import Encoder, add_up, describe, summarize
from fmscale.files import new_folder
from fmscale.log import get_logger, progress

log = get_logger(__name__)
FAILURES = "failures.jsonl"


def encode(config: EncodeConfig) -> Index:
    """Encode a source of images into a dataset.

    An image that cannot be used is named, counted by reason, listed in `failures.jsonl`, and skipped.

    Args:
        config: what to encode, with what, and where to.

    Returns:
        The dataset's index. The folder `config.out` appears only when it is whole.

    Raises:
        UserError: a path is missing, `out` exists, buckets do not fit the VAE, the disk is full, or no image is usable.
    """
    preparation = inputs.preparation(config)
    sources = chain.from_iterable(unit.read() for unit in inputs.open_units(config))
    with new_folder(config.out) as folder:
        encoder = Encoder(config)
        _check_buckets(preparation, encoder.vae)
        facts: dict[str, float] = {}
        failures = _encode_all(config, encoder, preparation, folder, sources, facts)
        if not list(folder.glob("*.tar")):
            raise UserError(f"images: no image in {config.images} could be encoded ({_tally(failures)})")
        save_null(folder, encoder.null())
        (folder / FAILURES).write_text("".join(json.dumps(failure) + "\n" for failure in failures))
        build_index(folder, {**encoder.identity(), "captions": summarize(facts)})
    index = Index.open(config.out)
    log.info("%s: %s samples in buckets %s", config.out, f"{len(index):,}", ", ".join(b.name for b in index.buckets))
    for sentence in describe(summarize(facts)):
        log.info("%s", sentence)
    if failures:
        log.warning("%d images were skipped (%s); see %s", len(failures), _tally(failures), config.out / FAILURES)
    return index


def _encode_all(
    config: EncodeConfig,
    encoder: Encoder,
    preparation: Preparation,
    folder: Path,
    sources: Iterator[SourceImage | BadSample],
    facts: dict[str, float],
) -> list[dict[str, str]]:
    """Write the shards, and add up facts about captions; returns what was skipped and why."""
    failures: list[dict[str, str]] = []
    with ShardWriter(folder, samples_per_shard=config.shard_samples) as writer, progress() as bar:
        counted = bar.track(sources, total=None, description="encode")
        images = _prepare_all(counted, preparation, failures)
        for batch in grouped(images, lambda image: image.pixels.shape, config.batch):
            for image, tensors in encoder.encode(batch):
                if all(bool(torch.isfinite(value).all()) for value in tensors.values()):
                    writer.write(image.key, tensors, image.meta)
                    add_up(facts, encoder.facts(image.meta))
                else:
                    failures.append(_skip(image.key, "latents or text features are not finite"))
    return failures


def _prepare_all(
    sources: Iterable[SourceImage | BadSample],
    preparation: Preparation,
    failures: list[dict[str, str]],
) -> Iterator[Prepared]:
    """The images that can be used; the others are added to `failures`."""
    padded = 0
    for source in sources:
        try:
            images = preparation.prepare(source)
        except ImageError as error:
            name = source.key or source.shard if isinstance(source, BadSample) else source.key
            failures.append(_skip(name, error.reason, error.detail))
            continue
        padded += images[0].padded
        yield from images
    if padded:
        log.warning("%d images seem to have been padded to squares: their aspect ratio is lost", padded)


def _skip(key: str, reason: str, detail: str = "") -> dict[str, str]:
    log.warning("skipped %s: %s", key, f"{reason}: {detail}" if detail else reason)
    return {"key": key, "reason": reason, "detail": detail}


def _check_buckets(preparation: Preparation, vae: Vae) -> None:
    for height, width in chain.from_iterable(preparation.resolutions.values()):
        if height % vae.factor or width % vae.factor:
            raise UserError(
                f"bucket {height}x{width} px: the VAE needs multiples of {vae.factor} px; see bucket_step_px"
            )


def _tally(failures: list[dict[str, str]]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in Counter(f["reason"] for f in failures).most_common(5))
