"""MMDiT: text and image as two streams of tokens that meet in every attention (Stable Diffusion 3 and 3.5).

Dimensions: B images, C latent channels, H x W latent pixels, N image tokens, L text tokens, D width of a token,
P pooled width.

Source: Esser et al. 2024, arXiv:2403.03206, fig. 2. Second image attention: Stable Diffusion 3.5 medium (MMDiT-X).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmscale.errors import UserError
from fmscale.models.layers import (
    MLP,
    QKV,
    TIMESTEP_FEATURES,
    AdaptiveNorm,
    Heads,
    Initialiser,
    Linear,
    SelfAttention,
    attend,
    initialise,
    modulate,
    normal,
    normalise,
    ones,
    patchify,
    position_features,
    repetition_bias,
    timestep_features,
    unpatchify,
    xavier,
    zeros,
)

# Parameter name -> how to fill it. AdaLN-zero (Peebles and Xie 2022, arXiv:2212.09748): gates start at 0, so that every
# block starts as the identity, and so does the output, so that the first velocity is 0.
INITIALISERS: dict[str, Initialiser] = {
    r"(patch_embed|context_embed)\.weight": xavier,
    r"(timestep_mlp|pooled_mlp)\.(up|down)\.weight": normal,
    r"blocks\.\d+\.(image|text)\.(dual\.)?(qkv\.linear|out|mlp\.up|mlp\.down)\.weight": xavier,
    r"blocks\.\d+\.(image|text)\.(dual\.)?qkv\.norm_[qk]\.weight": ones,
    r"(.*\.modulation|proj_out)\.(weight|bias)": zeros,
    r"(?!proj_out)(?!.*modulation).*\.bias": zeros,
}

# Parameter name -> the part of the network that it belongs to, by which gradients and weights are reported.
PARTS = {
    r"(patch_embed|context_embed|timestep_mlp|pooled_mlp)\..*": "embeddings",
    r".*\.modulation\..*": "modulation",
    r"blocks\.\d+\.(image|text)\.(dual\.)?(qkv|out)\..*": "attention",
    r"blocks\.\d+\.(image|text)\.mlp\..*": "mlp",
    r"proj_out\..*": "output",
}


class Modulation(NamedTuple):
    """How the conditioning steers one residual branch: shift and scale going in, gate coming out; each (B, 1, D)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def enter(self, normed: Tensor) -> Tensor:
        """What the branch sees of the normalised tokens."""
        return modulate(normed, self.shift, self.scale)

    def leave(self, tokens: Tensor, branch: Tensor) -> Tensor:
        """The tokens plus what the branch adds: tokens + gate · branch, in one pass."""
        return torch.addcmul(tokens, self.gate, branch)


class Opened(NamedTuple):
    """A stream halfway through its block: its share of the joint attention, and what the second half needs."""

    heads: Heads
    normed: Tensor
    modulations: list[Modulation]


class Stream(nn.Module):
    """One modality's half of a joint block: what happens to its tokens before and after the attention that both share.

    Args:
        width: of a token.
        heads: attention heads.
        qk_norm: normalise queries and keys.
        dual: also attend within the stream alone, beside the joint attention.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, dual: bool = False):
        super().__init__()
        self.modulation = Linear(width, (9 if dual else 6) * width)
        self.qkv = QKV(width, heads, qk_norm=qk_norm)
        self.out = Linear(width, width)
        self.dual = SelfAttention(width, heads, qk_norm=qk_norm) if dual else None
        self.mlp = MLP(width, 4 * width, width, nn.GELU(approximate="tanh"))

    def before(self, tokens: Tensor, conditioning: Tensor) -> Opened:
        """Bring tokens (B, N, D) under conditioning (B, D), already activated, to the joint attention."""
        chunks = self.modulation(conditioning).unsqueeze(1).split(tokens.shape[-1], dim=-1)
        modulations = [Modulation(*chunks[i : i + 3]) for i in range(0, len(chunks), 3)]  # attention, MLP, dual
        normed = normalise(tokens)
        return Opened(self.qkv(modulations[0].enter(normed)), normed, modulations)

    def after(self, tokens: Tensor, attended: Tensor, opened: Opened) -> Tensor:
        """Add to tokens (B, N, D) what the joint attention read for them, the dual attention and the MLP."""
        attention, mlp, *dual = opened.modulations
        tokens = attention.leave(tokens, self.out(attended))
        if self.dual is not None:
            tokens = dual[0].leave(tokens, self.dual(dual[0].enter(opened.normed)))
        return mlp.leave(tokens, self.mlp(mlp.enter(normalise(tokens))))


class ReadStream(nn.Module):
    """A stream that others read for the last time: it enters the attention, and its own tokens stay as they are.

    Arguments as in `Stream`.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool):
        super().__init__()
        self.norm = AdaptiveNorm(width)
        self.qkv = QKV(width, heads, qk_norm=qk_norm)  # its queries serve nobody, but published weights have them

    def before(self, tokens: Tensor, conditioning: Tensor) -> Opened:
        """As `Stream.before`."""
        normed = self.norm(tokens, conditioning)
        return Opened(self.qkv(normed), normed, [])

    def after(self, tokens: Tensor, attended: Tensor, opened: Opened) -> Tensor:
        """The tokens, unchanged."""
        return tokens


