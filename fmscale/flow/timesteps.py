"""Laws by which training draws t, and the shift that moves them with resolution.

Each law is its quantile function: how t follows from u, uniform in (0, 1). So each can be drawn freely, or stratified:
with one u in each of B equal parts of (0, 1), where B is the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fmscale.errors import UserError

LEAST_U = 2.0**-25  # half of what torch's float32 uniform numbers differ by; keeps t off the ends


class Shape(NamedTuple):
    """What the laws may be told; each takes what is its own.

    Attributes:
        mean: logit_normal: of the logit; above 0 favours noise.
        std: logit_normal: of the logit, > 0.
        scale: mode: in [-1, 2 / (π - 2)]; above 0 favours the middle, below 0 the ends, 0 is uniform.
        a: beta: > 0; below 1 favours data.
        b: beta: > 0; below 1 favours noise.
        steps: steps: >= 1; how many there are.
        steepness: u_shaped: > 0; the ends count cosh(steepness / 2) times as much as the middle.
    """

    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29
    a: float = 1.5
    b: float = 1.0
    steepness: float = 4.0
    steps: float = 4


def uniform_quantile(u: Tensor, shape: Shape) -> Tensor:
    """t = u."""
    return u


def logit_normal_quantile(u: Tensor, shape: Shape) -> Tensor:
    """t = sigmoid(n), n ~ N(mean, std²): favours the middle of the path, where the velocity is hardest to tell.

    Raises:
        UserError: std <= 0.

    Source: Esser et al. 2024, arXiv:2403.03206, sec. 3.1.
    """
    return torch.sigmoid(shape.mean + _std(shape) * torch.special.ndtri(u))


def _std(shape: Shape) -> float:
    if shape.std <= 0:
        raise UserError(f"logit-normal timesteps: std must be above 0, given {shape.std}")
    return shape.std


def mode_quantile(u: Tensor, shape: Shape) -> Tensor:
    """t = u - scale (sin²(π u / 2) - u): a peak in the middle, or at both ends, that leaves no t out.

    Raises:
        UserError: scale is outside [-1, 2 / (π - 2)], where t would not rise with u.

    Source: Esser et al. 2024, arXiv:2403.03206, eq. 20, for 1 - u.
    """
    if not -1 <= shape.scale <= 2 / (math.pi - 2):
        raise UserError(f"mode timesteps: scale must be from -1 to {2 / (math.pi - 2):.4f}, given {shape.scale}")
    return u - shape.scale * (torch.sin(u * (math.pi / 2)).square() - u)


def cosmap_quantile(u: Tensor, shape: Shape) -> Tensor:
    """t = 1 - 1 / (tan(π u / 2) + 1): the rectified path sees signal and noise in the ratios of the cosine path.

    Source: Esser et al. 2024, arXiv:2403.03206, eq. 21.
    """
    angle = u * (math.pi / 2)
    return torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))


def beta_quantile(u: Tensor, shape: Shape) -> Tensor:
    """t ~ Beta(a, b).

    Raises:
        UserError: a or b <= 0.

    Source: Black et al. 2024, arXiv:2410.24164 (π0), whose a and b are ours by default.
    """
    if shape.a <= 0 or shape.b <= 0:
        raise UserError(f"beta timesteps: a and b must be above 0, given {shape.a} and {shape.b}")
    from scipy.special import betaincinv  # torch has no inverse of the incomplete beta function

    return torch.from_numpy(betaincinv(shape.a, shape.b, u.numpy()))


def u_shaped_quantile(u: Tensor, shape: Shape) -> Tensor:
    """t of density proportional to exp(s t) + exp(s (1 - t)): both ends, where reflow pairs leave most to learn.

    Raises:
        UserError: steepness <= 0.

    Source: Lee et al. 2024, arXiv:2405.20320, whose steepness is ours by default.
    """
    if shape.steepness <= 0:
        raise UserError(f"U-shaped timesteps: steepness must be above 0, given {shape.steepness}")
    return 0.5 + torch.asinh((2 * u - 1) * math.sinh(shape.steepness / 2)) / shape.steepness


def steps_quantile(u: Tensor, shape: Shape) -> Tensor:
    """t = 1/k, 2/k, … 1: the times at which an Euler sampler of k steps asks, each as often as the others.

    A network that learns these alone on pairs of a teacher is distilled to k steps.

    Raises:
        UserError: steps < 1.

    Source: Liu et al. 2022, arXiv:2209.03003, sec. 2.2 ("distillation") and app. on k steps.
    """
    if shape.steps < 1:
        raise UserError(f"timesteps at steps: there must be at least one, given {shape.steps}")
    return (u * shape.steps).ceil() / shape.steps


QUANTILES: dict[str, Callable[[Tensor, Shape], Tensor]] = {
    "uniform": uniform_quantile,
    "logit_normal": logit_normal_quantile,
    "mode": mode_quantile,
    "cosmap": cosmap_quantile,
    "beta": beta_quantile,
    "u_shaped": u_shaped_quantile,
    "steps": steps_quantile,
}


def stratify(batch: int, generator: torch.Generator) -> Tensor:
    """One number in each of `batch` equal parts of (0, 1), the parts in random order.

    Args:
        batch: number of images B: the global batch, or the parts would be those of a rank.

    Returns:
        u, shape (B,), float64.
    """
    within = torch.rand(batch, generator=generator, dtype=torch.float64)
    return (torch.randperm(batch, generator=generator) + within) / batch


def draw_timesteps(
    law: str, batch: int, generator: torch.Generator, *, stratified: bool = False, **shape: float
) -> Tensor:
    """Timesteps of a global batch.

    Args:
        law: row of `QUANTILES`.
        batch: number of images B of the global batch.
        generator: on the CPU.
        stratified: each B-th part of the law gets one t.
        shape: fields of `Shape`.

    Returns:
        t, shape (B,), float32, in [0, 1).

    Raises:
        UserError: a field is outside its range.
    """
    told = Shape(**shape)
    if stratified:
        u = stratify(batch, generator)
    elif law == "uniform":
        return torch.rand(batch, generator=generator)
    elif law == "logit_normal":  # a normal number, rather than the quantile of a uniform one: t of runs that have begun
        return torch.sigmoid(told.mean + _std(told) * torch.randn(batch, generator=generator))
    else:
        u = torch.rand(batch, generator=generator, dtype=torch.float64)
    return QUANTILES[law](u.clamp(LEAST_U, 1 - LEAST_U), told).float().clamp(max=1 - 2.0**-24)


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """Move t towards noise: at m pixels the noise level that at n pixels hid as much is t' with α = sqrt(m / n).

    Args:
        t: any shape, in [0, 1].
        shift: α > 0; 1 changes nothing, above 1 favours noise.

    Returns:
        α t / (1 + (α - 1) t), which keeps 0 and 1 in place.

    Raises:
        UserError: shift <= 0.

    Source: Esser et al. 2024, arXiv:2403.03206, eq. 23.
    """
    if shift <= 0:
        raise UserError(f"timestep shift must be above 0, given {shift}")
    return shift * t / (1 + (shift - 1) * t)


FLUX_SHIFT = ((256, 0.5), (4096, 1.15))  # (image tokens, mu) of two resolutions


def sqrt_shift(tokens: int, base_tokens: int) -> float:
    """sqrt(m / n): the noise hides as much of an image of m tokens as, without shift, of one of n.

    Args:
        tokens: image tokens m at this resolution, > 0; pixels do as well.
        base_tokens: n > 0, in the same unit, where the shift is 1.

    Source: Esser et al. 2024, arXiv:2403.03206, eq. 23, who after asking people take 3 at 1024 px.
    """
    return math.sqrt(tokens / base_tokens)


def flux_shift(tokens: int, base_tokens: int | None = None) -> float:
    """exp(mu), where mu rises in a straight line from 0.5 at 256 image tokens to 1.15 at 4096, and beyond.

    Args:
        tokens: image tokens at this resolution, of 16 x 16 px each in FLUX.
        base_tokens: has no part in it.

    Source: `calculate_shift` of diffusers' FLUX pipeline, and `time_shift` of its scheduler.
    """
    (few, low), (many, high) = FLUX_SHIFT
    return math.exp(low + (high - low) * (tokens - few) / (many - few))


SHIFTS: dict[str, Callable[[int, int], float]] = {"sqrt": sqrt_shift, "flux": flux_shift}


def resolve_shift(shift: float | str, tokens: int, base_tokens: int) -> float:
    """The shift of a resolution: a number as it is, or what a row of `SHIFTS` gives.

    Args:
        shift: > 0, or row of `SHIFTS`.
        tokens, base_tokens: image tokens at this resolution and where `sqrt` is 1.

    Raises:
        UserError: neither a number nor a row.
    """
    if not isinstance(shift, str):
        return float(shift)
    if shift not in SHIFTS:
        raise UserError(f"timestep shift must be a number above 0 or one of {', '.join(SHIFTS)}, given {shift!r}")
    return SHIFTS[shift](tokens, base_tokens)


TimestepSampler = Callable[..., Tensor]  # (batch, generator, *, stratified, **fields of Shape) -> t (B,)
TIMESTEP_SAMPLERS: dict[str, TimestepSampler] = {law: partial(draw_timesteps, law) for law in QUANTILES}
uniform, logit_normal = TIMESTEP_SAMPLERS["uniform"], TIMESTEP_SAMPLERS["logit_normal"]
