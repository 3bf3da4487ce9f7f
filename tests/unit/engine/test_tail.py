"""The gradient's norm is exact at any length, and what is not finite leaves no trace in the optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fmscale.engine.optim import AdamWEMA
from fmscale.engine.tail import ROW, norm


@pytest.mark.parametrize("length", [0, 1, ROW, ROW + 1, 3 * ROW - 1, ROW**2 + 5])
def test_the_norm_of_any_length_is_that_in_float64(length: int) -> None:
    vector = torch.randn(length, generator=torch.Generator().manual_seed(0))
    assert norm(vector).item() == pytest.approx(torch.linalg.vector_norm(vector.double()).item(), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, ROW, -1])
def test_one_bad_value_makes_the_norm_bad(bad: float, place: int) -> None:
    vector = torch.ones(2 * ROW + 3)
    vector[place] = bad
    assert not norm(vector).isfinite()


def make_optimizer() -> tuple[nn.Parameter, AdamWEMA]:
    """A parameter whose moments and averages are on their way."""
    param = nn.Parameter(torch.linspace(-1, 1, 12))
    optimizer = AdamWEMA([param], ema_decays=(0.9,), lr=0.1, weight_decay=0.1)
    for step in range(3):
        param.grad = torch.cos(torch.arange(12.0) + step)
        optimizer.step()
    return param, optimizer


def test_a_step_that_is_dropped_changes_nothing() -> None:
    param, optimizer = make_optimizer()
    before = {"weight": param.detach().clone(), **{key: value.clone() for key, value in optimizer.state[param].items()}}
    param.grad = torch.full((12,), float("nan"))
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.tensor(float("nan"))
    optimizer.step()
    after = {"weight": param, **optimizer.state[param]}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_gradient_is_divided_by_its_scale() -> None:
    (ours, scaled), (theirs, plain) = make_optimizer(), make_optimizer()
    ours.grad, theirs.grad = torch.arange(12.0), torch.arange(12.0) / 4
    scaled.grad_scale, scaled.found_inf = torch.tensor(4.0), torch.zeros(())
    scaled.step()
    plain.step()
    assert torch.equal(ours, theirs)
    for key, value in plain.state[theirs].items():
        assert torch.equal(scaled.state[ours][key], value), key
