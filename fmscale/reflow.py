"""A trained run -> (noise, latent) pairs, in the same indexed shards; `train` takes them with flow.coupling=paired."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmscale.batch import COUNT, Conditioning
from fmscale.config import ReflowConfig
from fmscale.data.buckets import grouped
from fmscale.data.counts import counts_of
from fmscale.data.index import Index
from fmscale.data.index_build import build_index
from fmscale.data.mixture import MixedBucket, Mixture
from fmscale.data.shards import ShardWriter
from fmscale.data.tar import DamageError
from fmscale.dataset import is_online, making, open_mixture, open_null
from fmscale.distributed import world_from_environment
from fmscale.encoders.null import save_null
from fmscale.encoders.text import ROLES, assemble, trim
from fmscale.errors import UserError
from fmscale.features import STORAGE
from fmscale.files import new_folder
from fmscale.flow.coupling import NOISE_KEY
from fmscale.flow.noise import draw_noise
from fmscale.flow.solver import time_grid
from fmscale.log import get_logger, progress
from fmscale.pictures import guidance_of, sample_latents
from fmscale.runs import Run, open_run

log = get_logger(__name__)


def reflow(config: ReflowConfig, allow_pipe: bool = False) -> Index:
    """Generate pairs with a run's EMA weights from the captions of a dataset.

    Args:
        config: teacher, captions, solver, and where to write.
        allow_pipe: programs that it names may be started.

    Returns:
        The index of the pairs; the folder `config.out` appears only when it is whole.

    Raises:
        UserError: teacher or dataset cannot be used, or `out` exists.

    Source: Liu et al. 2022, arXiv:2209.03003, sec. 2.2.
    """
    run, source = open_run(config.teacher), open_mixture(config.data, allow_pipe)
    check_teacher(run, source)
    with new_folder(config.out) as folder:
        null = open_null(source, run.config.conditioning.null, run.config.conditioning.text == "masked")
        teacher = Teacher(config, run, null)
        with ShardWriter(folder, samples_per_shard=config.shard_samples) as writer, progress() as bar:
            captions = bar.track(read_captions(config, source), total=config.pairs, description="reflow")
            for batch in grouped(captions, lambda caption: caption.bucket, config.batch):
                for caption, latents in zip(batch, teacher.draw(batch), strict=True):
                    meta = {"caption": caption.words, NOISE_KEY: list(caption.noise_key), **caption.tokens}
                    writer.write(f"pair{caption.number:09d}", {"latents": latents, **caption.text}, meta)
        save_null(folder, {name: value.to(STORAGE["fp32"]) for name, value in null.items()})
        build_index(folder, {**source.made_by, "program": "fmscale reflow", "teacher": teacher.identity()})
    index = Index.open(config.out)
    log.info("%s: %d pairs", config.out, len(index))
    return index


def check_teacher(run: Run, source: Mixture) -> None:
    """Refuse captions that the teacher cannot read, and shapes that it was not made for.

    Raises:
        UserError: the dataset was made by other networks than those of the teacher's, or stores no text features.
    """
    if source.raw is not None:
        raise UserError(f"data: {source.name} holds images, pairs need text features; give what `fmscale encode` makes")
    if is_online(source):
        raise UserError(
            f"data: {source.name} leaves captions to be encoded in training, pairs need their features; encode it "
            "again with text.online=false"
        )
    if making(run.made_by) != making(source.made_by):
        raise UserError(
            f"data: {source.name} and the dataset of {run.path} were not made by the same VAE and text encoders; "
            "give a dataset that was encoded as the teacher's"
        )


class Caption(NamedTuple):
    """What a pair is generated from: the text of one sample.

    Attributes:
        number: of the pair.
        bucket: of the sample, and so of the pair.
        text: features as stored.
        words: the caption itself.
        tokens: how many it has, by text encoder, as `tokens` in the json; empty where that does not say.
        noise_key: what the pair's noise is a function of.
    """

    number: int
    bucket: MixedBucket
    text: dict[str, Tensor]
    words: str
    tokens: dict[str, Any]
    noise_key: tuple[str, int, int]


def read_captions(config: ReflowConfig, source: Mixture) -> Iterator[Caption]:
    """The captions of `config.pairs` samples, in the order in which training would see them."""
    order = source.order(1, config.seed, config.data.run)
    for number in range(config.pairs):
        plan = order.batch(number)
        bucket, address = source.buckets[plan.bucket], source.addresses(plan)[0]
        try:
            sample = source.sample(address)
        except DamageError as error:
            log.warning("skipped %s: %s", source.key(address), error)
            continue
        text = {name: value for name, value in sample.tensors.items() if name.removesuffix("_pooled") in ROLES}
        meta = sample.read_meta()
        tokens = {name: value for name, value in meta.items() if name == "tokens"}
        yield Caption(number, bucket, text, meta.get("caption", ""), tokens, ("reflow", config.seed, number))


class Teacher:
    """The trained network that generates the pairs' latents.

    Args:
        config: solver and guidance.
        run: whose EMA weights are used.
        null: per text tensor, the features that guidance leads away from.
    """

    def __init__(self, config: ReflowConfig, run: Run, null: Mapping[str, Tensor]) -> None:
        self.config, self.run, self.null = config, run, null
        self.counted = [role for role in ROLES if role + COUNT in null]
        self.device = world_from_environment().device
        self.model = run.model("ema").to(self.device)
        self.times = time_grid(config.solver_steps, run.config.flow.shift)

    def draw(self, captions: Sequence[Caption]) -> Tensor:
        """Latents for captions of one bucket: shape (B, C, H, W), on the CPU, as they are stored."""
        bucket = captions[0].bucket
        shape = (self.run.config.model.latent_channels, bucket.height, bucket.width)
        noise = torch.stack([draw_noise(shape, *caption.noise_key) for caption in captions]).to(self.device)
        rows = [caption.text | self._counts(caption) for caption in captions]
        text = {name: torch.stack([row[name] for row in rows]).float() for name in rows[0]}
        nothing = {name: self.null[name].expand_as(value) for name, value in text.items()}
        latents = sample_latents(
            self.model,
            noise,
            self.times,
            self._assemble(text),
            self._assemble(nothing),
            guidance_of(self.config.guidance_scale, self.run.takes_guidance),
            self.config.solver,
        )
        return latents.to("cpu", STORAGE[self.config.dtype])

    def _counts(self, caption: Caption) -> dict[str, Tensor]:
        return counts_of(caption.tokens, self.counted, f"the caption of pair {caption.number}")

    def _assemble(self, text: Mapping[str, Tensor]) -> Conditioning:
        on_device = {name: value.to(self.device) for name, value in text.items()}
        context_dim, t5_length = self.run.config.model.context_dim, self.run.made_by["t5_length"]
        return trim(assemble(on_device, context_dim=context_dim, t5_length=t5_length))

    def identity(self) -> dict[str, Any]:
        """What the pairs' manifest says about their making."""
        return {
            "run": str(self.run.path.absolute()),
            "step": self.run.checkpoint.step,
            "solver": self.config.solver,
            "solver_steps": self.config.solver_steps,
            "guidance_scale": self.config.guidance_scale,
        }
