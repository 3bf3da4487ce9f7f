"""Closed forms and round trips of the flow mathematics."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from fmscale.errors import UserError
from fmscale.flow.coupling import NOISE_KEY, independent, paired
from fmscale.flow.loss import draw_dropped, velocity_huber, velocity_mse
from fmscale.flow.noise import draw_noise, keyed_generator
from fmscale.flow.path import interpolate
from fmscale.flow.solver import SOLVERS, euler, guide, heun, time_grid
from fmscale.flow.timesteps import TIMESTEP_SAMPLERS, logit_normal, shift_timesteps, uniform


def test_the_path_ends_in_data_and_in_noise() -> None:
    latents, noise = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    at_data = interpolate(latents, noise, torch.zeros(2))
    at_noise = interpolate(latents, noise, torch.ones(2))
    assert torch.equal(at_data.noisy_latents, latents)
    assert torch.equal(at_noise.noisy_latents, noise)
    assert torch.equal(at_data.velocity, noise - latents)


def test_worked_number_of_the_straight_path() -> None:
    """Data 3, noise 0.7: at one quarter of noise, 0.75 · 3 + 0.25 · 0.7 = 2.425, and the slope is -2.3 everywhere."""
    sample = interpolate(torch.tensor([[3.0]]), torch.tensor([[0.7]]), torch.tensor([0.25]))
    assert sample.noisy_latents.item() == pytest.approx(2.425)
    assert sample.velocity.item() == pytest.approx(-2.3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_following_the_velocity_leads_back_to_data(solver: str) -> None:
    if solver == "dopri5":
        pytest.importorskip("torchdiffeq", reason="an extra: fmscale[ode]")
    latents, noise = torch.randn(4, 2, 3, 3, dtype=torch.float64), torch.randn(4, 2, 3, 3, dtype=torch.float64)
    velocity = interpolate(latents, noise, torch.rand(4, dtype=torch.float64)).velocity
    found = SOLVERS[solver](lambda _, __: velocity, noise, time_grid(3))
    assert torch.allclose(found, latents, atol=1e-12)


def test_logit_normal_has_its_density() -> None:
    t = logit_normal(20_000, keyed_generator(1), mean=0.5, std=0.6)
    assert t.dtype == torch.float32
    assert 0 < t.min() < t.max() < 1
    assert stats.kstest(torch.logit(t.double()).numpy(), stats.norm(0.5, 0.6).cdf).pvalue > 0.01


def test_uniform_is_uniform() -> None:
    assert stats.kstest(uniform(20_000, keyed_generator(2)).numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
def test_samplers_are_functions_of_their_generator(name: str) -> None:
    first, again, other = (
        TIMESTEP_SAMPLERS[name](64, keyed_generator("t", key), mean=0.0, std=1.0) for key in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_logit_normal_refuses_a_std_of_zero() -> None:
    with pytest.raises(UserError, match="std must be above 0"):
        logit_normal(3, keyed_generator(0), std=0.0)


def test_shift_closed_form() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_timesteps(t, 3.0)
    assert shifted[[0, -1]].tolist() == [0, 1]
    assert shifted[5].item() == pytest.approx(0.75)  # 3 · 0.5 / (1 + 2 · 0.5)
    assert torch.allclose(shift_timesteps(shifted, 1 / 3), t)
    assert torch.equal(shift_timesteps(t, 1.0), t)
    with pytest.raises(UserError, match="above 0"):
        shift_timesteps(t, 0.0)


def test_shift_moves_the_signal_to_noise_ratio_by_its_square() -> None:
    """Esser et al., sec. 5.3.2: the log of (1 - t) / t falls by log α."""
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    moved = torch.logit(shift_timesteps(t, 2.5)) - torch.logit(t)
    assert torch.allclose(moved, torch.full_like(t, math.log(2.5)))


def test_loss_is_a_mean_per_image() -> None:
    predicted, target = torch.zeros(3, 2, 2, 2), torch.stack([torch.full((2, 2, 2), float(i)) for i in range(3)])
    assert velocity_mse(predicted.bfloat16(), target).tolist() == [0.0, 1.0, 4.0]


def test_worked_loss() -> None:
    """Data 5, noise -0.8: the velocity is -5.8, and a network that says -4.2 is off by 1.6² = 2.56."""
    velocity = interpolate(torch.tensor([[5.0]]), torch.tensor([[-0.8]]), torch.tensor([0.7])).velocity
    assert velocity_mse(torch.tensor([[-4.2]]), velocity).item() == pytest.approx(2.56)


@pytest.mark.parametrize("encoders", [1, 2, 3])
def test_a_share_of_images_loses_all_text(encoders: int) -> None:
    dropped = draw_dropped(200_000, encoders, 0.1, keyed_generator("dropout", encoders))
    assert dropped.all(dim=1).float().mean().item() == pytest.approx(0.1, abs=0.003)
    assert dropped.float().mean().item() == pytest.approx(0.1 ** (1 / encoders), abs=0.003)


def test_no_dropout_and_full_dropout() -> None:
    assert not draw_dropped(100, 3, 0.0, keyed_generator(0)).any()
    assert draw_dropped(100, 3, 1.0, keyed_generator(0)).all()


def test_noise_depends_on_its_key_alone() -> None:
    assert torch.equal(draw_noise((4, 8, 8), "noise", 0, 5, 2), draw_noise((4, 8, 8), "noise", 0, 5, 2))
    assert not torch.equal(draw_noise((4, 8, 8), "noise", 0, 5, 2), draw_noise((4, 8, 8), "noise", 0, 52))
    values = draw_noise((100_000,), "many").numpy()
    assert stats.kstest(values, "norm").pvalue > 0.01


def test_couplings() -> None:
    key = ["reflow", 7, 3]
    assert torch.equal(paired((2, 4, 4), lambda: {NOISE_KEY: key}, (0, 1, 2)), draw_noise((2, 4, 4), *key))
    assert torch.equal(independent((2, 4, 4), dict, (0, 1, 2)), draw_noise((2, 4, 4), "noise", 0, 1, 2))
    with pytest.raises(UserError, match="fmscale reflow"):
        paired((2, 4, 4), dict, (0, 1, 2))


@pytest.mark.parametrize(("solve", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(solve: object, order: int) -> None:
    """dx/dt = -x from t = 1 to 0: x(0) = e · x(1). Halving the step divides the error by 2^order."""
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = [abs(solve(lambda x, _: -x, start, time_grid(n)).item() - math.e) for n in (40, 80)]  # type: ignore[operator]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05)


def test_heun_integrates_a_quadratic_field_in_time_as_the_trapezoid_rule() -> None:
    """∫ 3t² from 1 to 0 is -1; the trapezoid rule with n steps errs by 1 / (2 n²)."""
    found = heun(lambda x, t: 3 * (t**2).reshape(-1, 1, 1, 1).double(), torch.ones(1, 1, 1, 1).double(), time_grid(10))
    assert found.item() == pytest.approx(-1 / 200, abs=1e-6)


def test_guidance_is_linear() -> None:
    for scale, value in ((0.0, -1.0), (1.0, 1.0), (3.0, 5.0)):
        assert guide(torch.ones(1), -torch.ones(1), scale).item() == value


def test_time_grid() -> None:
    assert time_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert time_grid(2, shift=3.0) == pytest.approx([1.0, 0.75, 0.0])
    with pytest.raises(UserError, match="at least one step"):
        time_grid(0)


def test_huber_is_the_square_below_its_width_and_the_root_above() -> None:
    predicted, velocity = torch.zeros(3, 1, 2, 2), torch.tensor([0.0, 1e-4, 3.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    found = velocity_huber(predicted, velocity, 0.01).tolist()
    assert found == pytest.approx([0.0, 1e-8 / 0.02, 3 - 0.01], rel=1e-2, abs=1e-9)
