"""What a dataset stores of an image and its caption, from the frozen networks: `Prepared` -> tensors by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmscale.config import EncodeConfig
from fmscale.data.prepare import Prepared
from fmscale.distributed import world_from_environment
from fmscale.encoders.text import TextEncoders, load_text_encoders
from fmscale.encoders.vae import FLIPPED, LATENTS, LOG_VARIANCE, Vae, load_vae
from fmscale.flow.noise import draw_noise

STORAGE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Encoder:
    """The frozen networks and how their output is stored."""

    def __init__(self, config: EncodeConfig) -> None:
        device = world_from_environment().device
        self.config = config
        self.storage = STORAGE[config.dtype]
        compute = config.vae_compute
        self.vae: Vae = load_vae(
            config.vae,
            device,
            STORAGE[compute.dtype],
            channels_last=compute.channels_last,
            compile=compute.compile,
            tile_px=compute.tile_px,
        )
        sources = config.text.model_dump(mode="json", exclude={"t5_length"})
        text_dtype = self.storage if device.type == "cuda" else torch.float32  # CPUs are slow in 16 bits
        self.text: TextEncoders = load_text_encoders(sources, config.text.t5_length, device, text_dtype)

    def encode(self, images: list[Prepared]) -> Iterator[tuple[Prepared, dict[str, Tensor]]]:
        """Images of one bucket, each with the tensors that are stored of it, finite or not."""
        tensors = self._latents(images) | self.text.encode([image.caption for image in images])
        stored = {name: value.to("cpu", self.storage) for name, value in tensors.items()}
        for row, image in enumerate(images):
            yield image, {name: value[row].contiguous() for name, value in stored.items()}

    def _latents(self, images: list[Prepared]) -> dict[str, Tensor]:
        """Latents of the images, and of the mirrored ones, by the names that `draws.draw_latents` reads."""
        pixels = torch.stack([image.pixels for image in images])
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
        """The features of the empty caption, as stored."""
        return {name: value[0].to("cpu", self.storage) for name, value in self.text.encode([""]).items()}

    def identity(self) -> dict[str, Any]:
        """What the dataset's manifest says about its making."""
        sources = self.config.text.model_dump(mode="json", exclude={"t5_length"})
        return {
            "program": "fmscale encode",
            "vae": {"path": str(self.config.vae.absolute()), **self.vae.identity()},
            "text": {role: {"source": absolute(sources[role]), **made} for role, made in self.text.identity().items()},
            "t5_length": self.config.text.t5_length,
            "dtype": self.config.dtype,
            "latents": self.config.latents,
            "flip": self.config.flip,
            "vae_compute": self.config.vae_compute.model_dump(mode="json"),
        }


def absolute(source: dict[str, str | None]) -> dict[str, str | None]:
    """A text encoder's source with paths that hold from any folder."""
    paths = ("path", "tokenizer", "checkpoint")
    return {key: str(Path(value).absolute()) if value and key in paths else value for key, value in source.items()}
