"""MMDiT: text and image as two streams of tokens that meet in every attention (Stable Diffusion 3 and 3.5).

Dimensions: B images, C latent channels, H x W latent pixels, N image tokens, L text tokens, D width of a token,
P pooled width.

Source: Esser et al. 2024, arXiv:2403.03206, fig. 2. Second image attention: Stable Diffusion 3.5 medium (MMDiT-X).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmscale.errors import UserError
from fmscale.models.initial import Initialiser, initialise, normal, ones, xavier, zeros
from fmscale.models.layers import (
    MLP,
    JointBlock,
    Linear,
    patch_grid,
    patchify,
    position_features,
    repetition_bias,
    scaled_and_shifted,
    timestep_features,
    unpatchify,
)
from fmscale.models.shapes import TIMESTEP_FEATURES

BASE_SPAN = 16  # of the positions of an image at the base resolution

# Parameter name -> how to fill it. AdaLN-zero (Peebles and Xie 2022, arXiv:2212.09748): gates start at 0, so that every
# block starts as the identity, and so does the output, so that the first velocity is 0.
INITIALISERS: dict[str, Initialiser] = {
    r"(patch_embed|context_embed)\.weight": xavier,
    r"((timestep_mlp|pooled_mlp)\.(up|down)|leap_mlp\.up)\.weight": normal,
    r"leap_mlp\.down\.weight": zeros,
    r"blocks\.\d+\.(image|text)\.(dual\.)?(qkv\.linear|out|mlp\.up|mlp\.down)\.weight": xavier,
    r"blocks\.\d+\.(image|text)\.(dual\.)?qkv\.norm_[qk]\.weight": ones,
    r"(modulation|proj_out)\.(weight|bias)": zeros,
    r"(?!proj_out|modulation).*\.bias": zeros,
}


class MMDiT(nn.Module):
    """The velocity network of Stable Diffusion 3 and 3.5.

    Args:
        layers: blocks.
        heads: attention heads; the width D is heads · head_dim.
        head_dim: channels of a head.
        latent_channels: C.
        patch_size: latent pixels on a side of a patch.
        context_dim: width of the text tokens that come in.
        pooled_dim: P.
        pos_embed_max_size: patches on a side that the position grid covers: no image may be larger.
        base_size: patches on a side at the base resolution, where positions span [0, 16): larger or wider images extend
            them evenly to both sides.
        position_origin, position_step: of `position_features`, where weights learned other positions than base_size
            says; None for those.
        qk_norm: normalise queries and keys (Stable Diffusion 3.5).
        dual_attention_layers: blocks, from 0, whose image stream also attends to itself (Stable Diffusion 3.5 medium).
        leap_embed: the network is told how far it is to leap; freshly made, it does not heed that.

    Raises:
        UserError: a dual-attention layer that does not exist, or a width that no position features fit.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        head_dim: int = 64,
        latent_channels: int = 16,
        patch_size: int = 2,
        context_dim: int = 4096,
        pooled_dim: int = 2048,
        pos_embed_max_size: int = 192,
        base_size: int = 16,
        position_origin: float | None = None,
        position_step: float | None = None,
        qk_norm: bool = False,
        dual_attention_layers: tuple[int, ...] = (),
        leap_embed: bool = False,
    ):
        super().__init__()
        self.width = heads * head_dim
        self.patch_size, self.pos_embed_max_size = patch_size, pos_embed_max_size
        self.set_positions(base_size, position_origin, position_step)
        _check_shape(self.width, layers, dual_attention_layers)
        patch_values = latent_channels * patch_size**2
        self.patch_embed = Linear(patch_values, self.width)
        self.timestep_mlp = MLP(TIMESTEP_FEATURES, self.width, self.width, nn.SiLU())
        self.leap_mlp = MLP(TIMESTEP_FEATURES, self.width, self.width, nn.SiLU()) if leap_embed else None
        self.pooled_mlp = MLP(pooled_dim, self.width, self.width, nn.SiLU())
        self.context_embed = Linear(context_dim, self.width)
        blocks = [
            JointBlock(self.width, heads, qk_norm=qk_norm, dual=i in dual_attention_layers, last=i == layers - 1)
            for i in range(layers)
        ]
        self.blocks = nn.ModuleList(blocks)
        # One product for what all layers take of the conditioning, and for the scale and shift before the output.
        self.rows = [*(block.rows for block in blocks), 2]
        self.modulation = Linear(self.width, sum(self.rows) * self.width)
        self.proj_out = Linear(self.width, patch_values)
        self.initialise()

    def set_positions(self, base_size: int, position_origin: float | None, position_step: float | None) -> None:
        """Say where patches are; arguments as of the class."""
        middle = (self.pos_embed_max_size - base_size) / 2
        self.position_origin = middle if position_origin is None else position_origin
        self.position_step = BASE_SPAN / base_size if position_step is None else position_step

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
            leap: shape (B,), in [0, 1], for a network that is told: how much of t to pass over. None means 0 for each.

        Returns:
            noise − data as the network sees it, shape (B, C, H, W), in the weights' dtype.

        Raises:
            UserError: latents that do not divide into patches, or are larger than the position grid.
        """
        dtype = self.proj_out.weight.dtype
        image = self._embed_image(latents.to(dtype))
        text = self.context_embed(context.to(dtype))
        conditioning = self._embed_conditioning(t, pooled.to(dtype), leap)
        *modulations, last = self.modulation(conditioning).unflatten(-1, (-1, self.width)).split(self.rows, dim=1)
        bias = None if repeats is None else repetition_bias(repeats, image.shape[1], dtype)
        for block, modulation in zip(self.blocks, modulations, strict=True):
            image, text = block(image, text, modulation, bias)
        patches = self.proj_out(scaled_and_shifted(image, last))
        height, width = latents.shape[-2:]
        return unpatchify(patches, height, width, self.patch_size)

    def _embed_image(self, latents: Tensor) -> Tensor:
        rows, columns = self._patch_grid(*latents.shape[-2:])
        positions = position_features(
            rows,
            columns,
            channels=self.width,
            max_size=self.pos_embed_max_size,
            origin=self.position_origin,
            step=self.position_step,
            device=latents.device,
        )
        return (self.patch_embed(patchify(latents, self.patch_size)) + positions).to(latents.dtype)

    def _embed_conditioning(self, t: Tensor, pooled: Tensor, leap: Tensor | None) -> Tensor:
        embedding = self.timestep_mlp(timestep_features(t).to(pooled.dtype)) + self.pooled_mlp(pooled)
        if self.leap_mlp is not None:
            told = torch.zeros_like(t) if leap is None else leap
            embedding = embedding + self.leap_mlp(timestep_features(told).to(pooled.dtype))
        return F.silu(embedding)

    def _patch_grid(self, height: int, width: int) -> tuple[int, int]:
        size, limit = self.patch_size, self.pos_embed_max_size
        if max(height, width) > size * limit:
            raise UserError(
                f"model.pos_embed_max_size {limit} covers latents up to {size * limit} x {size * limit}, "
                f"not {height} x {width}: raise it, or choose smaller buckets"
            )
        return patch_grid(height, width, size)


def _check_shape(width: int, layers: int, dual_attention_layers: tuple[int, ...]) -> None:
    if width % 4:
        raise UserError(f"model.heads times model.head_dim is {width}: choose a multiple of 4")
    missing = [layer for layer in dual_attention_layers if not 0 <= layer < layers]
    if missing:
        raise UserError(
            f"model.dual_attention_layers names layers {missing}: with {layers} layers, use 0 to {layers - 1}"
        )
