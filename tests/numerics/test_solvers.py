"""Solvers: order of convergence, distributions of what they draw, guidance, straightness and likelihood."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numerics.closed_forms import THREE_NORMALS
from scipy import stats
from torch import Tensor

from fmscale.errors import UserError
from fmscale.flow.likelihood import DIVERGENCES, log_likelihood
from fmscale.flow.noise import keyed_generator
from fmscale.flow.path import PATHS, begin, coefficients_like, interpolate
from fmscale.flow.solver import DIFFUSIONS, SOLVERS, check_guidance, guide, is_guided, stochastic, time_grid
from fmscale.flow.trajectory import straightness, trajectory

ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4}
MEAN, DEVIATION = 1.5, 0.4


def gaussian_velocity(z: Tensor, t: Tensor, path: str = "rectified") -> Tensor:
    """Of data N(MEAN, DEVIATION²): z keeps its place in the marginal N(alpha MEAN, (alpha DEVIATION)² + beta²)."""
    at = coefficients_like(t.double(), z, path)
    variance = (at.alpha * DEVIATION) ** 2 + at.beta**2
    rate = (at.alpha * at.alpha_rate * DEVIATION**2 + at.beta * at.beta_rate) / variance
    return at.alpha_rate * MEAN + rate * (z - at.alpha * MEAN)


def gaussian_way(z: Tensor, start: float, end: float, path: str = "rectified") -> Tensor:
    """Where the exact solution through z at `start` is at `end`."""
    places = [PATHS[path](torch.tensor(t, dtype=torch.float64)) for t in (start, end)]
    (before, after) = ((at, ((at.alpha * DEVIATION) ** 2 + at.beta**2).sqrt()) for at in places)
    return after[0].alpha * MEAN + after[1] / before[1] * (z - before[0].alpha * MEAN)


def needs(solver: str) -> None:
    if solver == "dopri5":
        pytest.importorskip("torchdiffeq", reason="an extra: fmscale[ode]")


def measured_order(errors: dict[int, float]) -> float:
    """The slope of log error by log steps."""
    return -np.polyfit(np.log(list(errors)), np.log(list(errors.values())), 1)[0]


@pytest.mark.parametrize("solver", ORDERS)
def test_measured_order_of_convergence(solver: str) -> None:
    """dz/dt = 4 t z (1 - z) is solved by z = 1 / (1 + c exp(-2 t²))."""
    start = torch.tensor([[0.3], [0.6], [0.95]], dtype=torch.float64)
    truth = 1 / (1 + (1 / start - 1) * math.exp(2))
    errors = {}
    for count in (16, 32, 64):
        found = SOLVERS[solver](lambda z, t: 4 * t.double()[:, None] * z * (1 - z), start, time_grid(count))
        errors[count] = (found - truth).abs().max().item()
    order = measured_order(errors)
    print(f"{solver}: order {order:.2f}, error {errors[64]:.1e} at 64 steps")
    assert order == pytest.approx(ORDERS[solver], abs=0.2)


@pytest.mark.parametrize("path", PATHS)
def test_measured_order_of_dpm_on_every_path(path: str) -> None:
    """On the way of a normal distribution, from t = 0.875 to 0.25."""
    start = begin(torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], path)
    errors = {}
    for count in (40, 80, 160):
        times = torch.linspace(0.875, 0.25, count + 1, dtype=torch.float32).tolist()  # as the field is told them
        found = SOLVERS["dpm"](lambda z, t: gaussian_velocity(z, t, path), start, times, path=path)
        errors[count] = (found - gaussian_way(start, times[0], times[-1], path)).abs().max().item()
    order = measured_order(errors)
    print(f"dpm on {path}: order {order:.2f}, error {errors[160]:.1e} at 160 steps")
    assert order == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("solver", ["euler", "dpm"])
def test_dpm_goes_far_in_few_steps(solver: str) -> None:
    """From noise itself to data itself in ten steps; the same number of evaluations as Euler's."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    found = SOLVERS[solver](gaussian_velocity, z, time_grid(10))
    error = (found - gaussian_way(z, 1.0, 0.0)).abs().max().item()
    print(f"{solver}: error {error:.4f} after 10 steps")
    assert error < {"euler": 0.3, "dpm": 0.06}[solver]


