"""MeanFlow and shortcut models: what their objectives accept, and what their draws are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fmscale.errors import UserError
from fmscale.flow.few_step import (
    FEW_STEP,
    SMALLEST_STEP,
    mean_flow_loss,
    sample_mean_flow,
    shortcut_loss,
    spread_evenly,
)
from fmscale.flow.loss import velocity_mse
from fmscale.flow.noise import keyed_generator
from fmscale.flow.path import interpolate
from fmscale.flow.solver import time_grid

POINT = torch.tensor([2.0, -1.0], dtype=torch.float64)
"""All data lies here. On the rectified path the velocity is (z - POINT) / t, and the way back from (z, t) to r ends in
POINT + r (z - POINT) / t: the mean velocity is the same whatever r is, for the way is straight."""


def to_the_point(z: Tensor, t: Tensor, leap: Tensor, rows: Tensor | None) -> Tensor:
    return (z - POINT) / t[:, None]


def curved(z: Tensor, t: Tensor, leap: Tensor, rows: Tensor | None = None) -> Tensor:
    """The mean velocity over a leap that ends in t where dz/dt = -z, which makes z e^leap at its start of z at t."""
    length = leap[:, None]
    return torch.where(length > 0, z * (1 - length.exp()) / length.clamp(min=1e-12), -z)


def batch(count: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = keyed_generator("few")
    t, r = torch.rand(2, count, generator=generator, dtype=torch.float64).sort(dim=0, descending=True).values
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return POINT.expand(count, 2), noise, t + 0.01, t + 0.01 - r


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_mean_velocity_of_straight_ways_has_no_mean_flow_loss(power: float) -> None:
    latents, noise, t, leap = batch()
    assert mean_flow_loss(to_the_point, latents, noise, t, leap, power=power).max() < 1e-6
    off = mean_flow_loss(lambda *inputs: to_the_point(*inputs) + 1, latents, noise, t, leap, power=power)
    assert off.min() > 0.5


def test_the_mean_flow_target_is_v_less_the_change_along_the_way() -> None:
    """A curved mean velocity against the identity with du/dt from a difference quotient, in which the end stays."""
    latents, noise, t, leap = batch()
    z, v = interpolate(latents, noise, t)
    tiny = 1e-6
    later, earlier = (curved(z + d * v, t + d, leap + d) for d in (tiny, -tiny))
    error = (curved(z, t, leap) - v + leap[:, None] * (later - earlier) / (2 * tiny)).square().sum(dim=1).float()
    found = mean_flow_loss(curved, latents, noise, t, leap, power=0.0)
    torch.testing.assert_close(found, error, rtol=1e-4, atol=1e-6)
    adaptive = mean_flow_loss(curved, latents, noise, t, leap, power=0.5, floor=0.1)
    torch.testing.assert_close(adaptive, error / (error + 0.1).sqrt(), rtol=1e-4, atol=1e-6)


def test_the_mean_velocity_is_the_integral_of_the_velocity() -> None:
    """One leap of the curved field's mean velocity lands where the exact solution does, and so do five."""
    z = torch.randn(6, 2, generator=keyed_generator(1), dtype=torch.float64)
    for leaps in (1, 5):
        torch.testing.assert_close(sample_mean_flow(curved, z, time_grid(leaps)), z * torch.e, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FEW_STEP)
def test_a_stretch_of_length_zero_is_plain_flow_matching(name: str) -> None:
    latents, noise, t, _ = batch()
    z, v = interpolate(latents, noise, t)
    plain = velocity_mse(curved(z, t, torch.zeros_like(t)), v)
    told = {"power": 0.0} if name == "mean_flow" else {}
    found = FEW_STEP[name].loss(curved, latents, noise, t, torch.zeros_like(t), **told)
    torch.testing.assert_close(found, plain * (2 if name == "mean_flow" else 1), rtol=1e-5, atol=1e-7)  # sum, mean of 2


