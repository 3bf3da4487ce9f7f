"""The pipelines of diffusers that an export is for: one row for each family of networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fmscale.config import FluxConfig, ModelConfig, TrainConfig
from fmscale.encoders.text import Pipeline as Text
from fmscale.flow.timesteps import FLUX_SHIFT
from fmscale.init_from import CLASSES
from fmscale.models import flux_names, mmdit_names
from fmscale.objective import shift_for

WHOLE = frozenset({"vae", "text"})
FLUX_WIDTH = 3072  # of the only FLUX that diffusers reads from a single file


class Pipeline(NamedTuple):
    """A pipeline of diffusers.

    Attributes:
        name: of its class.
        network: class of its transformer.
        text: how its text is encoded.
        folders: for each text encoder, the folders of model and tokenizer.
        needs: text encoders that it cannot do without.
    """

    name: str
    network: str
    text: Text
    folders: Mapping[str, tuple[str, str]]
    needs: tuple[str, ...]


PIPELINES = {
    "mmdit": Pipeline(
        "StableDiffusion3Pipeline",
        CLASSES["mmdit"],
        "sd3",
        {
            "clip_l": ("text_encoder", "tokenizer"),
            "clip_g": ("text_encoder_2", "tokenizer_2"),
            "t5": ("text_encoder_3", "tokenizer_3"),
        },
        ("clip_l", "clip_g"),
    ),
    "flux": Pipeline(
        "FluxPipeline",
        CLASSES["flux"],
        "flux",
        {"clip_l": ("text_encoder", "tokenizer"), "t5": ("text_encoder_2", "tokenizer_2")},
        ("clip_l", "t5"),
    ),
}


@dataclass(frozen=True)
class Written:
    """What an export writes.

    Attributes:
        folder: where, for the time being.
        form: pipeline, transformer or single.
        parts: frozen networks in it, `vae` and `text`.
        dtype: of the network's weights.
        file: the single file.
    """

    folder: Path
    form: str
    parts: frozenset[str]
    dtype: torch.dtype
    file: Path

    @property
    def draws(self) -> bool:
        """All that it takes to draw is there."""
        return self.parts == WHOLE


def reads_single_files(model: ModelConfig) -> bool:
    """Whether diffusers can read a single file of such a network."""
    return model.family != "flux" or model.heads * model.head_dim == FLUX_WIDTH


def stock_classes(family: str) -> tuple[Any, Any]:
    """Classes of pipeline and network."""
    from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline

    if family == "flux":
        return FluxPipeline, FluxTransformer2DModel
    return StableDiffusion3Pipeline, SD3Transformer2DModel


def network_config(model: ModelConfig) -> dict[str, Any]:
    """The arguments of the network's class, for a network of ours."""
    if isinstance(model, FluxConfig):
        return flux_names.diffusers_config(model.model_dump())
    return mmdit_names.diffusers_config(model.model_dump(), model.base_size * model.patch_size)


def scheduler_config(config: TrainConfig) -> dict[str, Any]:
    """What a stock FlowMatchEulerDiscreteScheduler is to know: the shift as a number, or how FLUX's follows from size.

    Of `sqrt` it knows the shift of the base resolution alone.
    """
    flow, side = config.flow, config.model.base_size * config.model.patch_size
    if flow.shift != "flux":
        return {"shift": shift_for(flow, config.model, side, side)}
    (low, base_shift), (high, max_shift) = FLUX_SHIFT
    lengths = {"base_image_seq_len": low, "max_image_seq_len": high}
    return {"use_dynamic_shifting": True, "base_shift": base_shift, "max_shift": max_shift, **lengths}
