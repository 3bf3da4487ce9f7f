"""How far a way is from the straight one, at each place of it."""

from __future__ import annotations

import math

import pytest
import torch

from fmscale.flow.trajectory import deviation, trajectory


def test_deviation_of_a_straight_way() -> None:
    start = torch.randn(4, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = [1.0, 0.7, 0.2, 0.0]  # no even steps: velocities, not lengths, are compared
    points = trajectory(lambda z, t: torch.ones_like(z), start, times)
    torch.testing.assert_close(deviation(points, times), torch.zeros(3, 4, dtype=torch.float64))


def test_deviation_of_a_half_circle() -> None:
    """Half a turn at speed pi, while the straight way is 2 long: along it in the middle, across it at the ends."""
    times = torch.linspace(1, 0, 2001, dtype=torch.float64)
    angle = math.pi * (1 - times)
    points = torch.stack([angle.cos(), angle.sin()], dim=1).reshape(-1, 1, 2, 1, 1)
    found = deviation(points, times.tolist())[:, 0]
    assert found[1000].item() == pytest.approx((math.pi - 2) / 2, rel=1e-3)
    assert found[0].item() == pytest.approx(math.hypot(math.pi, 2) / 2, rel=1e-3)
