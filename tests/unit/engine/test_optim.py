"""AdamW with averages: the weights of torch's AdamW, and averages by their definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fmscale.engine.optim import AdamWEMA, ema_decay, ema_name, learning_rate, parameter_groups

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}


def make_gradients(shape: tuple[int, ...], steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def test_weights_are_those_of_adamw() -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6)) for _ in range(2))
    with_ema = AdamWEMA([ours], ema_decays=(0.9,), **SETTINGS)
    without = torch.optim.AdamW([theirs], fused=True, **SETTINGS)
    for gradient in make_gradients((4, 6), steps=20):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        with_ema.step()
        without.step()
    assert torch.equal(ours, theirs)


def test_averages_are_those_of_the_definition() -> None:
    param = nn.Parameter(torch.ones(5))
    optimizer = AdamWEMA([param], ema_decays=(0.9, 0.999), **SETTINGS)
    expected = {decay: param.detach().double() for decay in (0.9, 0.999)}
    for update, gradient in enumerate(make_gradients((5,), steps=60), start=1):
        param.grad = gradient
        optimizer.step()
        for decay, average in expected.items():
            now = min(decay, (1 + update) / (10 + update))
            expected[decay] = now * average + (1 - now) * param.detach().double()
    for decay, average in expected.items():
        assert torch.allclose(optimizer.state[param][ema_name(decay)].double(), average, atol=1e-6)


def test_a_parameter_without_gradient_keeps_weight_and_average() -> None:
    still, moving = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamWEMA([still, moving], ema_decays=(0.5,), **SETTINGS)
    moving.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(still, torch.ones(3))
    assert not optimizer.state[still]
    assert not torch.equal(moving, torch.ones(3))


def test_the_decay_rises_to_its_final_value() -> None:
    decays = [ema_decay(0.99, update) for update in range(1, 2000)]
    assert decays[0] == pytest.approx(2 / 11)
    assert decays == sorted(decays)
    assert decays[-1] == 0.99


def test_vectors_have_no_weight_decay() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    matrices, vectors = parameter_groups(model, 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert [tuple(p.shape) for p in matrices["params"]] == [(3, 2)]
    assert len(vectors["params"]) == 3


@pytest.mark.parametrize(
    ("step", "schedule", "expected"),
    [
        (0, "constant", 0.1),
        (9, "constant", 1.0),
        (10, "constant", 1.0),
        (10_000, "constant", 1.0),
        (4, "cosine", 0.5),
        (10, "cosine", 1.0),
        (60, "cosine", 0.5),  # half way between the end of warm-up and step 110
        (110, "cosine", 0.0),
        (500, "cosine", 0.0),
    ],
)
def test_learning_rate(step: int, schedule: str, expected: float) -> None:
    rate = learning_rate(step, peak=1.0, warmup_steps=10, schedule=schedule, decay_steps=110)
    assert rate == pytest.approx(expected, abs=1e-12)
