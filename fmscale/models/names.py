"""Weights of an MMDiT under the names of diffusers' SD3Transformer2DModel, and back, bit for bit."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fmscale.errors import UserError
from fmscale.models.layers import position_features, position_rows
from fmscale.models.mmdit import MMDiT

POSITIONS = "pos_embed.pos_embed"
HALF_PRECISION = 1e-2  # what bfloat16 may have made of a sine

# Our module -> theirs. Several of theirs are the rows of ours, one below the other.
MODULES = {
    "patch_embed": ("pos_embed.proj",),
    "timestep_mlp.up": ("time_text_embed.timestep_embedder.linear_1",),
    "timestep_mlp.down": ("time_text_embed.timestep_embedder.linear_2",),
    "pooled_mlp.up": ("time_text_embed.text_embedder.linear_1",),
    "pooled_mlp.down": ("time_text_embed.text_embedder.linear_2",),
    "context_embed": ("context_embedder",),
    "norm_out.modulation": ("norm_out.linear",),
    "proj_out": ("proj_out",),
}
BLOCK_MODULES = {
    "image.modulation": ("norm1.linear",),
    "image.qkv.linear": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "image.qkv.norm_q": ("attn.norm_q",),
    "image.qkv.norm_k": ("attn.norm_k",),
    "image.out": ("attn.to_out.0",),
    "image.dual.qkv.linear": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "image.dual.qkv.norm_q": ("attn2.norm_q",),
    "image.dual.qkv.norm_k": ("attn2.norm_k",),
    "image.dual.out": ("attn2.to_out.0",),
    "image.mlp.up": ("ff.net.0.proj",),
    "image.mlp.down": ("ff.net.2",),
    "text.modulation": ("norm1_context.linear",),
    "text.norm.modulation": ("norm1_context.linear",),  # of the last block, (scale, shift) in both
    "text.qkv.linear": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "text.qkv.norm_q": ("attn.norm_added_q",),
    "text.qkv.norm_k": ("attn.norm_added_k",),
    "text.out": ("attn.to_add_out",),
    "text.mlp.up": ("ff_context.net.0.proj",),
    "text.mlp.down": ("ff_context.net.2",),
}


# Their constructor argument -> ours, where the value is the same.
CONFIG_KEYS = {
    "patch_size": "patch_size",
    "in_channels": "latent_channels",
    "num_layers": "layers",
    "attention_head_dim": "head_dim",
    "num_attention_heads": "heads",
    "joint_attention_dim": "context_dim",
    "pooled_projection_dim": "pooled_dim",
    "pos_embed_max_size": "pos_embed_max_size",
}


def diffusers_names(name: str) -> tuple[str, ...]:
    """The names that diffusers gives to one of our parameters: several where ours holds theirs one below the other."""
    module, leaf = name.rsplit(".", 1)
    if not module.startswith("blocks."):
        return tuple(f"{theirs}.{leaf}" for theirs in MODULES[module])
    _, layer, inner = module.split(".", 2)
    return tuple(f"transformer_blocks.{layer}.{theirs}.{leaf}" for theirs in BLOCK_MODULES[inner])


def diffusers_layout(model_kwargs: Mapping[str, Any]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Where an MMDiT's weights are in SD3Transformer2DModel.

    Args:
        model_kwargs: arguments of `MMDiT`.

    Returns:
        For each of our parameters diffusers' names and shapes, one below the other; and for the position grid, which we
        do not store, `POSITIONS`.
    """
    model = _blueprint(model_kwargs)
    renamed = {POSITIONS: {POSITIONS: _position_grid(model, "meta")}}
    renamed |= {ours: _rename({ours: like}, model) for ours, like in model.state_dict().items()}
    return {ours: {name: tuple(like.shape) for name, like in theirs.items()} for ours, theirs in renamed.items()}


def position_parts(model_kwargs: Mapping[str, Any]) -> Iterator[tuple[int, Tensor]]:
    """The position grid that an MMDiT was trained with: stretches of it, float32, and where each begins."""
    model = _blueprint(model_kwargs)
    size, width = model.pos_embed_max_size, model.width
    for number, row in enumerate(position_rows(channels=width, max_size=size, base_size=model.base_size)):
        yield number * size * width, row.flatten()


