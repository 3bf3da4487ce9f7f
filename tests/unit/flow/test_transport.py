"""Minibatch optimal transport: least cost, no part for slots that weigh nothing, a plan that is drawn from."""

from __future__ import annotations

import itertools

import pytest
import torch

from fmscale.errors import UserError
from fmscale.flow.noise import keyed_generator
from fmscale.flow.transport import TRANSPORTS, exact, sinkhorn_plan, squared_distances, transport


def pair(batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, 3, generator=generator), torch.randn(batch, 2, 3, generator=generator)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 6])
def test_exact_is_the_best_of_all_permutations(batch: int) -> None:
    for seed in range(10):
        latents, noise = pair(batch, seed)
        costs = {
            order: (latents - noise[list(order)]).square().sum().item()
            for order in itertools.permutations(range(batch))
        }
        assert tuple(transport("exact", latents, noise).tolist()) == min(costs, key=costs.__getitem__)


def test_squared_distances() -> None:
    cost = squared_distances(torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 4.0], [3.0, 1.0]]))
    torch.testing.assert_close(cost, torch.tensor([[16.0, 10.0], [25.0, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize("method", TRANSPORTS)
def test_slots_that_weigh_nothing_take_no_part(method: str) -> None:
    if method == "sinkhorn":
        pytest.importorskip("ot", reason="POT is an extra: fmscale[ot]")
    latents, noise = pair(12)
    weight = torch.ones(12)
    weight[[2, 7, 11]] = 0
    latents[2] = torch.nan  # a damaged sample
    chosen = transport(method, latents, noise, weight, torch.Generator().manual_seed(0))
    assert chosen[[2, 7, 11]].tolist() == [2, 7, 11]
    live = (weight > 0).nonzero().squeeze(1)
    assert set(chosen[live].tolist()) <= set(live.tolist())
    assert chosen[live].tolist() != live.tolist()
    alone = transport(method, latents[live], noise[live], generator=torch.Generator().manual_seed(0))
    assert torch.equal(chosen[live], live[alone])


@pytest.mark.parametrize("live", [0, 1])
def test_nobody_to_trade_with(live: int) -> None:
    weight = torch.zeros(4)
    weight[:live] = 1
    assert transport("exact", *pair(4), weight).tolist() == [0, 1, 2, 3]


def test_pairs_are_drawn_from_the_entropic_plan() -> None:
    pytest.importorskip("ot", reason="POT is an extra: fmscale[ot]")
    latents, noise = pair(5)
    plan = sinkhorn_plan(squared_distances(latents, noise), 0.2)
    torch.testing.assert_close(plan.sum(dim=0), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-4)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([transport("sinkhorn", latents, noise, None, generator, blur=0.2) for _ in range(800)])
    shares = torch.stack([(drawn == column).double().mean(dim=0) for column in range(5)], dim=1)
    torch.testing.assert_close(shares, plan, rtol=0, atol=0.07)  # 4 standard deviations


def test_little_blur_is_the_exact_plan_and_much_is_none() -> None:
    pytest.importorskip("ot", reason="POT is an extra: fmscale[ot]")
    cost = squared_distances(*pair(8))
    assert torch.equal(sinkhorn_plan(cost, 0.003).argmax(dim=1), exact(cost))
    torch.testing.assert_close(sinkhorn_plan(cost, 1e4), torch.full_like(cost, 1 / 8), rtol=1e-3, atol=0)
    with pytest.raises(UserError, match="blur must be above 0"):
        sinkhorn_plan(cost, 0.0)


def test_latents_that_are_not_finite_keep_their_noise() -> None:
    latents, noise = torch.randn(2, 6, 1, 2, 2, generator=keyed_generator("broken"))
    latents[2, 0, 0, 0] = float("nan")
    chosen = transport("exact", latents, noise)
    assert chosen[2] == 2
    assert sorted(chosen.tolist()) == list(range(6))
