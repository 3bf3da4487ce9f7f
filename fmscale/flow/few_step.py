"""Objectives whose networks leap: they are told a time and a length, and say where a whole stretch of the way leads.

A network is a callable (noisy_latents (B, C, H, W), t (B,), leap (B,), rows) -> velocity (B, C, H, W): the mean
velocity over the stretch from t - leap to t; over a stretch of length 0 it is the velocity itself. Text and sizes are
the callable's own, for a whole micro-batch: `rows` says to which of its images the other arguments belong, as an index
(n,), or None for all.

Which images leap is spread evenly over the slots of the global batch, so that micro-batches of one size have the same
number of them, or one more: compiled code meets two sizes. Where share · micro-batch is at least 1 each has some, and
all ranks call their networks equally often, as sharded weights need.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fmscale.errors import UserError
from fmscale.flow.loss import velocity_mse
from fmscale.flow.path import expand_like, interpolate

Network = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

SMALLEST_STEP = 1 / 128  # shortcut models: half of it is taken for a step of length 0
LEVELS = round(-math.log2(SMALLEST_STEP))  # steps of 1, 1/2, … 1/64 are learned from two of half their length


def spread_evenly(batch: int, share: float) -> Tensor:
    """Which slots of a global batch leap: i does where floor((i + 1) share) > floor(i share).

    Returns:
        Shape (batch,), bool; any n neighbours hold floor(n share) or one more.

    Raises:
        UserError: share is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise UserError(f"the share of images that leap must be within [0, 1], given {share}")
    return (torch.arange(batch + 1, dtype=torch.float64) * share).floor().diff() > 0


def draw_mean_flow(
    t: Tensor, other: Tensor, generator: torch.Generator, *, share: float = 0.25
) -> tuple[Tensor, Tensor]:
    """Stretches between two draws of t, which for most images are not gone: their t is the later one, their leap 0.

    Args:
        t: shape (B,), of the global batch.
        other: second draw from the same law, same shape.
        generator: has no part in it.
        share: of images that leap, in [0, 1].

    Returns:
        t and leap = t - r >= 0, shape (B,) each.

    Source: Geng et al. 2025, arXiv:2505.13447, sec. 4.3.
    """
    late, early = torch.maximum(t, other), torch.minimum(t, other)
    return late, torch.where(spread_evenly(len(t), share), late - early, 0.0)


def mean_flow_loss(
    network: Network,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    leap: Tensor,
    *,
    path: str = "rectified",
    teacher: Network | None = None,
    power: float = 1.0,
    floor: float = 1e-3,
) -> Tensor:
    """What a mean velocity u lacks to obey u = v - leap · du/dt, where du/dt is taken along the path's velocity v,
    with t - leap kept.

    du/dt comes without gradient, by forward differentiation of the network for the images that leap alone: its
    operations must support that (fused attention kernels do not, and are left out there).

    Args:
        network: u; called once more for the images that leap, where there are any.
        latents: shape (B, C, H, W), float32.
        noise: standard normal, same shape.
        t, leap: from `draw_mean_flow`, shape (B,).
        path: row of `PATHS`.
        teacher: has no part in it.
        power, floor: the squared error e counts as e / (e + floor)^power, the divisor without gradient; 0 is plain.

    Returns:
        Loss per image, shape (B,), float32.

    Source: Geng et al. 2025, arXiv:2505.13447, sec. 4.1 and 4.3, alg. 1.
    """
    noisy_latents, velocity = interpolate(latents, noise, t, path)
    rows = leap.nonzero().squeeze(1)
    if len(rows):
        change = _change(network, noisy_latents[rows], velocity[rows], t[rows], leap[rows], rows)
        target = velocity[rows] - expand_like(leap[rows], latents) * change
        velocity = velocity.index_copy(0, rows, target.to(velocity.dtype))
    predicted = network(noisy_latents, t, leap, None)
    error = (predicted.float() - velocity.float()).square().flatten(1).sum(dim=1)
    return error / (error.detach() + floor) ** power


@torch.no_grad()
def _change(network: Network, at: Tensor, velocity: Tensor, t: Tensor, leap: Tensor, rows: Tensor) -> Tensor:
    """du/dt: where t grows by dt the point moves by velocity · dt, and the leap grows by dt, for its end stays."""
    tangents = (velocity, torch.ones_like(t), torch.ones_like(leap))
    with sdpa_kernel(SDPBackend.MATH):
        _, change, *_ = torch.func.jvp(lambda at, t, leap: network(at, t, leap, rows), (at, t, leap), tangents)
    return change


