"""What the conditional targets of each path average to is the marginal velocity, where that is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from numerics.closed_forms import THREE_NORMALS, TWO_POINTS, Mixture

from fmscale.flow.path import PATHS, interpolate
from fmscale.flow.prediction import convert

T = [0.05, 0.3, 0.5, 0.8, 0.99]


def averaged(target: Mixture, z: float, t: float, path: str) -> float:
    """The targets that `interpolate` gives at z, over all data that can be there, weighed by how likely each is."""
    if target.deviations.max() == 0:
        data, prior = target.means, target.weights
    else:
        data = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
        prior = target.log_density(data[:, None]).exp()
    times = torch.full((len(data),), t, dtype=torch.float64)
    at = PATHS[path](times)
    noise = (z - at.alpha * data) / at.beta  # the only one that leads from this data to z
    point, velocity = interpolate(data[:, None], noise[:, None], times, path)
    torch.testing.assert_close(point, torch.full_like(point, z), rtol=1e-9, atol=1e-9)
    likely = (prior.log() - noise**2 / 2).softmax(dim=0)
    return (likely * velocity[:, 0]).sum().item()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", [TWO_POINTS, THREE_NORMALS], ids=["two points", "three normals"])
def test_targets_average_to_the_marginal_velocity(path: str, target: Mixture) -> None:
    for t in T:
        for z in (-2.0, -0.3, 0.0, 1.0, 2.4):
            exact = target.velocity(torch.tensor([[z]], dtype=torch.float64), torch.tensor([t]).double(), path).item()
            assert averaged(target, z, t, path) == pytest.approx(exact, rel=1e-6, abs=1e-6), (t, z)


@pytest.mark.parametrize("path", PATHS)
def test_two_points_in_their_own_closed_form(path: str) -> None:
    """E[data | z] = a tanh(a alpha z / beta²) for points at -a and a."""
    z, t = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([0.6], dtype=torch.float64)
    at = PATHS[path](t)
    data = 3 * torch.tanh(3 * at.alpha * z / at.beta**2)
    torch.testing.assert_close(convert(data, z, t, "data", "velocity", path), TWO_POINTS.velocity(z, t, path))


@pytest.mark.parametrize(
    ("distance", "z", "velocity"),
    [
        (3.0, 1.0, -4 + 12 / (1 + math.exp(12))),  # -8 and 4 towards data, of weights exp(-12.5) and exp(-0.5)
        (2.0, 0.0, 0.0),  # both pull alike
        (2.0, 0.5, -3 + 8 / (1 + math.exp(4))),  # -5 and 3 towards data, of weights exp(-4.5) and exp(-0.5)
    ],
)
def test_worked_marginal_velocities(distance: float, z: float, velocity: float) -> None:
    """The straight path at t = 1/2 between noise and two points."""
    target = Mixture([0.5, 0.5], [-distance, distance], [0.0, 0.0])
    assert averaged(target, z, 0.5, "rectified") == pytest.approx(velocity, abs=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_targets_of_random_pairs_average_to_the_marginal_velocity(path: str) -> None:
    """Over drawn pairs, what the marginal velocity leaves of the targets is uncorrelated with any function of z."""
    generator = torch.Generator().manual_seed(0)
    data = THREE_NORMALS.draw(400_000, generator)
    noise = torch.randn(data.shape, generator=generator, dtype=torch.float64)
    t = torch.full((len(data),), 0.6, dtype=torch.float64)
    point, velocity = interpolate(data, noise, t, path)
    off = velocity - THREE_NORMALS.velocity(point, t, path)
    for test in (torch.ones_like(point), point, point.sign(), torch.cos(2 * point)):
        product = off * test
        assert abs(product.mean().item()) < 4 * product.std().item() / math.sqrt(len(product))