def test_two_halves_make_a_whole() -> None:
    """A field that leaps exactly agrees with itself; the target's halves are asked for with their own lengths."""
    latents, noise, t, _ = batch()
    t, leap = FEW_STEP["shortcut"].draw(t.clamp(max=0.99), t, keyed_generator(0), share=1.0)
    asked: list[Tensor] = []

    def network(z: Tensor, t: Tensor, leap: Tensor, rows: Tensor | None) -> Tensor:
        asked.append(leap)
        return curved(z, t, leap)

    def teacher(z: Tensor, t: Tensor, half: Tensor, rows: Tensor | None) -> Tensor:
        asked.append(half)
        return curved(z, t, torch.where(half > 0, half, SMALLEST_STEP))

    assert shortcut_loss(network, latents, noise, t, leap, teacher=teacher).max() < 1e-8
    halves = torch.where(leap / 2 > SMALLEST_STEP, leap / 2, 0)
    assert torch.equal(asked[0], halves)
    assert torch.equal(asked[1], halves)
    assert torch.equal(asked[2], leap)
    assert (halves == 0).any()
    off = shortcut_loss(lambda *inputs: network(*inputs) + 1, latents, noise, t, leap, teacher=teacher)
    assert off.min() > 0.9


def test_straight_ways_agree_with_their_halves() -> None:
    """The second half begins half a leap earlier, where the same velocity leads to the point from nearer by."""
    latents, noise, t, _ = batch()
    t, leap = FEW_STEP["shortcut"].draw(t.clamp(max=0.99), t, keyed_generator(0), share=1.0)
    assert shortcut_loss(to_the_point, latents, noise, t, leap).max() < 1e-8


