"""The pieces that the networks are built from, with float32 wherever rounding would show.

Dimensions: B images, C latent channels, H x W latent pixels, N tokens of a stream, D width of a token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
TIMESTEP_FEATURES = 256
LONGEST_PERIOD = 10_000  # of the sinusoids, for time and position alike

Row = TypeVar("Row")
Initialiser = Callable[[Tensor, "torch.Generator | None"], object]


class Linear(nn.Linear):
    """A linear layer that leaves its memory unset: `initialise` writes every value, once, from one table."""

    def reset_parameters(self) -> None:
        """Draw nothing, so that a build consumes no random numbers and no time."""


class MLP(nn.Module):
    """Two linear layers around an activation.

    Args:
        inputs: width of what comes in.
        hidden: width between the layers.
        outputs: width of what goes out.
        activation: applied between the layers.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, activation: nn.Module):
        super().__init__()
        self.up = Linear(inputs, hidden)
        self.activation = activation
        self.down = Linear(hidden, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        return self.down(self.activation(self.up(features)))


class Heads(NamedTuple):
    """What a stream brings to an attention, each of shape (B, N, heads, head_dim)."""

    query: Tensor
    key: Tensor
    value: Tensor


class QKV(nn.Module):
    """Tokens to queries, keys and values by one matrix product.

    Args:
        width: of a token; a multiple of `heads`.
        heads: attention heads.
        qk_norm: give queries and keys an RMS of one, times a learned factor per channel of a head.
            Source: Esser et al. 2024, arXiv:2403.03206, sec. 5.3.2.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.linear = Linear(width, 3 * width)
        self.norm_q = nn.RMSNorm(width // heads, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width // heads, eps=NORM_EPS) if qk_norm else nn.Identity()

    def forward(self, tokens: Tensor) -> Heads:
        """Map tokens (B, N, D) to heads."""
        query, key, value = self.linear(tokens).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return Heads(self.norm_q(query), self.norm_k(key), value)


class SelfAttention(nn.Module):
    """Attention of one stream to itself; arguments as in `QKV`."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool):
        super().__init__()
        self.qkv = QKV(width, heads, qk_norm=qk_norm)
        self.out = Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, N, D) to what each reads from the others, same shape."""
        return self.out(attend(*self.qkv(tokens)))


class AdaptiveNorm(nn.Module):
    """A layer norm whose scale and shift the conditioning decides."""

    def __init__(self, width: int):
        super().__init__()
        self.modulation = Linear(width, 2 * width)

    def forward(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """Normalise tokens (B, N, D) under conditioning (B, D), already activated."""
        scale, shift = self.modulation(conditioning).unsqueeze(1).chunk(2, dim=-1)  # in diffusers' order
        return modulate(normalise(tokens), shift, scale)


def normalise(tokens: Tensor) -> Tensor:
    """Layer norm over the last dimension, with nothing learned and float32 statistics."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """normed · (1 + scale) + shift, in one pass; shift and scale have shape (B, 1, D)."""
    return torch.addcmul(shift, normed, 1 + scale)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention over heads.

    Args:
        query: shape (B, N, heads, head_dim).
        key: shape (B, M, heads, head_dim).
        value: as `key`.
        bias: added to the logits; shape that broadcasts to (B, heads, N, M).

    Returns:
        What each query read, the heads side by side, shape (B, N, heads·head_dim).
    """
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)


def repetition_bias(repeats: Tensor, image_tokens: int, dtype: torch.dtype) -> Tensor:
    """The attention bias by which one text token weighs as much as `repeats` equal ones.

    r equal keys add r·exp(logit) to the softmax's sum, and so does one key with log(r) on its logit. A common constant
    on all keys changes nothing: it makes the largest log(r) exact in `dtype` (bfloat16 would be 1.4 % off for r = 256).

    Args:
        repeats: of each text token, at least 1, shape (L,).
        image_tokens: how many keys, of one token each, precede the text.
        dtype: of the queries.

    Returns:
        Shape (1, 1, 1, image_tokens + L).
    """
    logs = F.pad(repeats.double(), (image_tokens, 0), value=1.0).log()
    largest = logs.max()
    return (logs + (largest.to(dtype) - largest)).to(dtype)[None, None, None]


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """Cut (B, C, H, W) into patches, row by row: (B, N, C·patch_size²), channel first within a patch."""
    batch, channels, height, width = latents.shape
    rows, columns = height // patch_size, width // patch_size
    grid = latents.view(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)


