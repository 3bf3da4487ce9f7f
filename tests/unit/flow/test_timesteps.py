"""Laws of t: each quantile function against its density, free and stratified."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from fmscale.errors import UserError
from fmscale.flow.noise import keyed_generator
from fmscale.flow.solver import euler, time_grid
from fmscale.flow.timesteps import (
    QUANTILES,
    SHIFTS,
    TIMESTEP_SAMPLERS,
    Shape,
    flux_shift,
    resolve_shift,
    shift_timesteps,
    sqrt_shift,
    stratify,
)

DENSITIES: dict[str, tuple[dict[str, float], Callable[[float], float]]] = {
    "uniform": ({}, lambda t: 1.0),
    "logit_normal": (
        {"mean": 0.5, "std": 0.6},
        lambda t: stats.norm(0.5, 0.6).pdf(math.log(t / (1 - t))) / (t * (1 - t)),
    ),
    "cosmap": ({}, lambda t: 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)),
    "beta": ({"a": 2.5, "b": 0.7}, stats.beta(2.5, 0.7).pdf),
    "u_shaped": ({"steepness": 3.0}, lambda t: 3 * math.cosh(3 * (t - 0.5)) / (2 * math.sinh(1.5))),
}


@pytest.mark.parametrize("law", DENSITIES)
def test_quantiles_belong_to_their_densities(law: str) -> None:
    shape, density = DENSITIES[law]
    u = torch.tensor([0.02, 0.1, 0.35, 0.5, 0.8, 0.97], dtype=torch.float64)
    for share, t in zip(u.tolist(), QUANTILES[law](u, Shape(**shape)).tolist(), strict=True):
        assert integrate.quad(density, 0, t)[0] == pytest.approx(share, abs=1e-7)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 1.75])
def test_mode_is_the_paper_s_function_of_a_uniform_number(scale: float) -> None:
    """Esser et al., eq. 20: 1 - u - s (cos²(π u / 2) - 1 + u), which falls with u."""
    u = torch.linspace(0, 1, 201, dtype=torch.float64)
    theirs = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    ours = QUANTILES["mode"](u, Shape(scale=scale))
    torch.testing.assert_close(ours, theirs.flip(0), rtol=0, atol=1e-12)
    assert (ours.diff() >= 0).all()
    assert ours[[0, -1]].tolist() == pytest.approx([0, 1])


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("law", [law for law in QUANTILES if law != "steps"])
def test_draws_follow_the_law(law: str, stratified: bool) -> None:
    t = TIMESTEP_SAMPLERS[law](5_000, keyed_generator("law", 2), stratified=stratified)
    assert t.dtype == torch.float32
    assert 0 <= t.min() < t.max() < 1
    grid = torch.linspace(1e-6, 1 - 1e-6, 200_001, dtype=torch.float64)
    quantiles = QUANTILES[law](grid, Shape()).numpy()
    found = stats.kstest(t.double().numpy(), lambda values: np.interp(values, quantiles, grid.numpy()))
    assert found.pvalue > 0.01
    if stratified:
        assert found.statistic <= 1 / 5_000 + 1e-4  # no free draw of 5,000 comes as near


@pytest.mark.parametrize("batch", [1, 7, 256])
@pytest.mark.parametrize("law", QUANTILES)
def test_each_stratum_has_one(law: str, batch: int) -> None:
    t = TIMESTEP_SAMPLERS[law](batch, keyed_generator("strata", batch), stratified=True).double().sort().values
    edges = QUANTILES[law](torch.arange(1, batch, dtype=torch.float64) / batch, Shape())
    assert (t[:-1] <= edges + 1e-6).all()
    assert (t[1:] >= edges - 1e-6).all()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_are_the_times_at_which_an_euler_sampler_asks(steps: int) -> None:
    """A network that is right there, and nowhere else, leads each noise of a pair to its data."""
    latents, noise = torch.randn(2, 3, 1, 2, 2, generator=keyed_generator("pairs"))
    t = TIMESTEP_SAMPLERS["steps"](100, keyed_generator("steps"), steps=steps)
    learned = set((t.unique() * steps).round().long().tolist())
    assert learned == set(range(1, steps + 1))
    assert ((t * steps).round() / steps - t).abs().max() < 1e-6

    def velocity(noisy_latents: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        assert round(at[0].item() * steps, 5) in learned
        return noise - latents

    torch.testing.assert_close(euler(velocity, noise, time_grid(steps)), latents)


def test_strata_are_in_random_order_and_whole() -> None:
    u = stratify(64, keyed_generator(0))
    assert sorted((u * 64).long().tolist()) == list(range(64))
    assert (u * 64).long().tolist() != list(range(64))


def test_free_draws_of_runs_that_have_begun_stay_as_they_are() -> None:
    drawn = TIMESTEP_SAMPLERS["uniform"](256, keyed_generator("t", 0, 5), mean=0.3, std=0.7)
    assert torch.equal(drawn, torch.rand(256, generator=keyed_generator("t", 0, 5)))
    drawn = TIMESTEP_SAMPLERS["logit_normal"](256, keyed_generator("t", 0, 5), mean=0.3, std=0.7)
    assert torch.equal(drawn, torch.sigmoid(0.3 + 0.7 * torch.randn(256, generator=keyed_generator("t", 0, 5))))


def test_shift_takes_quantiles_to_quantiles() -> None:
    """Shifted cosmap at its median is the shift of one half."""
    median = QUANTILES["cosmap"](torch.tensor(0.5, dtype=torch.float64), Shape())
    assert shift_timesteps(median, 3.0).item() == pytest.approx(0.75)


@pytest.mark.parametrize("tokens", [256, 1024, 2000, 4096, 6400])
def test_flux_s_shift_is_the_one_of_diffusers(tokens: int) -> None:
    """The sigmas of its scheduler, told mu as the pipeline tells it, are an even grid under our shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    grid = np.linspace(1, 1 / 28, 28)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=grid, mu=calculate_shift(tokens))  # 0.5 at 256 tokens, 1.15 at 4096, by default
    ours = shift_timesteps(torch.from_numpy(grid), resolve_shift("flux", tokens, 256))
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), ours, rtol=0, atol=1e-6)


