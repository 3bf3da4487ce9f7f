"""What a dataset stores of an image and its caption, from the frozen networks: `Prepared` -> tensors by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmscale.data.prepare import Preparation, Prepared, as_floats
from fmscale.data.tensors import SCALE, narrow, widen
from fmscale.distributed import world_from_environment
from fmscale.encode_config import EncodeConfig, TextSource
from fmscale.encoders.text import ROLES, TextEncoders, load_text_encoders
from fmscale.encoders.vae import FLIPPED, LATENTS, LOG_VARIANCE, Vae, load_vae
from fmscale.encoders.weights import model_folder
from fmscale.errors import UserError
from fmscale.flow.noise import draw_noise

CUT = "cut for "  # a fact's name, with the role after it: captions that had more tokens than the encoder takes
T5_ERROR = "t5_fp8_error"  # in a sample's json, and in the manifest over all of them: relative, root mean square
STORAGE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Encoder:
    """The frozen networks and how their output is stored."""

    def __init__(self, config: EncodeConfig) -> None:
        device = world_from_environment().device
        self.config = config
        self.storage = STORAGE[config.dtype]
        compute = config.vae_compute
        self.vae_folder = model_folder(config.vae).absolute()
        self.vae: Vae = load_vae(
            self.vae_folder,
            device,
            STORAGE[compute.dtype],
            channels_last=compute.channels_last,
            compile=compute.compile,
            tile_px=compute.tile_px,
        )
        self.sources = {role: local(source) for role in ROLES if (source := getattr(config.text, role)) is not None}
        self.text: TextEncoders = load_text_encoders(
            self.sources,
            config.text.t5_length,
            device,
            self.storage if device.type == "cuda" else torch.float32,  # CPUs are slow in 16 bits
            clip_length=config.text.clip_length,
            pipeline=config.text.pipeline,
        )

    def encode(self, images: list[Prepared]) -> Iterator[tuple[Prepared, dict[str, Tensor]]]:
        """Images of one bucket, their tokens counted, each with the tensors that are stored of it, finite or not."""
        captions = [image.caption for image in images]
        tokens = self.text.count(captions)
        tensors = self._latents(images) | ({} if self.config.text.online else self.text.encode(captions))
        stored = {name: value.to("cpu", self.storage) for name, value in tensors.items()}
        errors: list[float] = []
        if self.config.text.t5_fp8:
            stored["t5"], stored["t5" + SCALE], errors = to_fp8(tensors["t5"])
        for row, image in enumerate(images):
            meta = {**image.meta, "tokens": {role: counts[row] for role, counts in tokens.items()}}
            if errors:
                meta[T5_ERROR] = errors[row]
            yield replace(image, meta=meta), {name: value[row].contiguous() for name, value in stored.items()}

    def _latents(self, images: list[Prepared]) -> dict[str, Tensor]:
        """Latents of the images, and of the mirrored ones, by the names that `draws.draw_latents` reads."""
        pixels = as_floats(images, self.vae.model.device)
        latents: dict[str, Tensor] = {}
        for name, view in {LATENTS: pixels, FLIPPED: pixels.flip(-1)}.items():
            if name == FLIPPED and not self.config.flip:
                continue
            posterior = self.vae.posterior(view)
            latents[name] = posterior.mean
            if self.config.latents == "posterior":
                latents[name + LOG_VARIANCE] = posterior.log_variance
            elif self.config.latents == "sample":
                shape, seed = posterior.mean.shape[1:], self.config.seed
                noise = torch.stack([draw_noise(shape, name, seed, image.key) for image in images])
                latents[name] = posterior.sample(noise.to(posterior.mean.device))
        return latents

    def null(self) -> dict[str, Tensor]:
        """The features of the empty caption, as stored, and its tokens, counted."""
        features = {name: value[0].cpu() for name, value in self.text.encode([""], counted=True).items()}
        return {name: value.to(self.storage) if value.ndim else value for name, value in features.items()}

    def facts(self, meta: Mapping[str, Any]) -> dict[str, float]:
        """What the json of a sample adds to the facts about all captions, which `summarize` makes of their sum."""
        cut = [role for role, count in meta["tokens"].items() if count > self.text.by_role[role].max_length]
        squares = {T5_ERROR: meta[T5_ERROR] ** 2} if T5_ERROR in meta else {}
        return {"captions": 1, **{CUT + role: 1 for role in cut}, **squares}

    def identity(self) -> dict[str, Any]:
        """What the dataset's manifest says about its making."""
        text = self.config.text
        return {
            "program": "fmscale encode",
            "vae": {"path": str(self.vae_folder), **self.vae.identity()},
            "text": {role: {"source": self.sources[role], **made} for role, made in self.text.identity().items()},
            "pipeline": text.pipeline,
            "clip_length": text.clip_length,
            "t5_length": text.t5_length,
            "t5_fp8": text.t5_fp8,
            "text_online": text.online,
            "dtype": self.config.dtype,
            "latents": self.config.latents,
            "flip": self.config.flip,
            "vae_compute": self.config.vae_compute.model_dump(mode="json"),
        }