def test_dopri5_holds_its_tolerance_and_asks_for_nothing_beyond_the_ends() -> None:
    needs("dopri5")
    z, asked = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], []

    def field(z: Tensor, t: Tensor) -> Tensor:
        asked.append(t[0].item())
        return gaussian_velocity(z, t)

    found = SOLVERS["dopri5"](field, z, [1.0, 0.0], tolerance=1e-6)
    torch.testing.assert_close(found, gaussian_way(z, 1.0, 0.0), rtol=0, atol=1e-4)
    assert min(asked) == 0
    assert max(asked) == 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_follow_the_density(solver: str, path: str) -> None:
    needs(solver)
    noise = torch.randn(4_000, 1, generator=keyed_generator("samples"), dtype=torch.float64)
    steps = 400 if solver == "euler" else 100
    field = lambda z, t: THREE_NORMALS.velocity(z, t, path)  # noqa: E731
    found = SOLVERS[solver](field, begin(noise, path), time_grid(steps), path=path)
    test = stats.kstest(found[:, 0].numpy(), THREE_NORMALS.distribution)
    assert test.pvalue > 0.01, test


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_stochastic_samples_follow_the_density(diffusion: str, path: str) -> None:
    generator = keyed_generator("stochastic", path)
    noise = torch.randn(4_000, 1, generator=generator, dtype=torch.float64)
    field = lambda z, t: THREE_NORMALS.velocity(z, t, path)  # noqa: E731
    found = stochastic(field, begin(noise, path), time_grid(300), generator, path=path, diffusion=diffusion)
    test = stats.kstest(found[:, 0].numpy(), THREE_NORMALS.distribution)
    assert test.pvalue > 0.01, test
    again = stochastic(field, begin(noise, path), time_grid(5), keyed_generator(1), path=path, diffusion=diffusion)
    other = stochastic(field, begin(noise, path), time_grid(5), keyed_generator(1), path=path, diffusion=diffusion)
    assert torch.equal(again, other)


def test_stochastic_marginals_along_the_way_and_without_churn() -> None:
    generator = keyed_generator("along")
    noise = torch.randn(4_000, 1, generator=generator, dtype=torch.float64)
    times = [1 - 0.6 * n / 300 for n in range(301)]
    found = stochastic(THREE_NORMALS.velocity, noise, times, generator, churn=2.0)
    truth = interpolate(
        THREE_NORMALS.draw(40_000, generator), torch.randn(40_000, 1).double(), torch.full((40_000,), 0.4)
    )
    assert stats.ks_2samp(found[:, 0].numpy(), truth.noisy_latents[:, 0].numpy()).pvalue > 0.01
    still = stochastic(gaussian_velocity, noise, time_grid(20), generator, churn=0.0)
    assert torch.equal(still, SOLVERS["euler"](gaussian_velocity, noise, time_grid(20)))
    with pytest.raises(UserError, match="churn"):
        stochastic(gaussian_velocity, noise, time_grid(2), generator, churn=-1.0)


@pytest.mark.parametrize(("diffusion", "kept"), [("noise", 0.875), ("constant", 0.75)])
def test_worked_last_step_of_the_stochastic_sampler(diffusion: str, kept: float) -> None:
    """Without velocity z is all noise, its score at t = 1/4 is -4 z: z - 1/8 (g²/2) 4 z, for g² = 1/2 and 1."""
    z = torch.tensor([[2.0]], dtype=torch.float64)
    found = stochastic(lambda z, t: 0 * z, z, [0.25, 0.125], keyed_generator(0), diffusion=diffusion)
    assert found.item() == pytest.approx(2 * kept)


def test_straight_fields_are_straight() -> None:
    start = torch.randn(16, 2, 3, dtype=torch.float64)
    one_point = trajectory(lambda z, t: (z - 5) / t.double().clamp(min=1e-9)[:, None, None], start, [1, 0.7, 0.4, 0.2])
    torch.testing.assert_close(straightness(one_point), torch.ones(16, dtype=torch.float64))
    constant = trajectory(lambda z, t: torch.ones_like(z), start, time_grid(7), "euler")
    torch.testing.assert_close(straightness(constant), torch.ones(16, dtype=torch.float64))
    assert straightness(trajectory(lambda z, t: torch.zeros_like(z), start, time_grid(3))).tolist() == [1.0] * 16


def test_straightness_of_a_half_circle() -> None:
    """Diameter over half the circumference is 2 / π."""
    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    turn = torch.tensor([[0.0, -math.pi], [math.pi, 0.0]], dtype=torch.float64)
    way = trajectory(lambda z, t: z @ turn.T, start, time_grid(200), "rk4")
    assert straightness(way).item() == pytest.approx(2 / math.pi, rel=1e-4)


