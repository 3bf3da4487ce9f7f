"""The pieces that the networks are built from, with float32 wherever rounding would show.

Dimensions: B images, C latent channels, H x W latent pixels, N tokens of a stream, D width of a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmscale.errors import UserError
from fmscale.models.shapes import TIMESTEP_FEATURES

NORM_EPS = 1e-6
LONGEST_PERIOD = 10_000  # of the sinusoids, for time and position alike


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


class Rotation(NamedTuple):
    """By how much each token's channel pairs are turned: cosines and sines, each (N, 1, head_dim / 2), float32."""

    cos: Tensor
    sin: Tensor


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

    Attributes:
        rows: of modulation that it takes: shift, scale and gate for the attention, for the MLP, for the dual attention.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, dual: bool = False):
        super().__init__()
        self.rows = 9 if dual else 6
        self.qkv = QKV(width, heads, qk_norm=qk_norm)
        self.out = Linear(width, width)
        self.dual = SelfAttention(width, heads, qk_norm=qk_norm) if dual else None
        self.mlp = MLP(width, 4 * width, width, nn.GELU(approximate="tanh"))

    def before(self, tokens: Tensor, modulation: Tensor) -> Opened:
        """Bring tokens (B, N, D) under modulation (B, rows, D) to the joint attention."""
        normed = normalise(tokens)
        modulations = modulations_of(modulation)
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

    Attributes:
        rows: of modulation that it takes: scale and shift, in the order of published weights.
    """

    rows = 2

    def __init__(self, width: int, heads: int, *, qk_norm: bool):
        super().__init__()
        self.qkv = QKV(width, heads, qk_norm=qk_norm)  # its queries serve nobody, but published weights have them

    def before(self, tokens: Tensor, modulation: Tensor) -> Opened:
        """As `Stream.before`."""
        normed = scaled_and_shifted(tokens, modulation)
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

    Attributes:
        rows: of modulation that it takes, the image's first.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, dual: bool = False, last: bool = False):
        super().__init__()
        self.image = Stream(width, heads, qk_norm=qk_norm, dual=dual)
        self.text = (ReadStream if last else Stream)(width, heads, qk_norm=qk_norm)
        self.rows = self.image.rows + self.text.rows

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        modulation: Tensor,
        bias: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Update both streams.

        Args:
            image: shape (B, N, D).
            text: shape (B, L, D).
            modulation: shape (B, rows, D).
            bias: of the attention's logits, shape (1 or B, 1, 1, N + L), or None.
            rotation: of the image's queries and keys, or None; the text stays at the origin, where nothing turns.

        Returns:
            image and text, shapes as given.
        """
        for_image, for_text = modulation.split((self.image.rows, self.text.rows), dim=1)
        opened_image, opened_text = self.image.before(image, for_image), self.text.before(text, for_text)
        heads = opened_image.heads if rotation is None else rotate(opened_image.heads, rotation)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(heads, opened_text.heads, strict=True))
        attended = attend(query, key, value, bias).split((image.shape[1], text.shape[1]), dim=1)
        return self.image.after(image, attended[0], opened_image), self.text.after(text, attended[1], opened_text)


def modulations_of(rows: Tensor) -> list[Modulation]:
    """Modulation (B, 3 x branches, D) of each branch."""
    chunks = rows.split(1, dim=1)
    return [Modulation(*chunks[i : i + 3]) for i in range(0, len(chunks), 3)]


def scaled_and_shifted(tokens: Tensor, rows: Tensor) -> Tensor:
    """Tokens (B, N, D), normalised, under a scale and a shift (B, 2, D)."""
    scale, shift = rows.split(1, dim=1)
    return modulate(normalise(tokens), shift, scale)


def normalise(tokens: Tensor) -> Tensor:
    """Layer norm over the last dimension, with nothing learned and float32 statistics."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """normed · (1 + scale) + shift, in float32, rounded once; shift and scale have shape (B, 1, D)."""
    return torch.addcmul(shift.float(), normed, 1 + scale.float()).to(normed.dtype)


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
    A key that stands for none has log(0), minus infinity, and so no weight; the image's keys always have some.

    Args:
        repeats: of each text token, shape (L,), or (B, L) where images differ.
        image_tokens: how many keys, of one token each, precede the text.
        dtype: of the queries.

    Returns:
        Shape (1 or B, 1, 1, image_tokens + L).
    """
    logs = F.pad(repeats.double(), (image_tokens, 0), value=1.0).log()
    largest = logs.max()
    return (logs + (largest.to(dtype) - largest)).to(dtype).view(-1, 1, 1, logs.shape[-1])


def rotate(heads: Heads, rotation: Rotation) -> Heads:
    """Turn each pair of neighbouring channels of queries and keys by its token's angle, in float32.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34.
    """
    return Heads(_turn(heads.query, rotation), _turn(heads.key, rotation), heads.value)


