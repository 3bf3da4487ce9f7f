"""Networks against diffusers' own: the same random weights and inputs in both, and how far apart they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from fmscale.models import flux_names, mmdit_names
from fmscale.models.families import FORMS, build
from fmscale.models.published import publish


class Pair(NamedTuple):
    """One network twice.

    Attributes:
        family: of the network.
        ours, theirs: with the same weights.
    """

    family: str
    ours: nn.Module
    theirs: nn.Module


def make_pair(family: str, values: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Pair:
    """A network in which every parameter is random and none is zero, since zeros would hide errors."""
    ours = build(family, values)
    for name, parameter in ours.named_parameters():
        offset = 1.0 if "norm_" in name else 0.0
        nn.init.normal_(parameter, mean=offset, std=parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.1)
    ours.to(dtype)
    if family == "mmdit":
        theirs: nn.Module = SD3Transformer2DModel(**mmdit_names.diffusers_config(values, sample_size=16))
        state = mmdit_names.to_diffusers(ours.state_dict(), ours)  # type: ignore[arg-type]
    else:
        theirs = FluxTransformer2DModel(**flux_names.diffusers_config(values))
        state = flux_names.to_diffusers(ours.state_dict(), ours)  # type: ignore[arg-type]
    theirs.to(dtype).load_state_dict(state)
    return Pair(family, ours, theirs)


def draw_inputs(
    values: Mapping[str, Any], size: tuple[int, int], text_tokens: int, batch: int = 2
) -> dict[str, Tensor]:
    """Noisy latents, text and pooled text that want gradients."""
    shapes = {
        "latents": (batch, values["latent_channels"], *size),
        "context": (batch, text_tokens, values["context_dim"]),
        "pooled": (batch, values["pooled_dim"]),
    }
    return {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}


def copies(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The same values again, with gradients of their own."""
    return {
        name: tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_() for name, tensor in tensors.items()
    }


def run_ours(pair: Pair, inputs: Mapping[str, Tensor], t: Tensor, guidance: Tensor | None = None) -> Tensor:
    """Our velocity."""
    told = {} if guidance is None else {"guidance": guidance}
    velocity: Tensor = pair.ours(inputs["latents"], t, inputs["context"], inputs["pooled"], **told)
    return velocity


def run_theirs(pair: Pair, inputs: Mapping[str, Tensor], t: Tensor, guidance: Tensor | None = None) -> Tensor:
    """Their velocity; for FLUX with the packing and the positions of its pipeline."""
    latents, context, pooled = (inputs[name] for name in ("latents", "context", "pooled"))
    if pair.family == "mmdit":
        velocity: Tensor = pair.theirs(latents, context, pooled, 1000 * t)[0]
        return velocity
    batch, channels, height, width = latents.shape
    tokens = pair.theirs(
        hidden_states=FluxPipeline._pack_latents(latents, batch, channels, height, width),
        encoder_hidden_states=context,
        pooled_projections=pooled,
        timestep=t,
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, latents.device, torch.float32),
        txt_ids=torch.zeros(context.shape[1], 3, device=latents.device),
        guidance=guidance,
    )[0]
    unpacked: Tensor = FluxPipeline._unpack_latents(tokens, 8 * height, 8 * width, 8)
    return unpacked


def gradients(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each has gathered."""
    found = {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
    assert found.keys() == tensors.keys()
    return found


def their_gradients(pair: Pair) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of our weights under their names, and of theirs."""
    ours = publish(gradients(dict(pair.ours.named_parameters())), pair.ours, FORMS[pair.family]["diffusers"])
    return ours, gradients(dict(pair.theirs.named_parameters()))


def distance(ours: Tensor, theirs: Tensor) -> float:
    """How far apart, relative to the norm of theirs."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