def check_buckets(preparation: Preparation, vae: Vae) -> None:
    """Refuse buckets that the VAE cannot encode.

    Raises:
        UserError: names the first.
    """
    for height, width in chain.from_iterable(preparation.resolutions.values()):
        if height % vae.factor or width % vae.factor:
            raise UserError(
                f"bucket {height}x{width} px: the VAE needs multiples of {vae.factor} px; see bucket_step_px"
            )


def local(source: TextSource) -> dict[str, str | None]:
    """A text encoder's source on this machine; what the Hugging Face hub has is fetched."""
    folders = {"path": source.path, "tokenizer": source.tokenizer}
    fetched = {name: str(model_folder(place)) if place else None for name, place in folders.items()}
    return absolute(source.model_dump(mode="json") | fetched)


def absolute(source: dict[str, str | None]) -> dict[str, str | None]:
    """A text encoder's source with paths that hold from any folder; names on the Hugging Face hub stay as they are."""
    paths = {key for key in ("path", "tokenizer", "checkpoint") if source.get(key) and Path(str(source[key])).exists()}
    return {key: str(Path(str(value)).absolute()) if key in paths else value for key, value in source.items()}


def to_fp8(tokens: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """Token features in 8 bits, on the CPU.

    Args:
        tokens: shape (B, L, D).

    Returns:
        Numbers (B, L, D) and scales (B, L), as `data.tensors.widen` takes them; and what that loses of each of the B:
        the norm of the difference over the norm of the features.
    """
    numbers, scales = narrow(tokens)
    lost = widen({"t5": numbers, "t5" + SCALE: scales})["t5"] - tokens.float()
    errors = lost.flatten(1).norm(dim=1) / tokens.float().flatten(1).norm(dim=1)
    return numbers.cpu(), scales.cpu(), [round(error, 6) for error in errors.tolist()]


def add_up(total: dict[str, float], facts: Mapping[str, float]) -> None:
    """Add facts about captions to those about others."""
    for name, value in facts.items():
        total[name] = total.get(name, 0) + value


def summarize(facts: Mapping[str, float]) -> dict[str, Any]:
    """Facts about the captions of a dataset, for its manifest: how many, how many were cut, and what 8 bits lost."""
    cut = {name.removeprefix(CUT): count for name, count in facts.items() if name.startswith(CUT)}
    lost = {T5_ERROR: (facts[T5_ERROR] / facts["captions"]) ** 0.5} if T5_ERROR in facts else {}
    return {"captions": facts.get("captions", 0), "cut": cut, **lost}


def describe(summary: Mapping[str, Any]) -> list[str]:
    """What is worth telling of a summary, in sentences."""
    said = [f"{n:,} of {summary['captions']:,} captions were cut to fit {role}" for role, n in summary["cut"].items()]
    if T5_ERROR in summary:
        said.append(f"t5 in 8 bits differs from what it gave by {summary[T5_ERROR]:.2%}, root mean square")
    return said
