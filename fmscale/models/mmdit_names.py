"""MMDiT as others name it: diffusers' SD3Transformer2DModel, and the single files of Stability AI."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor

from fmscale.errors import UserError
from fmscale.models.layers import JointBlock, angles, position_features, position_rows
from fmscale.models.mmdit import MMDiT
from fmscale.models.published import (
    Part,
    Place,
    adopt,
    arguments_of,
    check_config,
    check_state,
    layout,
    publish,
)

DIFFUSERS_POSITIONS, ORIGINAL_POSITIONS = "pos_embed.pos_embed", "pos_embed"
POSITIONS = {"diffusers": DIFFUSERS_POSITIONS, "original": ORIGINAL_POSITIONS}
HALF_PRECISION = 1e-2  # what bfloat16 may have made of a sine
FINEST = 1024  # positions are guessed to such parts of a patch

# Our module -> theirs.
DIFFUSERS = {
    "timestep_mlp.up": "time_text_embed.timestep_embedder.linear_1",
    "timestep_mlp.down": "time_text_embed.timestep_embedder.linear_2",
    "pooled_mlp.up": "time_text_embed.text_embedder.linear_1",
    "pooled_mlp.down": "time_text_embed.text_embedder.linear_2",
    "context_embed": "context_embedder",
    "proj_out": "proj_out",
}
DIFFUSERS_BLOCK = {
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
    "text.qkv.linear": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "text.qkv.norm_q": ("attn.norm_added_q",),
    "text.qkv.norm_k": ("attn.norm_added_k",),
    "text.out": ("attn.to_add_out",),
    "text.mlp.up": ("ff_context.net.0.proj",),
    "text.mlp.down": ("ff_context.net.2",),
}
ORIGINAL = {
    "timestep_mlp.up": "t_embedder.mlp.0",
    "timestep_mlp.down": "t_embedder.mlp.2",
    "pooled_mlp.up": "y_embedder.mlp.0",
    "pooled_mlp.down": "y_embedder.mlp.2",
    "context_embed": "context_embedder",
    "proj_out": "final_layer.linear",
}
ORIGINAL_STREAM = {
    "qkv.linear": "attn.qkv",
    "qkv.norm_q": "attn.ln_q",
    "qkv.norm_k": "attn.ln_k",
    "out": "attn.proj",
    "dual.qkv.linear": "attn2.qkv",
    "dual.qkv.norm_q": "attn2.ln_q",
    "dual.qkv.norm_k": "attn2.ln_k",
    "dual.out": "attn2.proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
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
# What diffusers takes where a config.json is older than the key, as that of Stable Diffusion 3 medium is.
LATER_KEYS: dict[str, Any] = {"qk_norm": None, "dual_attention_layers": ()}


def diffusers_form(model: MMDiT) -> dict[str, list[Place]]:
    """As SD3Transformer2DModel names them; a `published.Form`."""
    table = {ours: [Place(theirs)] for ours, theirs in DIFFUSERS.items()}
    table["patch_embed"] = [Place("pos_embed.proj", patch=model.patch_size)]
    modulation = []
    for number, block in enumerate(cast(Iterable[JointBlock], model.blocks)):
        name = f"transformer_blocks.{number}"
        for ours, theirs in DIFFUSERS_BLOCK.items():
            table[f"blocks.{number}.{ours}"] = [Place(f"{name}.{each}") for each in theirs]
        modulation.append(Place(f"{name}.norm1.linear", block.image.rows))
        modulation.append(Place(f"{name}.norm1_context.linear", block.text.rows))
    return table | {"modulation": [*modulation, Place("norm_out.linear", 2)]}


def original_form(model: MMDiT) -> dict[str, list[Place]]:
    """As the single files of Stability AI name them, whose last shifts are before the scales; a `published.Form`."""
    table = {ours: [Place(theirs)] for ours, theirs in ORIGINAL.items()}
    table["patch_embed"] = [Place("x_embedder.proj", patch=model.patch_size)]
    modulation = []
    for number, block in enumerate(cast(Iterable[JointBlock], model.blocks)):
        for stream, theirs in (("image", "x_block"), ("text", "context_block")):
            name = f"joint_blocks.{number}.{theirs}"
            for ours, each in ORIGINAL_STREAM.items():
                table[f"blocks.{number}.{stream}.{ours}"] = [Place(f"{name}.{each}")]
            rows = getattr(block, stream).rows
            modulation.append(Place(f"{name}.adaLN_modulation.1", rows, swapped=rows == 2))
    return table | {"modulation": [*modulation, Place("final_layer.adaLN_modulation.1", 2, swapped=True)]}


def position_part(model: MMDiT, form: str = "diffusers") -> Part:
    """The position grid, which we do not store, in a file of one of the `POSITIONS`."""
    return Part(POSITIONS[form], tuple(position_grid(model, "meta").shape), swapped=False)


def to_diffusers(state: Mapping[str, Tensor], model: MMDiT) -> dict[str, Tensor]:
    """An MMDiT's weights as SD3Transformer2DModel names them; as `published.publish`.

    The position grid that the model was trained with is among them, in float32: diffusers would build another one.
    """
    return {DIFFUSERS_POSITIONS: position_grid(model)} | publish(state, model, diffusers_form)


def from_diffusers(state: Mapping[str, Tensor], model: MMDiT) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`; as `published.adopt`.

    Raises:
        UserError: also, the weights were trained with other positions.
    """
    parts = [position_part(model), *(part for held in layout(model, diffusers_form).values() for part in held)]
    check_state(state, {part.name: part.shape for part in parts})
    check_positions(state[DIFFUSERS_POSITIONS], model)
    rest = {name: value for name, value in state.items() if name != DIFFUSERS_POSITIONS}
    return adopt(rest, model, diffusers_form)


