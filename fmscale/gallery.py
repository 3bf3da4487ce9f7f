"""What a run can draw so far: the same few captions from the same noise, again and again while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from fmscale.batch import Conditioning
from fmscale.config import TrainConfig
from fmscale.data.counts import counts_of
from fmscale.data.mixture import Address, MixedBucket, Mixture
from fmscale.data.raw import RawSample
from fmscale.data.reader import Sample
from fmscale.data.tar import DamageError
from fmscale.dataset import Dataset, vae_folder
from fmscale.encoders.text import assemble
from fmscale.encoders.vae import reopen_vae
from fmscale.engine.optim import ema_names
from fmscale.errors import UserError
from fmscale.flow.noise import draw_noise
from fmscale.flow.solver import time_grid
from fmscale.pictures import NO_GUIDANCE, Guidance, contact_sheet, sample_latents, to_pixels

if TYPE_CHECKING:
    from fmscale.train import Job

SAMPLES = "samples"  # in the run directory
IMAGES = 8
COLUMNS = 4
SOLVER_STEPS = 28
GUIDANCE_SCALE = 4.0


class Gallery:
    """The captions of the first samples of the largest bucket, and the noise that is drawn from each time.

    Args:
        job: the run.

    Raises:
        UserError: the VAE is not the one that made the dataset, or no sample can be read.
    """

    def __init__(self, job: Job) -> None:
        self.job, mixture = job, job.dataset.mixture
        bucket = max(mixture.buckets, key=lambda bucket: bucket.count)
        samples = list(islice(sound_samples(mixture, bucket), IMAGES))
        if not samples:
            raise UserError(f"{mixture.name}: every sample of bucket {bucket.name} is damaged; encode it again")
        metas = [sample.read_meta() for sample in samples]
        self.captions = [meta.get("caption", "") for meta in metas]
        self.text = job.dataset.text_of(self._stored(samples, metas), self.captions)
        shape = (job.config.model.latent_channels, bucket.height, bucket.width)
        self.noise = torch.stack([draw_noise(shape, SAMPLES, job.config.seed, i) for i in range(len(samples))])
        folder, made = vae_folder(job.config.data, mixture), mixture.made_by["vae"]
        self.vae = reopen_vae(folder, made) if job.world.is_main else None

    def _stored(self, samples: Sequence[Sample | RawSample], metas: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """What is stored of the text of samples, with the counts of tokens that training masks by."""
        dataset = self.job.dataset
        if dataset.online is not None:
            return {}
        where = f"a sample in {dataset.mixture.name}"
        counts = [counts_of(meta, dataset.counted, where) for meta in metas]
        rows = [sample.tensors | count for sample, count in zip(samples, counts, strict=True)]
        return {name: torch.stack([row[name] for row in rows]) for name in dataset.null}

    def draw(self) -> Image.Image | None:
        """A sheet of what the averaged weights draw, or the raw ones where there is no average; every rank calls it.

        Returns:
            The sheet on rank 0, None elsewhere.
        """
        latents = self._latents()
        if self.vae is None:
            return None
        self.vae.model.to(self.job.world.device)  # it takes memory there only for as long as it is needed
        images = torch.cat([self.vae.decode(one[None]).cpu() for one in latents])
        self.vae.model.to("cpu")
        return contact_sheet(list(to_pixels(images)), self.captions, COLUMNS)

    def _latents(self) -> Tensor:
        config, engine, device = self.job.config, self.job.engine, self.job.world.device
        text = {name: value.to(device).float() for name, value in self.text.items()}
        nothing = {name: self.job.dataset.null[name].expand_as(value) for name, value in text.items()}
        averages = ema_names(config.ema.decays, config.ema.sigma_rels)
        with engine.averaged(averages[0]) if averages else nullcontext():
            return sample_latents(
                engine,
                self.noise.to(device),
                time_grid(SOLVER_STEPS, config.flow.shift),
                self._assemble(text),
                self._assemble(nothing),
                Guidance(GUIDANCE_SCALE) if config.conditioning.dropout else NO_GUIDANCE,  # untrained, it cannot guide
            )

    def _assemble(self, text: Mapping[str, Tensor]) -> Conditioning:
        dataset = self.job.dataset
        return assemble(text, context_dim=self.job.config.model.context_dim, t5_length=dataset.t5_length)


def sound_samples(mixture: Mixture, bucket: MixedBucket) -> Iterator[Sample | RawSample]:
    """The samples of a bucket that can be read, in the order in which they are stored."""
    for part, (start, count) in enumerate(zip(bucket.starts, bucket.counts, strict=True)):
        for row in range(start, start + count):
            address = Address(part, row)
            try:
                yield mixture.sample(address)
            except DamageError:
                continue  # training names it, when it comes to it


def check_gallery(config: TrainConfig, dataset: Dataset) -> None:
    """Refuse a run that is to show images, and could not.

    Raises:
        UserError: the VAE that made the dataset is not there.
    """
    if config.log.images_every_steps is None:
        return
    known = "vae" in dataset.mixture.made_by
    if not known or not vae_folder(config.data, dataset.mixture).is_dir():
        where = f"is no longer at {vae_folder(config.data, dataset.mixture)}" if known else "is unknown"
        raise UserError(
            f"log.images_every_steps: the VAE that made {dataset.mixture.name} {where}, so nothing can be shown; "
            f"{'give its folder: data.vae=DIR' if known else 'encode it again'}, or set log.images_every_steps=null"
        )
