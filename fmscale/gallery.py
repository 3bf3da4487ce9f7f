"""What a run can draw so far: the same few captions from the same noise, again and again while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fmscale.batch import Conditioning
from fmscale.config import TrainConfig
from fmscale.data.counts import counts_of
from fmscale.data.mixture import Address, MixedBucket, Mixture
from fmscale.data.raw import RawSample
from fmscale.data.reader import Sample
from fmscale.data.tar import DamageError
from fmscale.dataset import MOVED, Dataset, moved_encoders, open_text_encoders, vae_folder
from fmscale.distributed import everywhere, total
from fmscale.encoders.text import assemble, find_text_encoders
from fmscale.encoders.vae import reopen_vae
from fmscale.engine.optim import ema_names
from fmscale.errors import UserError
from fmscale.flow.noise import draw_noise
from fmscale.objective import shift_for
from fmscale.pictures import (
    NO_GUIDANCE,
    Guidance,
    contact_sheet,
    default_solver,
    default_steps,
    sample_latents,
    times_for,
    to_pixels,
)

if TYPE_CHECKING:
    from fmscale.train import Job

SAMPLES = "samples"  # in the run directory
IMAGES = 8
COLUMNS = 4
TITLE_PX = 20
GUIDANCE_SCALE = 4.0


class Gallery:
    """Prompts, or captions of the first samples of the largest bucket, and the noise that is drawn from each time.

    Args:
        job: the run.

    Raises:
        UserError: VAE or text encoders are not those that made the dataset, or no sample can be read.
    """

    def __init__(self, job: Job) -> None:
        self.job, mixture = job, job.dataset.mixture
        bucket = max(mixture.buckets, key=lambda bucket: bucket.count)
        self.captions = list(job.config.log.prompts)
        self.text = self._encoded(self.captions) if self.captions else self._of_samples(bucket)
        shape = (job.config.model.latent_channels, bucket.height, bucket.width)
        self.noise = torch.stack([draw_noise(shape, SAMPLES, job.config.seed, i) for i in range(len(self.captions))])
        folder, made = vae_folder(job.config.data, mixture), mixture.made_by["vae"]
        self.vae = reopen_vae(folder, made) if job.world.is_main else None

    def _encoded(self, prompts: list[str]) -> Mapping[str, Tensor]:
        """Text features of prompts; where training encodes none itself, one rank does, and tells the others."""
        dataset, device, data = self.job.dataset, self.job.world.device, self.job.config.data
        if dataset.online is not None:
            return dataset.text_of({}, prompts)

        def encode() -> dict[str, Tensor]:
            if not self.job.world.is_main:
                return {name: value.new_zeros((len(prompts), *value.shape)) for name, value in dataset.null.items()}
            return open_text_encoders(data, dataset.mixture).encode(prompts, bool(dataset.counted))

        found = everywhere(encode, device)
        return {name: total(found[name].to(device, null.dtype)) for name, null in dataset.null.items()}

    def _of_samples(self, bucket: MixedBucket) -> Mapping[str, Tensor]:
        """Text features of the first samples of a bucket, whose captions are noted."""
        mixture = self.job.dataset.mixture
        samples = list(islice(sound_samples(mixture, bucket), IMAGES))
        if not samples:
            raise UserError(f"{mixture.name}: every sample of bucket {bucket.name} is damaged; encode it again")
        metas = [sample.read_meta() for sample in samples]
        self.captions = [meta.get("caption", "") for meta in metas]
        return self.job.dataset.text_of(self._stored(samples, metas), self.captions)

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
        """A sheet of what the first average draws, and below it what the raw weights do; every rank calls it.

        Returns:
            The sheet on rank 0, None elsewhere.
        """
        engine, ema = self.job.engine, self.job.config.ema
        latents = {}
        for average in ema_names(ema.decays, ema.sigma_rels)[:1]:
            with engine.averaged(average):
                latents[average] = self._latents()
        latents["raw weights"] = self._latents()
        if self.vae is None:
            return None
        self.vae.model.to(self.job.world.device)  # it takes memory there only for as long as it is needed
        sheets = {}
        for title, drawn in latents.items():
            images = torch.cat([self.vae.decode(one[None]).cpu() for one in drawn])
            sheets[title] = contact_sheet(list(to_pixels(images)), self.captions, COLUMNS)
        self.vae.model.to("cpu")
        return one_below_another(sheets)

    def _latents(self) -> Tensor:
        """What the weights of the forward pass draw now, a few images at once."""
        return torch.cat([self._drawn(slice(i, i + IMAGES)) for i in range(0, len(self.captions), IMAGES)])

    def _drawn(self, rows: slice) -> Tensor:
        config, device = self.job.config, self.job.world.device
        text = {name: value[rows].to(device).float() for name, value in self.text.items()}
        nothing = {name: self.job.dataset.null[name].expand_as(value) for name, value in text.items()}
        solver, shift = default_solver(config.flow), shift_for(config.flow, config.model, *self.noise.shape[-2:])
        return sample_latents(
            self.job.engine,
            self.noise[rows].to(device),
            times_for(config.flow, shift, default_steps(solver), solver),
            self._assemble(text),
            self._assemble(nothing),
            Guidance(GUIDANCE_SCALE) if config.conditioning.dropout else NO_GUIDANCE,  # untrained, it cannot guide
            solver,
            config.flow,
        )

    def _assemble(self, text: Mapping[str, Tensor]) -> Conditioning:
        dataset = self.job.dataset
        return assemble(text, context_dim=self.job.config.model.context_dim, t5_length=dataset.t5_length)


def one_below_another(sheets: Mapping[str, Image.Image]) -> Image.Image:
    """Pictures by title, each under its title."""
    width, height = max(one.width for one in sheets.values()), sum(one.height + TITLE_PX for one in sheets.values())
    whole = Image.new("RGB", (width, height), "white")
    draw, font, top = ImageDraw.Draw(whole), ImageFont.load_default(TITLE_PX - 4), 0
    for title, sheet in sheets.items():
        draw.text((4, top), title, fill="black", font=font)
        whole.paste(sheet, (0, top + TITLE_PX))
        top += sheet.height + TITLE_PX
    return whole


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
        UserError: the VAE that made the dataset is not there; or prompts are given, and the text encoders are not.
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
    if config.log.prompts:
        if "text" not in dataset.mixture.made_by:
            raise UserError(f"log.prompts: {dataset.mixture.name} names no text encoders that could read them")
        find_text_encoders(dataset.mixture.made_by, moved_encoders(config.data), MOVED)