def _turn(tokens: Tensor, rotation: Rotation) -> Tensor:
    even, odd = tokens.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = (even * rotation.cos - odd * rotation.sin, odd * rotation.cos + even * rotation.sin)
    return torch.stack(turned, dim=-1).flatten(-2).to(tokens.dtype)


def rotary_angles(
    rows: int, columns: int, still: int, dims: Sequence[int], device: torch.device | str = "cpu"
) -> Rotation:
    """The rotation of image tokens by row and column, and of others that stay.

    Args:
        rows, columns: patches of the image, row by row.
        still: tokens behind the image that are at the origin.
        dims: channels of a head that turn with each axis, even numbers: one that is always 0, row, column.
        device: where to compute.

    Returns:
        Cosines and sines of rows·columns + still tokens, computed in float64.
    """
    positions = torch.zeros(rows * columns + still, 3, dtype=torch.float64, device=device)
    grid = positions[: rows * columns].view(rows, columns, 3)
    grid[..., 1] = torch.arange(rows, device=device)[:, None]
    grid[..., 2] = torch.arange(columns, device=device)
    phases = torch.cat([angles(axis, size // 2) for axis, size in zip(positions.unbind(1), dims, strict=True)], dim=-1)
    return Rotation(phases.cos().float()[:, None], phases.sin().float()[:, None])


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in latents of height x width pixels.

    Raises:
        UserError: they do not divide.
    """
    if height % patch_size or width % patch_size:
        raise UserError(
            f"model.patch_size {patch_size} does not divide latents of {height} x {width}: choose other bucket sizes"
        )
    return height // patch_size, width // patch_size


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """Cut (B, C, H, W) into patches, row by row: (B, N, C·patch_size²), channel first within a patch."""
    batch, channels, height, width = latents.shape
    rows, columns = height // patch_size, width // patch_size
    grid = latents.view(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)


def unpatchify(patches: Tensor, height: int, width: int, patch_size: int, *, channel_first: bool = False) -> Tensor:
    """Lay patches (B, N, patch_size²·C) out as (B, C, height, width); within a patch the channel is last, or first."""
    grid = patches.unflatten(1, (height // patch_size, width // patch_size))
    if channel_first:
        grid = grid.unflatten(-1, (-1, patch_size, patch_size)).permute(0, 3, 1, 4, 2, 5)
    else:
        grid = grid.unflatten(-1, (patch_size, patch_size, -1)).permute(0, 5, 1, 3, 2, 4)
    return grid.reshape(patches.shape[0], -1, height, width)


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
    rows: int,
    columns: int,
    *,
    channels: int,
    max_size: int,
    origin: float,
    step: float,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Sinusoidal features of every patch: the centre of a max_size x max_size grid.

    Patch p of an axis has the position (p − origin) · step. Every forward computes the features anew, from one small
    table of sines: nothing to store, to cast by accident, or to restore after a build on the meta device.

    Args:
        rows: patches from top to bottom, at most max_size.
        columns: patches from left to right, at most max_size.
        channels: width of a token, a multiple of 4: the first half encodes the column, the second the row.
        max_size: patches on a side of the whole grid.
        origin: the patch of the whole grid that has position 0.
        step: between neighbouring patches.
        device: where to compute.

    Returns:
        Shape (rows·columns, channels), row by row, float32, computed in float64.

    Source: Esser et al. 2024, arXiv:2403.03206, sec. 5.3.2, "Positional Encodings for Varying Aspect Ratios".
    """
    by_row, by_column = _position_tables(rows, columns, channels, max_size, origin, step, device)
    grid = [by_column.expand(rows, -1, -1), by_row[:, None].expand(-1, columns, -1)]
    return torch.cat(grid, dim=-1).flatten(0, 1)


def position_rows(*, channels: int, max_size: int, origin: float, step: float) -> Iterator[Tensor]:
    """The features of a whole max_size x max_size grid, which may be large, a row of patches at a time.

    Args:
        channels, max_size, origin, step: as for `position_features`.

    Returns:
        max_size tensors, each of shape (max_size, channels), float32.
    """
    by_row, by_column = _position_tables(max_size, max_size, channels, max_size, origin, step, "cpu")
    for features in by_row:
        yield torch.cat([by_column, features.expand(max_size, -1)], dim=-1)


def _position_tables(
    rows: int, columns: int, channels: int, max_size: int, origin: float, step: float, device: torch.device | str
) -> tuple[Tensor, ...]:
    """Features of each row, shape (rows, channels / 2), and of each column."""
    starts = ((rows, (max_size - rows) // 2), (columns, (max_size - columns) // 2))
    patches = torch.cat([torch.arange(n, dtype=torch.float64, device=device) + start for n, start in starts])
    phases = angles((patches - origin) * step, channels // 4)
    return torch.cat([phases.sin(), phases.cos()], dim=-1).float().split((rows, columns))