def unpatchify(patches: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """Lay patches (B, N, patch_size²·C), channel last within a patch, out as (B, C, height, width)."""
    grid = patches.unflatten(1, (height // patch_size, width // patch_size))
    grid = grid.unflatten(-1, (patch_size, patch_size, -1))
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, height, width)


def angles(positions: Tensor, count: int) -> Tensor:
    """positions (P,) times `count` frequencies that fall from 1 towards 1 / 10,000: (P, count), in positions' dtype."""
    exponents = torch.arange(count, dtype=positions.dtype, device=positions.device) / count
    return positions[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * exponents)


def timestep_features(t: Tensor) -> Tensor:
    """Cosines, then sines, of 1000·t.

    Args:
        t: shape (B,), in [0, 1].

    Returns:
        Shape (B, 256), float32: in bfloat16 neighbouring times would share their features.
    """
    phases = angles(1000 * t.float(), TIMESTEP_FEATURES // 2)
    return torch.cat([phases.cos(), phases.sin()], dim=-1)


def position_features(
    rows: int, columns: int, *, channels: int, max_size: int, base_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Sinusoidal features of every patch: the centre of a max_size x max_size grid.

    Position p has the value (p − (max_size − base_size) / 2) · 16 / base_size: the base resolution spans [0, 16)
    whatever its size, and larger or wider images extend it evenly to both sides. Every forward computes them anew, from
    one small table of sines: nothing to store, to cast by accident, or to restore after a build on the meta device.

    Args:
        rows: patches from top to bottom, at most max_size.
        columns: patches from left to right, at most max_size.
        channels: width of a token, a multiple of 4: the first half encodes the column, the second the row.
        max_size: patches on a side of the whole grid.
        base_size: patches on a side at the base resolution (s in the paper).
        device: where to compute.

    Returns:
        Shape (rows·columns, channels), row by row, float32, computed in float64.

    Source: Esser et al. 2024, arXiv:2403.03206, sec. 5.3.2, "Positional Encodings for Varying Aspect Ratios".
    """
    by_row, by_column = _position_tables(rows, columns, channels, max_size, base_size, device)
    grid = [by_column.expand(rows, -1, -1), by_row[:, None].expand(-1, columns, -1)]
    return torch.cat(grid, dim=-1).flatten(0, 1)


def position_rows(*, channels: int, max_size: int, base_size: int) -> Iterator[Tensor]:
    """The features of a whole max_size x max_size grid, which may be large, a row of patches at a time.

    Args:
        channels, max_size, base_size: as for `position_features`.

    Returns:
        max_size tensors, each of shape (max_size, channels), float32.
    """
    by_row, by_column = _position_tables(max_size, max_size, channels, max_size, base_size, "cpu")
    for features in by_row:
        yield torch.cat([by_column, features.expand(max_size, -1)], dim=-1)


def _position_tables(
    rows: int, columns: int, channels: int, max_size: int, base_size: int, device: torch.device | str
) -> tuple[Tensor, ...]:
    """Features of each row, shape (rows, channels / 2), and of each column."""
    starts = ((rows, (max_size - rows) // 2), (columns, (max_size - columns) // 2))
    steps = torch.cat([torch.arange(n, dtype=torch.float64, device=device) + start for n, start in starts])
    phases = angles((steps - (max_size - base_size) / 2) * (16 / base_size), channels // 4)
    return torch.cat([phases.sin(), phases.cos()], dim=-1).float().split((rows, columns))


def zeros(tensor: Tensor, generator: torch.Generator | None) -> None:
    """Set to 0."""
    nn.init.zeros_(tensor)


def ones(tensor: Tensor, generator: torch.Generator | None) -> None:
    """Set to 1."""
    nn.init.ones_(tensor)


def normal(tensor: Tensor, generator: torch.Generator | None) -> None:
    """Draw from N(0, 0.02²)."""
    nn.init.normal_(tensor, std=0.02, generator=generator)


def xavier(tensor: Tensor, generator: torch.Generator | None) -> None:
    """Draw uniformly with variance 2 / (rows + columns)."""
    nn.init.xavier_uniform_(tensor, generator=generator)


def initialise(model: nn.Module, table: Mapping[str, Initialiser], generator: torch.Generator | None = None) -> None:
    """Write every parameter of a model, in the order of their creation.

    Args:
        model: any network; on the meta device nothing happens.
        table: regular expression for a whole parameter name -> how to fill it; exactly one row fits each name.
        generator: source of the random draws, on the parameters' device; None is torch's own.
    """
    for name, parameter in model.named_parameters():
        fill = row_for(name, table)
        if not parameter.is_meta:  # to draw nothing there imports much of torch.compile
            fill(parameter, generator)


def row_for(name: str, table: Mapping[str, Row]) -> Row:
    """The value of the one row of a table whose regular expression fits a whole parameter name."""
    rows = [value for pattern, value in table.items() if re.fullmatch(pattern, name)]
    assert len(rows) == 1, f"{name} fits {len(rows)} rows of the table, not one"
    return rows[0]