def draw_shortcut(
    t: Tensor, other: Tensor, generator: torch.Generator, *, share: float = 0.25
) -> tuple[Tensor, Tensor]:
    """Leaps of 0 for most images; for the others 1, 1/2, … 1/64, and t put up to a whole number of such steps.

    Args:
        t: shape (B,), of the global batch.
        other: has no part in it.
        generator: on the CPU.
        share: of images that leap, in [0, 1].

    Returns:
        t and leap, shape (B,) each; t - leap >= 0.

    Source: Frans et al. 2024, arXiv:2410.12557, sec. 3.
    """
    leaping = spread_evenly(len(t), share)
    step = 0.5 ** torch.randint(0, LEVELS, (len(t),), generator=generator).to(t)
    on_grid = ((t / step).floor() + 1).clamp(max=1 / step) * step
    return torch.where(leaping, on_grid, t), torch.where(leaping, step, 0.0)


def shortcut_loss(
    network: Network,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    leap: Tensor,
    *,
    path: str = "rectified",
    teacher: Network | None = None,
) -> Tensor:
    """A leap of length 0 is the path's velocity; a longer one is what two of half its length make together.

    Args:
        network: s.
        latents: shape (B, C, H, W), float32.
        noise: standard normal, same shape.
        t, leap: from `draw_shortcut`, shape (B,).
        path: row of `PATHS`.
        teacher: takes the halves, without gradient, for instance from averaged weights; None is the network itself. It
            is called twice, for the images that leap alone, and not at all where there are none.

    Returns:
        Loss per image, shape (B,), float32.

    Source: Frans et al. 2024, arXiv:2410.12557, alg. 1, with t from data to noise.
    """
    noisy_latents, velocity = interpolate(latents, noise, t, path)
    rows = leap.nonzero().squeeze(1)
    if len(rows):
        halves = _two_halves(teacher or network, noisy_latents[rows], t[rows], leap[rows], rows)
        velocity = velocity.index_copy(0, rows, halves.to(velocity.dtype))
    return velocity_mse(network(noisy_latents, t, leap, None), velocity)


@torch.no_grad()
def _two_halves(network: Network, noisy_latents: Tensor, t: Tensor, leap: Tensor, rows: Tensor) -> Tensor:
    half = leap / 2
    told = torch.where(half > SMALLEST_STEP, half, 0.0)
    first = network(noisy_latents, t, told, rows)
    second = network(noisy_latents - expand_like(half, noisy_latents) * first, t - half, told, rows)
    return (first + second) / 2


def _sample(network: Network, noise: Tensor, times: Sequence[float], least: float) -> Tensor:
    """One leap between each two times; the network is told 0 for one of at most `least`."""
    latents = noise
    for now, then in itertools.pairwise(times):
        length = now - then
        t, leap = (torch.full((len(latents),), x, device=latents.device) for x in (now, length * (length > least)))
        latents = latents - length * network(latents, t, leap, None)
    return latents


def sample_mean_flow(network: Network, noise: Tensor, times: Sequence[float]) -> Tensor:
    """From noise to data in as many leaps as there are times, less one: `time_grid(1)` is one leap.

    Args:
        network: of `mean_flow_loss`.
        noise: where to start, shape (B, C, H, W).
        times: falling.

    Source: Geng et al. 2025, arXiv:2505.13447, alg. 2.
    """
    return _sample(network, noise, times, 0.0)


def sample_shortcut(network: Network, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Likewise with a network of `shortcut_loss`; the grid's steps should be 1, 1/2, … 1/64 long, or shorter for 0.

    Source: Frans et al. 2024, arXiv:2410.12557, alg. 2.
    """
    return _sample(network, noise, times, SMALLEST_STEP)


class FewStep(NamedTuple):
    """An objective of leaps.

    Attributes:
        draw: (t (B,), other (B,), generator, *, share) -> (t, leap), of a global batch.
        loss: (network, latents, noise, t, leap, *, path, teacher) -> loss per image (B,).
        sample: (network, noise, times) -> latents.
    """

    draw: Callable[..., tuple[Tensor, Tensor]]
    loss: Callable[..., Tensor]
    sample: Callable[[Network, Tensor, Sequence[float]], Tensor]


FEW_STEP: dict[str, FewStep] = {
    "mean_flow": FewStep(draw_mean_flow, mean_flow_loss, sample_mean_flow),
    "shortcut": FewStep(draw_shortcut, shortcut_loss, sample_shortcut),
}
