"""FLUX as others name it: diffusers' FluxTransformer2DModel, and the single files of Black Forest Labs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fmscale.models.flux import Flux
from fmscale.models.published import Place, adopt, arguments_of, check_config, publish

PATCH_SIZE = 2

# Our module -> theirs.
DIFFUSERS = {
    "patch_embed": "x_embedder",
    "context_embed": "context_embedder",
    "timestep_mlp.up": "time_text_embed.timestep_embedder.linear_1",
    "timestep_mlp.down": "time_text_embed.timestep_embedder.linear_2",
    "guidance_mlp.up": "time_text_embed.guidance_embedder.linear_1",
    "guidance_mlp.down": "time_text_embed.guidance_embedder.linear_2",
    "pooled_mlp.up": "time_text_embed.text_embedder.linear_1",
    "pooled_mlp.down": "time_text_embed.text_embedder.linear_2",
    "proj_out": "proj_out",
}
DIFFUSERS_JOINT = {
    "image.qkv.linear": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "image.qkv.norm_q": ("attn.norm_q",),
    "image.qkv.norm_k": ("attn.norm_k",),
    "image.out": ("attn.to_out.0",),
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
    "patch_embed": "img_in",
    "context_embed": "txt_in",
    "timestep_mlp.up": "time_in.in_layer",
    "timestep_mlp.down": "time_in.out_layer",
    "guidance_mlp.up": "guidance_in.in_layer",
    "guidance_mlp.down": "guidance_in.out_layer",
    "pooled_mlp.up": "vector_in.in_layer",
    "pooled_mlp.down": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
}
ORIGINAL_STREAM = {
    "qkv.linear": "attn.qkv",
    "qkv.norm_q": "attn.norm.query_norm",
    "qkv.norm_k": "attn.norm.key_norm",
    "out": "attn.proj",
    "mlp.up": "mlp.0",
    "mlp.down": "mlp.2",
}

# Their constructor argument -> ours, where the value is the same.
CONFIG_KEYS = {
    "num_layers": "layers",
    "num_single_layers": "single_layers",
    "attention_head_dim": "head_dim",
    "num_attention_heads": "heads",
    "joint_attention_dim": "context_dim",
    "pooled_projection_dim": "pooled_dim",
    "guidance_embeds": "guidance_embed",
}
# What diffusers takes where a config.json is older than the key, as those of FLUX.1 are.
LATER_KEYS: dict[str, Any] = {"axes_dims_rope": (16, 56, 56), "out_channels": None}


def diffusers_form(model: Flux) -> dict[str, list[Place]]:
    """As FluxTransformer2DModel names them; a `published.Form`."""
    table = {ours: [Place(theirs)] for ours, theirs in DIFFUSERS.items()}
    modulation = []
    for number in range(model.layers):
        block = f"transformer_blocks.{number}"
        for ours, theirs in DIFFUSERS_JOINT.items():
            table[f"blocks.{number}.{ours}"] = [Place(f"{block}.{name}") for name in theirs]
        modulation += [Place(f"{block}.norm1.linear", 6), Place(f"{block}.norm1_context.linear", 6)]
    for number in range(model.layers, len(model.blocks)):
        ours, block = f"blocks.{number}", f"single_transformer_blocks.{number - model.layers}"
        table[f"{ours}.enter"] = [Place(f"{block}.attn.to_{part}") for part in "qkv"] + [Place(f"{block}.proj_mlp", 4)]
        table |= {f"{ours}.norm_{part}": [Place(f"{block}.attn.norm_{part}")] for part in "qk"}
        table[f"{ours}.leave"] = [Place(f"{block}.proj_out")]
        modulation += [Place(f"{block}.norm.linear", 3)]
    return table | {"modulation": [*modulation, Place("norm_out.linear", 2)]}


def original_form(model: Flux) -> dict[str, list[Place]]:
    """As the single files of Black Forest Labs name them, whose last shift is before the scale; a `published.Form`."""
    table = {ours: [Place(theirs)] for ours, theirs in ORIGINAL.items()}
    modulation = []
    for number in range(model.layers):
        block = f"double_blocks.{number}"
        for stream, short in (("image", "img"), ("text", "txt")):
            for ours, theirs in ORIGINAL_STREAM.items():
                table[f"blocks.{number}.{stream}.{ours}"] = [_original(f"{block}.{short}_{theirs}")]
            modulation.append(Place(f"{block}.{short}_mod.lin", 6))
    for number in range(model.layers, len(model.blocks)):
        ours, block = f"blocks.{number}", f"single_blocks.{number - model.layers}"
        table |= {f"{ours}.enter": [Place(f"{block}.linear1")], f"{ours}.leave": [Place(f"{block}.linear2")]}
        table[f"{ours}.norm_q"] = [_original(f"{block}.norm.query_norm")]
        table[f"{ours}.norm_k"] = [_original(f"{block}.norm.key_norm")]
        modulation += [Place(f"{block}.modulation.lin", 3)]
    return table | {"modulation": [*modulation, Place("final_layer.adaLN_modulation.1", 2, swapped=True)]}


def _original(module: str) -> Place:
    return Place(module, weight="scale" if module.endswith("_norm") else "weight")


def to_diffusers(state: Mapping[str, Tensor], model: Flux) -> dict[str, Tensor]:
    """A Flux's weights as FluxTransformer2DModel names them; as `published.publish`."""
    return publish(state, model, diffusers_form)


def from_diffusers(state: Mapping[str, Tensor], model: Flux) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`; as `published.adopt`."""
    return adopt(state, model, diffusers_form)


def diffusers_config(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of FluxTransformer2DModel, as its config.json holds them.

    Args:
        model_kwargs: arguments of `Flux`.
    """
    arguments = arguments_of(Flux, model_kwargs)
    return {theirs: arguments[ours] for theirs, ours in CONFIG_KEYS.items()} | {
        "patch_size": 1,  # patches are made before the network
        "in_channels": arguments["latent_channels"] * arguments["patch_size"] ** 2,
        "out_channels": None,
        "axes_dims_rope": list(arguments["rope_dims"]),
    }


def model_kwargs_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Flux` for a FluxTransformer2DModel, whose patches pipelines make of 2 x 2 pixels.

    Args:
        config: what its config.json holds.

    Raises:
        UserError: a value that no Flux has.
    """
    config = LATER_KEYS | dict(config)
    kwargs = {ours: config[theirs] for theirs, ours in CONFIG_KEYS.items()} | {
        "patch_size": PATCH_SIZE,
        "latent_channels": config["in_channels"] // PATCH_SIZE**2,
        "rope_dims": tuple(config["axes_dims_rope"]),
    }
    check_config(config, diffusers_config(kwargs), "Flux")
    return kwargs
