"""The way that a sample goes from noise to data, and how straight it is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fmscale.flow.solver import SOLVERS, Velocity


def trajectory(velocity: Velocity, start: Tensor, times: Sequence[float], solver: str = "heun") -> Tensor:
    """Where a solver is at each of its times.

    Args:
        velocity: the field.
        start: at the first of `times`, shape (B, C, H, W).
        times: rising or falling, n of them.
        solver: row of `SOLVERS`; one that remembers earlier steps forgets them at each.

    Returns:
        Shape (n, B, C, H, W).
    """
    points = [start]
    for now, then in itertools.pairwise(times):
        points.append(SOLVERS[solver](velocity, points[-1], [now, then]))
    return torch.stack(points)


def straightness(points: Tensor) -> Tensor:
    """How far each sample gets, over how far it goes.

    Args:
        points: of a trajectory, shape (n, B, C, H, W).

    Returns:
        Shape (B,), in [0, 1]: 1 for a straight line, or for one that stays where it is.

    Source: Liu et al. 2022, arXiv:2209.03003, sec. 2.2, why one wants it: a straight way takes one step.
    """
    steps = points.diff(dim=0).flatten(2).norm(dim=2).sum(dim=0)
    whole = (points[-1] - points[0]).flatten(1).norm(dim=1)
    return torch.where(steps > 0, whole / steps, 1.0)


def deviation(points: Tensor, times: Sequence[float]) -> Tensor:
    """How much each stretch of a way differs from the straight way, as velocity, over the speed of the straight one.

    Args:
        points: of a trajectory, shape (n, B, C, H, W).
        times: of the points, n of them.

    Returns:
        Shape (n - 1, B): 0 for a straight line at constant speed.

    Source: Liu et al. 2022, arXiv:2209.03003, eq. 3, whose integrand the square is, before it is divided.
    """
    lengths = torch.tensor(times, dtype=torch.float64, device=points.device).diff().to(points.dtype)
    velocities = points.diff(dim=0).flatten(2) / lengths[:, None, None]
    straight = (points[-1] - points[0]).flatten(1) / lengths.sum()
    return (velocities - straight).norm(dim=2) / straight.norm(dim=1)