def test_guidance_within_an_interval() -> None:
    for t, inside in ((0.1, False), (0.2, True), (0.5, True), (0.6, True), (0.7, False)):
        for dtype in (torch.float32, torch.float64):  # 0.6 is more in float32
            assert is_guided(torch.full((2,), t, dtype=dtype), (0.2, 0.6)) == inside
    for interval in ((0.6, 0.2), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(UserError, match="interval"):
            check_guidance(interval, 0.0)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaled_guidance_has_the_spread_of_what_was_guided(rescale: float) -> None:
    towards, away = torch.randn(2, 5, 3, 4, 4, generator=keyed_generator("rescale"))
    found = guide(towards, away, 4.0, rescale)
    plain = away + 4 * (towards - away)
    spread = [part.flatten(1).std(dim=1) for part in (towards, plain, found)]
    torch.testing.assert_close(spread[2], rescale * spread[0] + (1 - rescale) * spread[1], rtol=1e-5, atol=0)
    with pytest.raises(UserError, match="rescale"):
        check_guidance((0.0, 1.0), 1.5)


COVARIANCE = torch.tensor([[1.2, 0.5, -0.2], [0.5, 0.6, 0.1], [-0.2, 0.1, 0.3]], dtype=torch.float64)
CENTRE = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def correlated_velocity(z: Tensor, t: Tensor) -> Tensor:
    """Of data N(CENTRE, COVARIANCE) on the rectified path; all t alike."""
    now = t[0].double()
    whole = (1 - now) ** 2 * COVARIANCE + now**2 * torch.eye(3).double()
    rate = now * torch.eye(3).double() - (1 - now) * COVARIANCE
    return -CENTRE + (z - (1 - now) * CENTRE) @ torch.linalg.solve(whole, rate)


@pytest.mark.parametrize("solver", ["heun", "rk4", "dopri5"])
def test_log_likelihood_of_a_gaussian(solver: str) -> None:
    needs(solver)
    truth = torch.distributions.MultivariateNormal(CENTRE, COVARIANCE)
    points = CENTRE + torch.randn(20, 3, generator=keyed_generator("points"), dtype=torch.float64)
    times = time_grid(400 if solver == "heun" else 50)[::-1]
    found = log_likelihood(correlated_velocity, points, times, solver=solver)
    torch.testing.assert_close(found, truth.log_prob(points), rtol=0, atol=1e-3)


@pytest.mark.parametrize("path", PATHS)
def test_log_likelihood_on_every_path(path: str) -> None:
    """Of the path's t = 0; the end counts as noise, from which it differs by what is left of the data."""
    at = [PATHS[path](torch.tensor(t, dtype=torch.float64)) for t in (0.0, 1.0)]
    deviation = ((at[0].alpha * DEVIATION) ** 2 + at[0].beta ** 2).sqrt()
    points = torch.linspace(0.7, 2.2, 7, dtype=torch.float64)[:, None]
    truth = torch.distributions.Normal(at[0].alpha * MEAN, deviation).log_prob(points)[:, 0]
    field = lambda z, t: gaussian_velocity(z, t, path)  # noqa: E731
    found = log_likelihood(field, points, time_grid(100)[::-1], path=path)
    left = (at[1].alpha / at[1].beta).item()
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-3 + 5 * left)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_estimates_of_the_divergence_have_no_bias(divergence: str) -> None:
    count = 2_000 if divergence != "exact" else 2
    point = torch.tensor([[0.3, -0.5, 1.7]], dtype=torch.float64)
    found = log_likelihood(
        correlated_velocity,
        point.expand(count, 3),
        time_grid(50)[::-1],
        divergence=divergence,
        generator=keyed_generator(divergence),
        solver="heun",
    )
    truth = torch.distributions.MultivariateNormal(CENTRE, COVARIANCE).log_prob(point).item()
    print(f"{divergence}: {found.mean():.4f} ± {found.std() / math.sqrt(count):.4f}, truth {truth:.4f}")
    assert found.mean().item() == pytest.approx(truth, abs=2e-3 + 4 * found.std().item() / math.sqrt(count))
    assert (found.std() > 0.05) == (divergence != "exact")


def test_more_probes_spread_less() -> None:
    points = CENTRE.expand(500, 3)
    spread = [
        log_likelihood(
            correlated_velocity,
            points,
            time_grid(20)[::-1],
            divergence="gaussian",
            probes=probes,
            generator=keyed_generator(probes),
            solver="heun",
        ).std()
        for probes in (1, 16)
    ]
    assert spread[0] / spread[1] == pytest.approx(4, rel=0.25)
    with pytest.raises(UserError, match="any solver but dpm"):
        log_likelihood(correlated_velocity, points, [0.0, 1.0], solver="dpm")