def to_diffusers(state: Mapping[str, Tensor], model_kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name an MMDiT's weights as SD3Transformer2DModel does.

    Args:
        state: weights by our names, any dtype.
        model_kwargs: arguments of `MMDiT`.

    Returns:
        Views of the weights by diffusers' names, and the position grid that the model was trained with, in float32:
        diffusers would build another one of its own.

    Raises:
        UserError: a weight is missing, unexpected or of another shape.
    """
    model = _blueprint(model_kwargs)
    _check_state(state, model.state_dict())
    return {POSITIONS: _position_grid(model, "cpu")} | _rename(state, model)


def from_diffusers(state: Mapping[str, Tensor], model_kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name an SD3Transformer2DModel's weights as an MMDiT does: the inverse of `to_diffusers`.

    Args:
        state: weights by diffusers' names, any dtype.
        model_kwargs: arguments of `MMDiT`.

    Returns:
        Copies of the weights by our names.

    Raises:
        UserError: a weight is missing, unexpected or of another shape, or the model was trained with other positions.
    """
    model = _blueprint(model_kwargs)
    ours = model.state_dict()
    _check_state(state, {POSITIONS: _position_grid(model, "meta")} | _rename(ours, model))
    if not torch.allclose(state[POSITIONS].float(), _position_grid(model, "cpu"), rtol=0, atol=HALF_PRECISION):
        raise UserError(
            f"{POSITIONS} is not the grid of model.base_size {model.base_size}: these weights learned other positions, "
            "so set the base_size that they were trained with, or train from random weights"
        )
    return {
        name: torch.cat([state[theirs] for theirs in diffusers_names(name)]).reshape(like.shape)
        for name, like in ours.items()
    }


def diffusers_config(model_kwargs: Mapping[str, Any], sample_size: int) -> dict[str, Any]:
    """The arguments of SD3Transformer2DModel, as its config.json holds them.

    Args:
        model_kwargs: arguments of `MMDiT`.
        sample_size: latent pixels on a side that a pipeline draws when it is not told a size.
    """
    arguments = _with_defaults(model_kwargs)
    return {theirs: arguments[ours] for theirs, ours in CONFIG_KEYS.items()} | {
        "sample_size": sample_size,
        "out_channels": arguments["latent_channels"],
        "caption_projection_dim": arguments["heads"] * arguments["head_dim"],
        "dual_attention_layers": list(arguments["dual_attention_layers"]),
        "qk_norm": "rms_norm" if arguments["qk_norm"] else None,
    }


def model_kwargs_from_diffusers(config: Mapping[str, Any], base_size: int = 16) -> dict[str, Any]:
    """The arguments of `MMDiT` for an SD3Transformer2DModel.

    Args:
        config: what its config.json holds.
        base_size: patches on a side at the base resolution, which diffusers does not store.

    Raises:
        UserError: a value that no MMDiT has.
    """
    kwargs = {ours: config[theirs] for theirs, ours in CONFIG_KEYS.items()} | {
        "base_size": base_size,
        "qk_norm": config["qk_norm"] is not None,
        "dual_attention_layers": tuple(config["dual_attention_layers"]),
    }
    given, ours = dict(config), diffusers_config(kwargs, config["sample_size"])
    differing = [f"{key} {given[key]} instead of {value}" for key, value in ours.items() if given[key] != value]
    if differing:
        raise UserError(f"the transformer's config.json has {', '.join(differing)}: fmscale has no such MMDiT")
    return kwargs


def _with_defaults(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(MMDiT).bind(**model_kwargs)
    bound.apply_defaults()
    return bound.arguments


def _blueprint(model_kwargs: Mapping[str, Any]) -> MMDiT:
    with torch.device("meta"):
        return MMDiT(**model_kwargs)


def _position_grid(model: MMDiT, device: str) -> Tensor:
    size = model.pos_embed_max_size
    grid = position_features(size, size, channels=model.width, max_size=size, base_size=model.base_size, device=device)
    return grid.unsqueeze(0)


def _rename(state: Mapping[str, Tensor], model: MMDiT) -> dict[str, Tensor]:
    patch = (-1, model.patch_size, model.patch_size)
    renamed: dict[str, Tensor] = {}
    for ours, tensor in state.items():
        rows = tensor.unflatten(1, patch) if ours == "patch_embed.weight" else tensor  # theirs is a convolution
        names = diffusers_names(ours)
        renamed.update(zip(names, rows.chunk(len(names)), strict=True))
    return renamed


def _check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    faults = {
        "missing": expected.keys() - state.keys(),
        "unexpected": state.keys() - expected.keys(),
        "of another shape": {k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape},
    }
    found = [f"{what}: {', '.join(sorted(names)[:4])} ({len(names)} in all)" for what, names in faults.items() if names]
    if found:
        raise UserError(
            f"weights do not fit the model: {'; '.join(found)}; compare the model section of the two configs"
        )
