"""Velocity, data and noise say the same, and their squared errors differ by a factor of t alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from fmscale.flow.path import PATHS, interpolate
from fmscale.flow.prediction import PREDICTIONS, as_velocity, convert, implied_weight

GENERATOR = torch.Generator().manual_seed(0)
LATENTS, NOISE, ERROR = torch.randn(3, 200, 5, generator=GENERATOR, dtype=torch.float64)
T = torch.linspace(0.01, 0.99, 200, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("given", "wanted"), itertools.product(PREDICTIONS, repeat=2))
def test_conversions_are_exact(path: str, given: str, wanted: str) -> None:
    point, velocity = interpolate(LATENTS, NOISE, T, path)
    says = {name: target(LATENTS, NOISE, velocity) for name, target in PREDICTIONS.items()}
    torch.testing.assert_close(convert(says[given], point, T, given, wanted, path), says[wanted], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions_are_finite_at_the_ends(path: str, prediction: str) -> None:
    t = torch.tensor([0.0, 1.0])
    latents, noise = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(1))
    point, velocity = interpolate(latents, noise, t, path)
    said = PREDICTIONS[prediction](latents, noise, velocity)
    assert all(convert(said, point, t, prediction, wanted, path).isfinite().all() for wanted in PREDICTIONS)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_implied_weight_is_the_ratio_of_squared_errors(path: str, prediction: str) -> None:
    point, velocity = interpolate(LATENTS, NOISE, T, path)
    wrong = PREDICTIONS[prediction](LATENTS, NOISE, velocity) + ERROR
    off = as_velocity(lambda z, t: wrong, prediction, path)(point, T) - velocity
    weight = implied_weight(T, prediction, path)
    torch.testing.assert_close(weight * off.square().sum(1), ERROR.square().sum(1), rtol=1e-7, atol=0)


def test_implied_weights_of_the_rectified_path() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    assert implied_weight(t, "velocity").tolist() == [1, 1, 1]
    assert implied_weight(t, "data").tolist() == [0, 0.0625, 1]
    assert implied_weight(t, "noise").tolist() == [1, 0.5625, 0]
