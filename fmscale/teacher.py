"""A trained network that makes latents for captions, and where the captions come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmscale.batch import COUNT, Conditioning
from fmscale.config import ReflowConfig
from fmscale.data.counts import counts_of
from fmscale.data.mixture import Mixture
from fmscale.dataset import is_online, making, open_mixture, open_null
from fmscale.distributed import world_from_environment
from fmscale.encoders.text import (
    ROLES,
    TextEncoders,
    assemble,
    find_text_encoders,
    reopen_text_encoders,
    trim,
    zeros_for,
)
from fmscale.errors import UserError
from fmscale.features import STORAGE
from fmscale.files import read_lines
from fmscale.flow.noise import draw_noise
from fmscale.imported import open_run_or_published
from fmscale.objective import shift_for
from fmscale.pictures import check_solver, default_solver, guidance_of, sample_latents, times_for
from fmscale.runs import Run

MOVED = "text_encoders."  # how one gives the folder of a text encoder that is no longer where it was


class Caption(NamedTuple):
    """What a pair is made from.

    Attributes:
        number: of the pair.
        size: of its latents, (height, width).
        words: the caption itself.
        text: features as a dataset stores them; empty where they are made from the words.
        tokens: how many it has, by text encoder, where that is known.
        noise_key: what the pair's noise is a function of.
    """

    number: int
    size: tuple[int, int]
    words: str
    text: dict[str, Tensor]
    tokens: dict[str, int]
    noise_key: tuple[str, int, int]


class DatasetCaptions:
    """The captions of a dataset, in the order in which training would see them, with the shapes of its images.

    Args:
        source: the dataset.
        seed: of the order.
        run: neighbours that stay together in it.
    """

    def __init__(self, source: Mixture, seed: int, run: int) -> None:
        self._source, self._seed, self._order = source, seed, source.order(1, seed, run)

    def read(self, number: int) -> Caption:
        """The caption of a pair.

        Raises:
            DamageError: its sample is damaged.
        """
        plan = self._order.batch(number)
        bucket, sample = self._source.buckets[plan.bucket], self._source.sample(self._source.addresses(plan)[0])
        text = {name: value for name, value in sample.tensors.items() if name.removesuffix("_pooled") in ROLES}
        meta = sample.read_meta()
        key, size = ("reflow", self._seed, number), (bucket.height, bucket.width)
        return Caption(number, size, meta.get("caption", ""), text, meta.get("tokens", {}), key)


class WrittenCaptions:
    """The lines of a text file, again and again, each time in the next of some shapes.

    Args:
        lines: of the file.
        sizes: of latents, (height, width).
        seed: of the noise.
    """

    def __init__(self, lines: Sequence[str], sizes: Sequence[tuple[int, int]], seed: int) -> None:
        self._lines, self._sizes, self._seed = lines, sizes, seed

    def read(self, number: int) -> Caption:
        """The caption of a pair."""
        turn, place = divmod(number, len(self._lines))
        size = self._sizes[(turn + place) % len(self._sizes)]
        return Caption(number, size, self._lines[place], {}, {}, ("reflow", self._seed, number))


class Captions(NamedTuple):
    """Where a config's captions come from.

    Attributes:
        by_number: reads them.
        source: dataset that they are of; None for a text file.
        pairs: how many are asked for.
        sizes: of latents, (height, width), that there are.
        settings: the part of the config that says which they are, by what is in them.
    """

    by_number: DatasetCaptions | WrittenCaptions
    source: Mixture | None
    pairs: int
    sizes: tuple[tuple[int, int], ...]
    settings: Mapping[str, Any]


def open_captions(config: ReflowConfig, run: Run, allow_pipe: bool) -> Captions:
    """The captions that a config names.

    Raises:
        UserError: they are not there, or the teacher cannot read them.
    """
    if config.data is not None:
        source = open_mixture(config.data, allow_pipe)
        _check_source(run, source)
        assert config.pairs is not None
        sizes = tuple((bucket.height, bucket.width) for bucket in source.buckets)
        weights = [part.weight for part in config.data.mixture]
        data = {"fingerprint": source.fingerprint, "run": config.data.run, "weights": weights}
        by_number = DatasetCaptions(source, config.seed, config.data.run)
        return Captions(by_number, source, config.pairs, sizes, {"data": data})
    assert config.prompts is not None
    lines = read_lines(config.prompts, "prompts")
    given = tuple(_sizes(config, run))
    written, pairs = WrittenCaptions(lines, given, config.seed), config.pairs or len(lines)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return Captions(written, None, pairs, given, {"prompts": {"sha256": digest}})


def check_drawing(config: ReflowConfig, run: Run, captions: Captions) -> None:
    """Refuse, before anything is made, what the teacher cannot draw.

    Raises:
        UserError: solver, steps or a size do not go with it, or a text encoder is gone.
    """
    solver, flow, model = solver_of(config, run), run.config.flow, run.config.model
    check_solver(solver, flow)
    covered = getattr(model, "pos_embed_max_size", None)  # rotary positions have no end
    for size in captions.sizes:
        if covered and max(size) > covered * model.patch_size:
            px = run.made_by["vae"]["factor"] * covered * model.patch_size
            raise UserError(f"sizes: the teacher's positions cover {px} px on a side, no more; give smaller images")
        times_for(flow, shift_for(flow, model, *size), config.solver_steps, solver)
    if captions.source is None or is_online(captions.source):
        find_text_encoders(run.made_by, _moved(config), MOVED)


def _moved(config: ReflowConfig) -> dict[str, str]:
    return {role: str(folder) for role, folder in config.text_encoders.items()}


def _sizes(config: ReflowConfig, run: Run) -> list[tuple[int, int]]:
    """Latent sizes for written captions."""
    model, factor = run.config.model, run.made_by["vae"]["factor"]
    step = factor * model.patch_size
    side = model.base_size * step
    for height, width in config.sizes_px:
        if height % step or width % step:
            raise UserError(f"sizes_px: {height}x{width} px: both sides must be multiples of {step}")
    return [(height // factor, width // factor) for height, width in config.sizes_px or ((side, side),)]


def _check_source(run: Run, source: Mixture) -> None:
    """Refuse captions that the teacher cannot read, and shapes that it was not made for.

    Raises:
        UserError: the dataset holds images, or was made by other networks than the teacher's.
    """
    if source.raw is not None:
        raise UserError(f"data: {source.name} holds images, pairs need captions; give what `fmscale encode` makes")
    if making(run.made_by) != making(source.made_by):
        raise UserError(
            f"data: {source.name} and the dataset of {run.path} were not made by the same VAE and text encoders; "
            "give a dataset that was encoded as the teacher's"
        )


class Teacher:
    """The trained network that makes the pairs' latents.

    Args:
        config: solver, guidance, and what is stored.
        run: whose averaged weights are used.
        captions: that it will be given.

    Raises:
        UserError: the weights are damaged, a text encoder is gone, or no such solver goes with such a network.
    """

    def __init__(self, config: ReflowConfig, run: Run, captions: Captions) -> None:
        self.config, self.run = config, run
        self.solver = solver_of(config, run)
        self.device = world_from_environment().device
        conditioning = run.config.conditioning
        self.masked = conditioning.text == "masked"
        stored = captions.source is not None and not is_online(captions.source)
        self.encoders = None if stored else self._open_encoders()
        self.null = (
            open_null(captions.source, conditioning.null, self.masked)
            if captions.source is not None
            else self._encode_null(conditioning.null)
        )
        self.counted = [role for role in ROLES if role + COUNT in self.null]
        self.model = run.model(self.weights).to(self.device)

    @property
    def weights(self) -> Any:
        """Which weights of the run generate."""
        return "ema" if self.config.ema_std is None else self.config.ema_std

    def _open_encoders(self) -> TextEncoders:
        return reopen_text_encoders(self.run.made_by, _moved(self.config), MOVED, self.device)

    def _encode_null(self, kind: str) -> dict[str, Tensor]:
        assert self.encoders is not None
        features = {name: value[0].cpu() for name, value in self.encoders.encode([""], self.masked).items()}
        return zeros_for(features) if kind == "zeros" else features

    def draw(self, captions: Sequence[Caption]) -> tuple[Tensor, dict[str, Tensor]]:
        """Pairs for captions of one size: latents, shape (B, C, H, W), and text features (B, …), as they are stored."""
        flow, size = self.run.config.flow, captions[0].size
        shape = (self.run.config.model.latent_channels, *size)
        noise = torch.stack([draw_noise(shape, *caption.noise_key) for caption in captions]).to(self.device)
        text = self._text(captions)
        nothing = {name: self.null[name].expand_as(value) for name, value in text.items()}
        latents = sample_latents(
            self.model,
            noise,
            times_for(flow, shift_for(flow, self.run.config.model, *size), self.config.solver_steps, self.solver),
            self._assemble(text),
            self._assemble(nothing),
            guidance_of(self.config.guidance_scale, self.run.takes_guidance),
            self.solver,
            flow,
        )
        dtype = STORAGE[self.config.dtype]
        kept = {} if self.config.text == "captions" else captions[0].text or text
        rows = {name: value for name, value in text.items() if name in kept and not name.endswith(COUNT)}
        return latents.to("cpu", dtype), {name: value.cpu() for name, value in rows.items()}

    def _text(self, captions: Sequence[Caption]) -> dict[str, Tensor]:
        if self.encoders is not None:
            features = self.encoders.encode([caption.words for caption in captions], self.masked)
            return {name: value.cpu() for name, value in features.items()}
        rows = [
            caption.text | counts_of({"tokens": caption.tokens}, self.counted, f"the caption of pair {caption.number}")
            for caption in captions
        ]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def tokens(self, captions: Sequence[Caption]) -> list[dict[str, int]]:
        """How many tokens each caption has, by text encoder."""
        if self.encoders is None:
            return [caption.tokens for caption in captions]
        counts = self.encoders.count([caption.words for caption in captions])
        return [{role: counted[row] for role, counted in counts.items()} for row in range(len(captions))]

    def _assemble(self, text: Mapping[str, Tensor]) -> Conditioning:
        on_device = {name: value.to(self.device) for name, value in text.items()}
        widened = {name: value if name.endswith(COUNT) else value.float() for name, value in on_device.items()}
        context_dim, t5_length = self.run.config.model.context_dim, self.run.made_by["t5_length"]
        return trim(assemble(widened, context_dim=context_dim, t5_length=t5_length))


def solver_of(config: ReflowConfig, run: Run) -> str:
    """What generates."""
    return default_solver(run.config.flow) if config.solver == "auto" else config.solver


def identity(config: ReflowConfig, run: Run) -> dict[str, Any]:
    """What the pairs' manifest says about their making."""
    index = json.dumps(run.checkpoint.index, sort_keys=True)
    return {
        "run": str(run.path.absolute()),
        "step": run.checkpoint.step,
        "fingerprint": hashlib.sha256(index.encode()).hexdigest(),
        "solver": solver_of(config, run),
        "solver_steps": config.solver_steps,
        "guidance_scale": config.guidance_scale,
    }


def unit_names(pairs: int, each: int) -> list[str]:
    """Names of the pieces of work, each so many pairs."""
    return [f"{number:06d}" for number in range(ceil(pairs / each))]


def open_teacher(config: ReflowConfig) -> Run:
    """The run whose weights generate, or an exported folder as if it were one.

    Raises:
        UserError: there is none, or its weights are damaged.
    """
    return open_run_or_published(config.teacher, "ema" if config.ema_std is None else config.ema_std, config.step)
