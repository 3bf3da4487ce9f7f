"""What a dataset stores of an image and its caption, from the frozen networks: `Prepared` -> tensors by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmscale.config import EncodeConfig
from fmscale.distributed import world_from_environment
from fmscale.encoders.text import TextEncoders, load_text_encoders
from fmscale.encoders.vae import Vae, load_vae
from fmscale.flow.noise import keyed_generator

STORAGE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Prepared:
    """An image that fits its bucket, on its way to the encoders.

    Attributes:
        key: unique in the dataset.
        pixels: shape (3, H, W), in [-1, 1].
        caption: as given.
        meta: what the sample's json will say.
        source_meta: what the source's json said.
    """

    key: str
    pixels: Tensor
    caption: str
    meta: dict[str, Any]
    source_meta: dict[str, Any]


class Encoder:
    """The frozen networks and how their output is stored."""

    def __init__(self, config: EncodeConfig) -> None:
        device = world_from_environment().device
        self.config = config
        self.storage = STORAGE[config.dtype]
        self.vae: Vae = load_vae(config.vae, device)
        sources = config.text.model_dump(mode="json", exclude={"t5_length"})
        text_dtype = self.storage if device.type == "cuda" else torch.float32  # CPUs are slow in 16 bits
        self.text: TextEncoders = load_text_encoders(sources, config.text.t5_length, device, text_dtype)

    def encode(self, images: list[Prepared]) -> Iterator[tuple[Prepared, dict[str, Tensor]]]:
        """Images of one bucket, each with the tensors that are stored of it, finite or not."""
        generator = keyed_generator("posterior", self.config.seed, images[0].key)
        latents = self.vae.encode(torch.stack([image.pixels for image in images]), generator, self.config.latents)
        tensors = {"latents": latents, **self.text.encode([image.caption for image in images])}
        stored = {name: value.to("cpu", self.storage) for name, value in tensors.items()}
        for row, image in enumerate(images):
            yield image, {name: value[row].contiguous() for name, value in stored.items()}

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
        }


def absolute(source: dict[str, str | None]) -> dict[str, str | None]:
    """A text encoder's source with paths that hold from any folder."""
    paths = ("path", "tokenizer", "checkpoint")
    return {key: str(Path(value).absolute()) if value and key in paths else value for key, value in source.items()}
