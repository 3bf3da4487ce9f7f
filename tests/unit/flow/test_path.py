"""Paths: their ends, their speed, and the worked numbers of courses on flow matching."""

from __future__ import annotations

import math

import pytest
import torch

from fmscale.errors import UserError
from fmscale.flow.path import PATHS, VE_SIGMAS, begin, input_scale, interpolate

ENDS = {  # alpha and beta at t = 0 and at t = 1
    "rectified": ((1, 0), (0, 1)),
    "cosine": ((1, 0), (0, 1)),
    "variance_preserving": ((0.999945, 0.010485), (0.006571, 0.999978)),
    "variance_exploding": ((1, 0.01), (1, 50)),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_finite_and_as_stated(path: str, dtype: torch.dtype) -> None:
    at = PATHS[path](torch.tensor([0.0, 1.0], dtype=dtype))
    assert all(part.dtype == dtype and part.isfinite().all() for part in (*at, at.turning))
    for place, (alpha, beta) in enumerate(ENDS[path]):
        assert at.alpha[place].item() == pytest.approx(alpha, abs=1e-6)
        assert at.beta[place].item() == pytest.approx(beta, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_rates_are_derivatives_and_the_path_turns_one_way(path: str) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64, requires_grad=True)
    at = PATHS[path](t)
    for value, rate in ((at.alpha, at.alpha_rate), (at.beta, at.beta_rate)):
        slope = torch.autograd.grad((value + 0 * t).sum(), t, retain_graph=True)[0]
        torch.testing.assert_close(slope, rate, rtol=1e-9, atol=1e-9)
    assert (at.turning > 0).all()
    assert (at.beta.diff() > 0).all()
    assert (at.alpha.diff() <= 0).all()


@pytest.mark.parametrize("path", ["cosine", "variance_preserving"])
def test_variance_is_preserved(path: str) -> None:
    at = PATHS[path](torch.linspace(0, 1, 101, dtype=torch.float64))
    torch.testing.assert_close(at.alpha**2 + at.beta**2, torch.ones(101, dtype=torch.float64))


@pytest.mark.parametrize(
    ("data", "noise", "t", "point", "velocity"),
    [  # theirs run from noise at 0 to data at 1: t and the velocity's sign are turned round
        ([3.0], [0.7], 0.75, [1.275], [-2.3]),
        ([3.0], [0.7], 0.5, [1.85], [-2.3]),
        ([3.0], [0.7], 0.25, [2.425], [-2.3]),
        ([3.0, -1.0], [0.5, 0.8], 0.6, [1.5, 0.08], [-2.5, 1.8]),
        ([5.0], [-0.8], 0.7, [0.94], [-5.8]),
        ([2.0], [-0.3], 0.29, [1.333], [-2.3]),
        ([-1.0], [1.5], 0.88, [1.2], [2.5]),
        ([5.0], [0.2], 0.15, [4.28], [-4.8]),
        ([2.0], [-1.1], 0.67, [-0.077], [-3.1]),
        ([-1.0], [0.8], 0.45, [-0.19], [1.8]),
        ([3.0], [0.4], 0.5, [1.7], [-2.6]),
    ],
)
def test_worked_numbers_of_the_straight_path(
    data: list[float], noise: list[float], t: float, point: list[float], velocity: list[float]
) -> None:
    found = interpolate(torch.tensor([data]), torch.tensor([noise]), torch.tensor([t]))
    assert found.noisy_latents[0].tolist() == pytest.approx(point, abs=1e-6)
    assert found.velocity[0].tolist() == pytest.approx(velocity, abs=1e-6)


@pytest.mark.parametrize(("t", "snr"), [(0.9, 0.012), (0.7, 0.184), (0.5, 1.0), (0.3, 5.444), (0.1, 81.0)])
def test_worked_signal_to_noise_ratios(t: float, snr: float) -> None:
    at = PATHS["rectified"](torch.tensor(t, dtype=torch.float64))
    assert (at.alpha / at.beta).square().item() == pytest.approx(snr, abs=5e-4)


def test_worked_target_of_the_cosine_path() -> None:
    """At 0.4 of the way from noise: sin(0.2 π) data + cos(0.2 π) noise, and their derivatives."""
    found = interpolate(torch.tensor([[3.0]]), torch.tensor([[0.7]]), torch.tensor([0.6]), "cosine")
    sine, cosine = math.sin(0.2 * math.pi), math.cos(0.2 * math.pi)
    assert found.noisy_latents.item() == pytest.approx(3 * sine + 0.7 * cosine, rel=1e-6)
    assert -found.velocity.item() == pytest.approx(math.pi / 2 * (3 * cosine - 0.7 * sine), rel=1e-6)


def test_the_rectified_path_is_what_it_always_was_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 64, 4, 8, 8, generator=generator)
    t = torch.rand(64, generator=generator)
    found = interpolate(latents, noise, t)
    share = t[:, None, None, None]
    assert torch.equal(found.noisy_latents, (1 - share) * latents + share * noise)
    assert torch.equal(found.velocity, noise - latents)


@pytest.mark.parametrize("path", PATHS)
def test_bandwidth_spreads_points_around_the_mean_and_leaves_the_velocity(path: str) -> None:
    latents, noise = torch.full((20_000, 1), 2.0), torch.full((20_000, 1), -1.0)
    t, jitter = torch.full((20_000,), 0.3), torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    sharp, spread = interpolate(latents, noise, t, path), interpolate(latents, noise, t, path, 0.2, jitter)
    offset = spread.noisy_latents - sharp.noisy_latents
    assert offset.mean().item() == pytest.approx(0, abs=0.005)
    assert offset.std().item() == pytest.approx(0.2, rel=0.02)
    assert torch.equal(spread.velocity, sharp.velocity)
    assert torch.equal(interpolate(latents, noise, t, path, 0.0, jitter).noisy_latents, sharp.noisy_latents)
    for sigma, given in ((0.2, None), (-0.1, jitter)):
        with pytest.raises(UserError, match="sigma"):
            interpolate(latents, noise, t, path, sigma, given)


def test_where_sampling_begins_and_how_input_is_scaled() -> None:
    noise, t = torch.ones(3), torch.linspace(0, 1, 1001)
    assert torch.equal(begin(noise), noise)
    assert begin(noise, "variance_exploding").tolist() == pytest.approx([VE_SIGMAS[1]] * 3)
    assert torch.equal(input_scale(t), torch.ones(1001))
    assert input_scale(torch.tensor([1.0]), "variance_exploding").item() == pytest.approx(1 / math.sqrt(2501))
