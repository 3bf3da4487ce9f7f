"""Distances between clouds of features, on clouds for which they are known."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from fmscale.errors import UserError
from fmscale.evaluate import check_packages
from fmscale.quality import frechet_distance, kernel_distance, precision_recall


def cloud(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_of_a_cloud_that_is_moved_and_scaled() -> None:
    """Both covariances commute, so that the trace has a closed form in those of the samples themselves."""
    real, scale, shift = cloud(200, 3), 1.5, torch.tensor([1.0, -2.0, 0.5])
    of_means = (real.mean(dim=0) * (scale - 1) + shift).square().sum()
    of_covariances = (scale - 1) ** 2 * torch.cov(real.T).trace()
    assert frechet_distance(real, real * scale + shift) == pytest.approx((of_means + of_covariances).item(), rel=1e-5)
    assert frechet_distance(real, real.flip(0)) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_wants_more_images_than_features() -> None:
    assert frechet_distance(cloud(9, 8), cloud(8, 8, seed=1)) is None
    assert frechet_distance(cloud(9, 8), cloud(9, 8, seed=1)) is not None


def test_kernel_distance_of_two_points() -> None:
    a, b = 0.5, -2.0
    mean, spread = kernel_distance(torch.full((6, 1), a), torch.full((8, 1), b), seed=0)
    assert mean == pytest.approx((a * a + 1) ** 3 + (b * b + 1) ** 3 - 2 * (a * b + 1) ** 3)
    assert spread == 0


def test_kernel_distance_is_unbiased_and_a_function_of_its_seed() -> None:
    state = torch.get_rng_state()
    first, again, other = (kernel_distance(cloud(400, 4), cloud(400, 4, seed=1), seed) for seed in (0, 0, 1))
    assert first == again != other
    assert abs(first[0]) < 2 * first[1]  # it may be negative
    assert torch.equal(torch.get_rng_state(), state)


def test_precision_and_recall_on_a_line() -> None:
    """Real images at 0, 1, … 9, each of which has one neighbour within 1."""
    real = torch.arange(10.0)[:, None]
    assert precision_recall(real, real.clone(), 1) == (1, 1)
    assert precision_recall(real, real + 100, 1) == (0, 0)
    collapsed = torch.tensor([[4.5], [4.75], [5.0]])  # radii of 0.25: of the real ones they reach 5
    assert precision_recall(real, collapsed, 1) == (1, 0.1)
    scattered = torch.tensor([[0.5], [20.0], [30.0], [40.0]])  # 0.5 has its neighbour at 20, and reaches all
    assert precision_recall(real, scattered, 1) == (0.25, 1)


def test_precision_and_recall_of_many() -> None:
    """As the definition says, written out; more than are compared at once."""
    real, drawn = cloud(1100, 3), cloud(1050, 3, seed=1) * 1.3
    measured = precision_recall(real, drawn)
    for points, near, found in ((drawn, real, measured[0]), (real, drawn, measured[1])):
        among = np.linalg.norm(near.numpy()[:, None] - near.numpy()[None], axis=2)
        between = np.linalg.norm(points.numpy()[:, None] - near.numpy()[None], axis=2)
        assert found == pytest.approx((between <= np.sort(among, axis=1)[:, 3]).any(axis=1).mean(), abs=1e-3)
        assert 0.5 < found < 1


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_packages("matplotlib", "torchmetrics")
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(UserError, match=r"package torchmetrics: pip install 'fmscale\[evaluate\]'"):
        check_packages("matplotlib", "torchmetrics")
