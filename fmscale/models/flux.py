"""FLUX.1: blocks of two streams, then blocks of one, with rotary positions.

Dimensions: B images, C latent channels, H x W latent pixels, N image tokens, L text tokens, D width of a token,
P pooled width.

Source: Black Forest Labs 2024, FLUX.1, whose networks diffusers' FluxTransformer2DModel holds. One stream with parallel
attention and MLP: Dehghani et al. 2023, arXiv:2302.05442, sec. 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmscale.errors import UserError
from fmscale.models.initial import Initialiser, initialise, normal, ones, xavier, zeros
from fmscale.models.layers import (
    MLP,
    NORM_EPS,
    Heads,
    JointBlock,
    Linear,
    Modulation,
    Rotation,
    attend,
    normalise,
    patch_grid,
    patchify,
    repetition_bias,
    rotary_angles,
    rotate,
    scaled_and_shifted,
    timestep_features,
    unpatchify,
)
from fmscale.models.shapes import TIMESTEP_FEATURES

# Parameter name -> how to fill it; AdaLN-zero, as in `mmdit`.
INITIALISERS: dict[str, Initialiser] = {
    r"(patch_embed|context_embed)\.weight": xavier,
    r"((timestep_mlp|guidance_mlp|pooled_mlp)\.(up|down)|leap_mlp\.up)\.weight": normal,
    r"leap_mlp\.down\.weight": zeros,
    r"blocks\.\d+\.(image|text)\.(qkv\.linear|out|mlp\.up|mlp\.down)\.weight": xavier,
    r"blocks\.\d+\.(enter|leave)\.weight": xavier,
    r"blocks\.\d+\.((image|text)\.qkv\.)?norm_[qk]\.weight": ones,
    r"(modulation|proj_out)\.(weight|bias)": zeros,
    r"(?!proj_out|modulation).*\.bias": zeros,
}


class SingleBlock(nn.Module):
    """All tokens as one stream, whose attention and MLP work side by side: one product in, one out.

    Args:
        width: of a token.
        heads: attention heads.

    Attributes:
        rows: of modulation that it takes.
    """

    rows = 3

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.enter = Linear(width, 7 * width)  # queries, keys, values, and four widths for the MLP
        self.norm_q = nn.RMSNorm(width // heads, eps=NORM_EPS)
        self.norm_k = nn.RMSNorm(width // heads, eps=NORM_EPS)
        self.leave = Linear(5 * width, width)

    def forward(self, tokens: Tensor, modulation: Tensor, bias: Tensor | None, rotation: Rotation) -> Tensor:
        """Update tokens (B, N + L, D) under modulation (B, 3, D); `bias` and `rotation` are of all of them."""
        steered, width = Modulation(*modulation.split(1, dim=1)), tokens.shape[-1]
        qkv, hidden = self.enter(steered.enter(normalise(tokens))).split((3 * width, 4 * width), dim=-1)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        attended = attend(*rotate(Heads(self.norm_q(query), self.norm_k(key), value), rotation), bias)
        branch = self.leave(torch.cat([attended, F.gelu(hidden, approximate="tanh")], dim=-1))
        return steered.leave(tokens, branch)


class Flux(nn.Module):
    """The velocity network of FLUX.1.

    Args:
        layers: blocks of two streams.
        single_layers: blocks of one stream, which follow.
        heads: attention heads; the width D is heads · head_dim.
        head_dim: channels of a head.
        latent_channels: C.
        patch_size: latent pixels on a side of a patch.
        context_dim: width of the text tokens that come in.
        pooled_dim: P.
        rope_dims: channels of a head that turn with each axis, even numbers that make head_dim: one axis that no image
            uses, rows, columns.
        guidance_embed: the network is told how far it is to lead away from other images (FLUX.1-dev).
        leap_embed: it is told how far it is to leap; freshly made, it does not heed that.

    Raises:
        UserError: widths that do not fit one another.
    """

    def __init__(
        self,
        *,
        layers: int,
        single_layers: int,
        heads: int,
        head_dim: int = 128,
        latent_channels: int = 16,
        patch_size: int = 2,
        context_dim: int = 4096,
        pooled_dim: int = 768,
        rope_dims: tuple[int, ...] = (16, 56, 56),
        guidance_embed: bool = False,
        leap_embed: bool = False,
    ):
        super().__init__()
        if len(rope_dims) != 3 or sum(rope_dims) != head_dim or any(size % 2 for size in rope_dims):
            raise UserError(f"model.rope_dims are {rope_dims}: give three even numbers that make head_dim {head_dim}")
        self.width, self.patch_size, self.rope_dims = heads * head_dim, patch_size, tuple(rope_dims)
        patch_values = latent_channels * patch_size**2
        self.patch_embed = Linear(patch_values, self.width)
        self.timestep_mlp = MLP(TIMESTEP_FEATURES, self.width, self.width, nn.SiLU())
        self.guidance_mlp = MLP(TIMESTEP_FEATURES, self.width, self.width, nn.SiLU()) if guidance_embed else None
        self.leap_mlp = MLP(TIMESTEP_FEATURES, self.width, self.width, nn.SiLU()) if leap_embed else None
        self.pooled_mlp = MLP(pooled_dim, self.width, self.width, nn.SiLU())
        self.context_embed = Linear(context_dim, self.width)
        joint = [JointBlock(self.width, heads, qk_norm=True) for _ in range(layers)]
        single = [SingleBlock(self.width, heads) for _ in range(single_layers)]
        self.blocks, self.layers = nn.ModuleList([*joint, *single]), layers
        # One product for what all layers take of the conditioning, and for the scale and shift before the output.
        self.rows = [*(block.rows for block in joint), *(block.rows for block in single), 2]
        self.modulation = Linear(self.width, sum(self.rows) * self.width)
        self.proj_out = Linear(self.width, patch_values)
        self.initialise()

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Write every parameter anew, after `to_empty` for instance; as the constructor does."""
        initialise(self, INITIALISERS, generator)

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        context: Tensor,
        pooled: Tensor,
        repeats: Tensor | None = None,
        guidance: Tensor | None = None,
        leap: Tensor | None = None,
    ) -> Tensor:
        """The velocity at noisy latents.

        Args:
            latents: shape (B, C, H, W), H and W multiples of patch_size.
            t: shape (B,), in [0, 1]: 0 is data, 1 is noise. Kept in float32; the rest is cast to the weights' dtype.
            context: text tokens, shape (B, L, context_dim).
            pooled: pooled text, shape (B, P).
            repeats: shape (L,) or (B, L): text token i stands for repeats[i] equal ones, and is not seen where that is
                0. None means one each.
            guidance: shape (B,), for a network that is told; None means 1, no guidance, for each.
            leap: shape (B,), in [0, 1], for a network that is told: how much of t to pass over. None means 0 for each.

        Returns:
            noise − data as the network sees it, shape (B, C, H, W), in the weights' dtype.

        Raises:
            UserError: latents that do not divide into patches.
        """
        dtype, (height, width) = self.proj_out.weight.dtype, latents.shape[-2:]
        rows, columns = patch_grid(height, width, self.patch_size)
        image = self.patch_embed(patchify(latents.to(dtype), self.patch_size))
        text = self.context_embed(context.to(dtype))
        conditioning = self._embed_conditioning(t, pooled.to(dtype), guidance, leap)
        *modulations, last = self.modulation(conditioning).unflatten(-1, (-1, self.width)).split(self.rows, dim=1)
        bias = None if repeats is None else repetition_bias(repeats, image.shape[1], dtype)
        rotation = rotary_angles(rows, columns, text.shape[1], self.rope_dims, latents.device)
        of_image = Rotation(*(table[: image.shape[1]] for table in rotation))
        for block, modulation in zip(self.blocks[: self.layers], modulations[: self.layers], strict=True):
            image, text = block(image, text, modulation, bias, of_image)
        tokens = torch.cat([image, text], dim=1)
        for block, modulation in zip(self.blocks[self.layers :], modulations[self.layers :], strict=True):
            tokens = block(tokens, modulation, bias, rotation)
        patches = self.proj_out(scaled_and_shifted(tokens[:, : rows * columns], last))
        return unpatchify(patches, height, width, self.patch_size, channel_first=True)

    def _embed_conditioning(self, t: Tensor, pooled: Tensor, guidance: Tensor | None, leap: Tensor | None) -> Tensor:
        embedding = self.timestep_mlp(timestep_features(t).to(pooled.dtype)) + self.pooled_mlp(pooled)
        if self.guidance_mlp is not None:
            told = torch.ones_like(t) if guidance is None else guidance
            embedding = embedding + self.guidance_mlp(timestep_features(told).to(pooled.dtype))
        if self.leap_mlp is not None:
            told = torch.zeros_like(t) if leap is None else leap
            embedding = embedding + self.leap_mlp(timestep_features(told).to(pooled.dtype))
        return F.silu(embedding)