@pytest.mark.parametrize("name", FEW_STEP)
def test_the_target_asks_for_the_images_that_leap_alone(name: str) -> None:
    """A network whose text is each image's own, told which images it is asked for, answers as one image at a time."""
    latents, noise, t, _ = batch(12)
    t, leap = FEW_STEP[name].draw(t.clamp(max=0.99), t / 2, keyed_generator(0), share=0.3)
    text = torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None]
    asked: list[list[int] | None] = []

    def network(z: Tensor, t: Tensor, leap: Tensor, rows: Tensor | None) -> Tensor:
        asked.append(None if rows is None else rows.tolist())
        return curved(z, t, leap) * (text if rows is None else text[rows]) ** 2

    whole = FEW_STEP[name].loss(network, latents, noise, t, leap)
    assert asked == [[3, 6, 9]] * (len(asked) - 1) + [None]
    for slot in range(12):
        one = slice(slot, slot + 1)

        def alone(z: Tensor, t: Tensor, leap: Tensor, rows: Tensor | None, one: slice = one) -> Tensor:
            return curved(z, t, leap) * text[one] ** 2

        found = FEW_STEP[name].loss(alone, latents[one], noise[one], t[one], leap[one])
        torch.testing.assert_close(found, whole[one], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", FEW_STEP)
def test_the_target_has_no_gradient(name: str) -> None:
    """Where the network is c z the target is made of c too, and yet d loss / dc = 2 (c z - target) z."""
    latents, noise, _, _ = batch()
    t, leap = torch.full((64,), 0.5, dtype=torch.float64), torch.full((64,), 0.25, dtype=torch.float64)
    c = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    told = {"power": 0.0} if name == "mean_flow" else {}
    FEW_STEP[name].loss(lambda z, t, leap, rows: c * z, latents, noise, t, leap, **told).sum().backward()
    z, v = interpolate(latents, noise, t)
    if name == "mean_flow":
        expected = 2 * ((0.5 * z - (v - 0.25 * 0.5 * v)) * z).sum()
    else:  # the mean over two dimensions; the halves: 0.5 z, then 0.5 (z - 0.125 · 0.5 z)
        expected = ((0.5 * z - (0.5 * z + 0.5 * (z - 0.125 * 0.5 * z)) / 2) * z).sum()
    assert c.grad is not None
    assert c.grad.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_adaptive_divisor_has_no_gradient() -> None:
    """Each image's gradient is the plain one, divided."""
    latents, noise, t, leap = batch()
    c = torch.full((64, 1), 0.5, dtype=torch.float64, requires_grad=True)
    plain, adaptive = (
        mean_flow_loss(lambda z, t, leap, rows: (c if rows is None else c[rows]) * z, latents, noise, t, leap, **told)
        for told in ({"power": 0.0}, {"power": 0.75, "floor": 0.1})
    )
    expected, found = (torch.autograd.grad(loss.sum(), c)[0] for loss in (plain, adaptive))
    torch.testing.assert_close(found, expected / (plain.double()[:, None] + 0.1) ** 0.75, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("micro", [1, 4, 6])
def test_leaps_are_spread_evenly_over_micro_batches(share: float, micro: int) -> None:
    counts = spread_evenly(48, share).reshape(-1, micro).sum(dim=1)
    assert counts.sum().item() == int(48 * share)
    assert set(counts.tolist()) <= {int(micro * share), int(micro * share) + (share not in (0.0, 1.0))}


def test_draws_of_mean_flow() -> None:
    t, other = torch.rand(2, 4000, generator=keyed_generator(0))
    late, leap = FEW_STEP["mean_flow"].draw(t, other, keyed_generator(1))
    assert torch.equal(late, torch.maximum(t, other))
    assert torch.equal(leap[3::4], (t - other)[3::4].abs())
    assert leap.count_nonzero() == 1000
    assert FEW_STEP["mean_flow"].draw(t, other, keyed_generator(1), share=0.0)[1].count_nonzero() == 0


def test_draws_of_shortcut() -> None:
    t = torch.rand(8000, generator=keyed_generator(0))
    t[1], t[3] = 1.0, 0.0  # both leap; a shift may round t up to 1
    found, leap = FEW_STEP["shortcut"].draw(t, t, keyed_generator(1), share=0.5)
    leaping = leap > 0
    assert torch.equal(leaping, spread_evenly(8000, 0.5))
    assert torch.equal(found[~leaping], t[~leaping])
    assert set(leap[leaping].tolist()) == {0.5**level for level in range(7)}
    whole = found[leaping] / leap[leaping]
    assert torch.equal(whole, whole.round())
    assert (whole >= 1).all()
    assert (found <= 1).all()
    assert (found - t).clamp(min=0).le(leap).all()


@pytest.mark.parametrize("name", FEW_STEP)
def test_a_share_is_a_share(name: str) -> None:
    with pytest.raises(UserError, match=r"within \[0, 1\]"):
        FEW_STEP[name].draw(torch.rand(3), torch.rand(3), keyed_generator(0), share=1.5)


@pytest.mark.parametrize("name", FEW_STEP)
@pytest.mark.parametrize("leaps", [1, 4])
def test_samplers_reach_the_point(name: str, leaps: int) -> None:
    noise = torch.randn(5, 2, generator=keyed_generator(2), dtype=torch.float64)
    found = FEW_STEP[name].sample(to_the_point, noise, time_grid(leaps))
    torch.testing.assert_close(found, POINT.expand(5, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "steps", "told"),
    [("mean_flow", 128, 1 / 128), ("shortcut", 64, 1 / 64), ("shortcut", 128, 0.0), ("shortcut", 1, 1.0)],
)
def test_samplers_tell_the_length_as_training_did(name: str, steps: int, told: float) -> None:
    asked: set[float] = set()

    def network(z: Tensor, t: Tensor, leap: Tensor, rows: Tensor | None) -> Tensor:
        asked.update(leap.tolist())
        return z

    FEW_STEP[name].sample(network, torch.ones(2, 1), time_grid(steps))
    assert asked == {told}