def test_shifts_of_a_resolution() -> None:
    assert flux_shift(256) == pytest.approx(math.exp(0.5))
    assert flux_shift(4096) == pytest.approx(math.exp(1.15))
    assert sqrt_shift(4096, 256) == pytest.approx(4)  # 1024 px against 256 px
    assert resolve_shift("sqrt", 1024, 256) == pytest.approx(2)
    assert resolve_shift(3, 1024, 256) == 3.0
    assert {name: resolve_shift(name, 256, 256) for name in SHIFTS} == {"sqrt": 1.0, "flux": flux_shift(256)}
    with pytest.raises(UserError, match="one of sqrt, flux, given 'sqrd'"):
        resolve_shift("sqrd", 1024, 256)


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0, 16.0])
def test_the_root_of_the_ratio_keeps_what_can_be_told_of_a_constant_image(ratio: float) -> None:
    """n values c, noised: their mean tells c up to t / (1 - t) / sqrt(n), the same at t for n and shifted for m."""
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    later = shift_timesteps(t, sqrt_shift(round(1024 * ratio), 1024))
    torch.testing.assert_close(later / (1 - later) / math.sqrt(ratio), t / (1 - t))


@pytest.mark.parametrize(
    ("law", "shape", "message"),
    [
        ("logit_normal", {"std": 0.0}, "std must be above 0"),
        ("mode", {"scale": 1.76}, "scale must be from -1 to 1.7519"),
        ("beta", {"a": -1.0}, "a and b must be above 0"),
        ("u_shaped", {"steepness": 0.0}, "steepness must be above 0"),
    ],
)
@pytest.mark.parametrize("stratified", [False, True])
def test_shapes_out_of_range_are_refused(law: str, shape: dict[str, float], message: str, stratified: bool) -> None:
    with pytest.raises(UserError, match=message):
        TIMESTEP_SAMPLERS[law](4, keyed_generator(0), stratified=stratified, **shape)