class JointBlock(nn.Module):
    """Image and text, each with weights of its own, in one attention over all tokens.

    Args:
        width: of a token.
        heads: attention heads.
        qk_norm: normalise queries and keys.
        dual: the image also attends to itself alone.
        last: the text is read and not updated, since only the image matters afterwards.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, dual: bool, last: bool):
        super().__init__()
        self.image = Stream(width, heads, qk_norm=qk_norm, dual=dual)
        self.text = (ReadStream if last else Stream)(width, heads, qk_norm=qk_norm)

    def forward(
        self, image: Tensor, text: Tensor, conditioning: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Update both streams.

        Args:
            image: shape (B, N, D).
            text: shape (B, L, D).
            conditioning: activated embedding of time and pooled text, shape (B, D).
            bias: of the attention's logits, shape (1, 1, 1, N + L), or None.

        Returns:
            image and text, shapes as given.
        """
        opened_image, opened_text = self.image.before(image, conditioning), self.text.before(text, conditioning)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(opened_image.heads, opened_text.heads, strict=True))
        attended = attend(query, key, value, bias)
        for_image, for_text = attended.split((image.shape[1], text.shape[1]), dim=1)
        return self.image.after(image, for_image, opened_image), self.text.after(text, for_text, opened_text)


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
        base_size: patches on a side at the base resolution, where positions span [0, 16).
        qk_norm: normalise queries and keys (Stable Diffusion 3.5).
        dual_attention_layers: blocks, from 0, whose image stream also attends to itself (Stable Diffusion 3.5 medium).

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
        qk_norm: bool = False,
        dual_attention_layers: tuple[int, ...] = (),
    ):
        super().__init__()
        self.width = heads * head_dim
        self.patch_size, self.pos_embed_max_size, self.base_size = patch_size, pos_embed_max_size, base_size
        _check_shape(self.width, layers, dual_attention_layers)
        patch_values = latent_channels * patch_size**2
        self.patch_embed = Linear(patch_values, self.width)
        self.timestep_mlp = MLP(TIMESTEP_FEATURES, self.width, self.width, nn.SiLU())
        self.pooled_mlp = MLP(pooled_dim, self.width, self.width, nn.SiLU())
        self.context_embed = Linear(context_dim, self.width)
        self.blocks = nn.ModuleList(
            JointBlock(self.width, heads, qk_norm=qk_norm, dual=i in dual_attention_layers, last=i == layers - 1)
            for i in range(layers)
        )
        self.norm_out = AdaptiveNorm(self.width)
        self.proj_out = Linear(self.width, patch_values)
        self.initialise()

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Write every parameter anew, after `to_empty` for instance; as the constructor does."""
        initialise(self, INITIALISERS, generator)

    def forward(
        self, latents: Tensor, t: Tensor, context: Tensor, pooled: Tensor, repeats: Tensor | None = None
    ) -> Tensor:
        """The velocity at noisy latents.

        Args:
            latents: shape (B, C, H, W), H and W multiples of patch_size.
            t: shape (B,), in [0, 1]: 0 is data, 1 is noise. Kept in float32; the rest is cast to the weights' dtype.
            context: text tokens, shape (B, L, context_dim).
            pooled: pooled text, shape (B, P).
            repeats: shape (L,): text token i stands for repeats[i] equal ones. None means one each.

        Returns:
            noise − data as the network sees it, shape (B, C, H, W), in the weights' dtype.

        Raises:
            UserError: latents that do not divide into patches, or are larger than the position grid.
        """
        dtype = self.proj_out.weight.dtype
        image = self._embed_image(latents.to(dtype))
        text = self.context_embed(context.to(dtype))
        conditioning = self._embed_conditioning(t, pooled.to(dtype))
        bias = None if repeats is None else repetition_bias(repeats, image.shape[1], dtype)
        for block in self.blocks:
            image, text = block(image, text, conditioning, bias)
        patches = self.proj_out(self.norm_out(image, conditioning))
        height, width = latents.shape[-2:]
        return unpatchify(patches, height, width, self.patch_size)

    def _embed_image(self, latents: Tensor) -> Tensor:
        rows, columns = self._patch_grid(*latents.shape[-2:])
        positions = position_features(
            rows,
            columns,
            channels=self.width,
            max_size=self.pos_embed_max_size,
            base_size=self.base_size,
            device=latents.device,
        )
        return (self.patch_embed(patchify(latents, self.patch_size)) + positions).to(latents.dtype)

    def _embed_conditioning(self, t: Tensor, pooled: Tensor) -> Tensor:
        embedding = self.timestep_mlp(timestep_features(t).to(pooled.dtype)) + self.pooled_mlp(pooled)
        return F.silu(embedding)  # once for all: every block's modulation starts with it

    def _patch_grid(self, height: int, width: int) -> tuple[int, int]:
        size, limit = self.patch_size, self.pos_embed_max_size
        if height % size or width % size:
            raise UserError(
                f"model.patch_size {size} does not divide latents of {height} x {width}: choose other bucket sizes"
            )
        if max(height, width) > size * limit:
            raise UserError(
                f"model.pos_embed_max_size {limit} covers latents up to {size * limit} x {size * limit}, "
                f"not {height} x {width}: raise it, or choose smaller buckets"
            )
        return height // size, width // size


def _check_shape(width: int, layers: int, dual_attention_layers: tuple[int, ...]) -> None:
    if width % 4:
        raise UserError(f"model.heads times model.head_dim is {width}: choose a multiple of 4")
    missing = [layer for layer in dual_attention_layers if not 0 <= layer < layers]
    if missing:
        raise UserError(
            f"model.dual_attention_layers names layers {missing}: with {layers} layers, use 0 to {layers - 1}"
        )
