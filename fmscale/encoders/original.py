"""Frozen networks as the single files of Stability AI and Black Forest Labs hold them, beside a network or alone."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from fmscale.encoders.text import TextEncoder
from fmscale.encoders.vae import Vae
from fmscale.errors import UserError

# Pipeline -> what is before the names of a VAE.
VAE_PREFIXES = {"sd3": "first_stage_model.", "flux": "vae."}
TEXT_PREFIXES = {"clip_l": "text_encoders.clip_l.transformer.", "clip_g": "text_encoders.clip_g.transformer."}
TEXT_PREFIXES["t5"] = "text_encoders.t5xxl.transformer."

# Names in AutoencoderKL -> theirs, one after another; UP stands for a level that they count from the other end.
VAE_NAMES = (
    (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d+)\.resnets\.", r"up.UP\1.block."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.", r"up.UP\1.upsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)
UNKNOWN = re.compile(r"(down|up|mid)_block")  # what is left of a name that the table does not cover
TEXT_MODEL, PROJECTION = "text_model.", "text_projection.weight"


def original_vae(vae: Vae, pipeline: str) -> dict[str, Tensor]:
    """A VAE's weights under their names; attention is a convolution there.

    Args:
        vae: diffusers' AutoencoderKL.
        pipeline: row of `VAE_PREFIXES`.

    Raises:
        UserError: it has blocks that their VAEs do not.
    """
    levels = len(vae.model.config.block_out_channels)
    named = {}
    for name, value in vae.model.state_dict().items():
        theirs = name
        for ours, new in VAE_NAMES:
            theirs = re.sub(ours, new, theirs)
        if UNKNOWN.search(theirs):
            raise UserError(f"single files have no place for {name} of this VAE; export a pipeline, or leave it out")
        theirs = re.sub(r"UP(\d+)", lambda level: str(levels - 1 - int(level[1])), theirs)
        is_matrix = ".attn_1." in theirs and value.ndim == 2
        named[VAE_PREFIXES[pipeline] + theirs] = value[:, :, None, None] if is_matrix else value
    return named


def original_text(encoder: TextEncoder) -> dict[str, Tensor]:
    """A text encoder's weights under their names.

    Raises:
        UserError: SD3's clip_l projects what it pools, which nothing that reads these files does.
    """
    state: dict[str, Any] = encoder.model.state_dict()
    if encoder.role == "t5":
        named = state
    else:
        named = {n if n.startswith((TEXT_MODEL, PROJECTION)) else TEXT_MODEL + n: value for n, value in state.items()}
    if encoder.role == "clip_l" and PROJECTION in named:
        projection = named.pop(PROJECTION)
        width = encoder.model.config.hidden_size
        if projection.shape != (width, width) or not torch.equal(projection, torch.eye(width).to(projection)):
            raise UserError(
                "clip_l projects what it pools, and single files of SD3 are read as if it did not; leave `text` out of "
                "--with, or export a pipeline"
            )
    return {TEXT_PREFIXES[encoder.role] + name: value for name, value in named.items()}