def position_parts(model: MMDiT) -> Iterator[tuple[int, Tensor]]:
    """The position grid that an MMDiT was trained with: stretches of it, float32, and where each begins."""
    size, width = model.pos_embed_max_size, model.width
    origin, step = model.position_origin, model.position_step
    for number, row in enumerate(position_rows(channels=width, max_size=size, origin=origin, step=step)):
        yield number * size * width, row.flatten()


def check_positions(given: Tensor, model: MMDiT) -> None:
    """Refuse weights that were trained with other positions.

    Args:
        given: their grid, of any dtype.
        model: of ours.

    Raises:
        UserError: it is another grid than the model's; says what to set.
    """
    grid = given.unflatten(1, (model.pos_embed_max_size, -1))[0]
    check_axes(grid[0], grid[:, 0], model)


def check_axes(row: Tensor, column: Tensor, model: MMDiT) -> None:
    """As `check_positions`, of the first row and the first column of the grid, which say all of it.

    Args:
        row, column: shape (pos_embed_max_size, D), any dtype.
        model: of ours.

    Raises:
        UserError: as `check_positions`.
    """
    half = model.width // 2
    by_column, by_row = row[:, :half].double(), column[:, half:].double()
    patches = torch.arange(model.pos_embed_max_size, dtype=torch.float64)
    phases = angles((patches - model.position_origin) * model.position_step, half // 2)
    ours = torch.cat([phases.sin(), phases.cos()], dim=-1)
    if all(torch.allclose(theirs, ours, rtol=0, atol=HALF_PRECISION) for theirs in (by_column, by_row)):
        return
    origin, step = positions_of(by_column)
    phases = angles((patches - origin) * step, half // 2)
    learned = torch.cat([phases.sin(), phases.cos()], dim=-1)
    if all(torch.allclose(theirs, learned, rtol=0, atol=HALF_PRECISION) for theirs in (by_column, by_row)):
        said = f"set model.position_origin to {origin:g} and model.position_step to {step:.9g}"
    else:
        said = "and they are not evenly spaced sines, which alone an MMDiT here computes"
    raise UserError(f"these weights learned other positions than those of model.base_size: {said}")


def positions_of(features: Tensor) -> tuple[float, float]:
    """What `position_features` made the features of an axis from.

    The slowest sine says roughly where each patch is, and each faster one says it more exactly, up to a whole turn that
    is known by then.

    Args:
        features: shape (P, 2·K), float64: K sines and K cosines, the fastest first.

    Returns:
        Origin and step, the best fit, to the nearest 1/1024 and the nearest fraction with a denominator up to 1024.
    """
    sines, cosines = features.chunk(2, dim=-1)
    phases, count = torch.atan2(sines, cosines), sines.shape[-1]
    frequencies = angles(torch.ones(1, dtype=torch.float64), count)[0]
    found = phases[:, -1] / frequencies[-1]
    for k in reversed(range(count)):
        turned = phases[:, k] - found * frequencies[k]
        found = found + torch.atan2(turned.sin(), turned.cos()) / frequencies[k]
    patches = torch.arange(len(found), dtype=torch.float64)
    away = patches - patches.mean()
    step = float((away * found).sum() / (away**2).sum())
    step = float(Fraction(step).limit_denominator(FINEST)) or step
    origin = float(patches.mean()) - float(found.mean()) / step
    return round(origin * FINEST) / FINEST, step


def position_grid(model: MMDiT, device: str = "cpu") -> Tensor:
    """The position grid that diffusers stores, float32, shape (1, max_size², D)."""
    size, origin, step = model.pos_embed_max_size, model.position_origin, model.position_step
    grid = position_features(size, size, channels=model.width, max_size=size, origin=origin, step=step, device=device)
    return grid.unsqueeze(0)


def diffusers_config(model_kwargs: Mapping[str, Any], sample_size: int) -> dict[str, Any]:
    """The arguments of SD3Transformer2DModel, as its config.json holds them.

    Args:
        model_kwargs: arguments of `MMDiT`.
        sample_size: latent pixels on a side that a pipeline draws when it is not told a size.
    """
    arguments = arguments_of(MMDiT, model_kwargs)
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
    config = LATER_KEYS | dict(config)
    kwargs = {ours: config[theirs] for theirs, ours in CONFIG_KEYS.items()} | {
        "base_size": base_size,
        "qk_norm": config["qk_norm"] is not None,
        "dual_attention_layers": tuple(config["dual_attention_layers"]),
    }
    check_config(config, diffusers_config(kwargs, config["sample_size"]), "MMDiT")
    return kwargs
