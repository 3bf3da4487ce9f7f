"""Weights by t: closed forms, ends, and what they mean for another prediction."""

from __future__ import annotations

import math

import pytest
import torch

from fmscale.errors import UserError
from fmscale.flow.path import PATHS
from fmscale.flow.prediction import PREDICTIONS, implied_weight
from fmscale.flow.weights import WEIGHTS

T = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weights_are_finite_and_not_negative(name: str, path: str, prediction: str) -> None:
    weight = WEIGHTS[name](torch.tensor([0.0, 0.5, 1.0]), path, prediction)
    assert weight.shape == (3,)
    assert weight.dtype == torch.float32
    assert weight.isfinite().all()
    assert (weight >= 0).all()
    assert weight[1] > 0


@pytest.mark.parametrize("path", ["cosine", "variance_preserving"])
def test_min_snr_is_the_paper_s_for_each_prediction(path: str) -> None:
    """min(SNR, γ) for data, over SNR for noise; over SNR + 1 for velocity, whose unit is the angle's, not t's."""
    at = PATHS[path](T)
    snr = (at.alpha / at.beta).square()
    capped = snr.clamp(max=5)
    torch.testing.assert_close(WEIGHTS["min_snr"](T, path, "data"), capped)
    torch.testing.assert_close(WEIGHTS["min_snr"](T, path, "noise"), capped / snr)
    torch.testing.assert_close(WEIGHTS["min_snr"](T, path, "velocity") * at.turning**2, capped / (snr + 1))


@pytest.mark.parametrize("name", ["snr", "min_snr"])
@pytest.mark.parametrize("path", PATHS)
def test_signal_to_noise_weights_train_the_same_whatever_is_predicted(name: str, path: str) -> None:
    by_velocity = [WEIGHTS[name](T, path, says) * implied_weight(T, says, path) for says in PREDICTIONS]
    for other in by_velocity[1:]:
        torch.testing.assert_close(other, by_velocity[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_snr_is_the_plain_loss_of_noise(path: str) -> None:
    torch.testing.assert_close(WEIGHTS["snr"](T, path, "noise"), torch.ones_like(T))
    torch.testing.assert_close(WEIGHTS["min_snr"](T, path, "noise", gamma=math.inf), torch.ones_like(T))


@pytest.mark.parametrize("name", ["none", "data_end", "noise_end", "cosmap"])
def test_weights_of_mean_one(name: str) -> None:
    t = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert WEIGHTS[name](t).mean().item() == pytest.approx(1, abs=1e-6)


def test_closed_forms() -> None:
    t = torch.tensor([0.25])
    assert WEIGHTS["data_end"](t).item() == pytest.approx(3 * 0.5625)
    assert WEIGHTS["noise_end"](t).item() == pytest.approx(3 * 0.0625)
    assert WEIGHTS["sigma_sqrt"](t).item() == pytest.approx(16)
    assert WEIGHTS["sigma_sqrt"](torch.tensor([0.0])).item() == pytest.approx(1e6)
    with pytest.raises(UserError, match="gamma must be above 0"):
        WEIGHTS["min_snr"](t, gamma=0.0)
