from __future__ import annotations

import json
import math

import torch

from fmscale.guards import SETTLED_STEPS, LossGuard, slow_ranks

BINS = 4
COST = torch.tensor([1.0, 0.5, 0.3, 0.8])  # what an image of each bin costs as a rule


def feed(guard: LossGuard, steps: int, generator: torch.Generator, factor: float = 1.0) -> tuple[float, float]:
    """Steps of 16 images, whose losses scatter by a tenth; returns the last ratio and factor."""
    for _ in range(steps):
        counts = torch.bincount(torch.randint(BINS, (16,), generator=generator), minlength=BINS).float()
        losses = factor * counts * COST * (1 + 0.1 * torch.randn(BINS, generator=generator))
        ratio, weight = guard.judge(losses, counts)
    return float(ratio), float(weight)


def test_medians_settle_at_what_each_bin_costs() -> None:
    guard = LossGuard(BINS, None, torch.device("cpu"))
    ratio, weight = feed(guard, 400, torch.Generator().manual_seed(0))
    torch.testing.assert_close(guard.medians, COST, rtol=0.15, atol=0)
    assert 0.7 < ratio < 1.3
    assert weight == 1


def test_a_leap_is_dropped_and_moves_the_medians_no_further_than_any_step() -> None:
    guard, generator = LossGuard(BINS, 3.0, torch.device("cpu")), torch.Generator().manual_seed(1)
    feed(guard, SETTLED_STEPS, generator)
    before = guard.medians
    ratio, weight = feed(guard, 1, generator, factor=10)
    assert ratio > 7
    assert math.isnan(weight)
    assert (guard.medians / before).max() < 1.06
    assert feed(guard, 1, generator)[1] == 1


def test_hard_timesteps_are_no_leap() -> None:
    guard = LossGuard(BINS, 1.5, torch.device("cpu"))
    feed(guard, 2 * SETTLED_STEPS, torch.Generator().manual_seed(2))
    only_hard = torch.tensor([16.0, 0, 0, 0])  # 1.6 times what a mixed batch costs
    ratio, weight = guard.judge(only_hard * COST, only_hard)
    assert 0.7 < ratio < 1.3
    assert weight == 1


def test_nothing_is_dropped_before_the_medians_have_settled() -> None:
    guard, generator = LossGuard(BINS, 3.0, torch.device("cpu")), torch.Generator().manual_seed(3)
    feed(guard, SETTLED_STEPS - 2, generator)
    assert feed(guard, 1, generator, factor=10)[1] == 1


def test_losses_that_are_not_finite_teach_nothing() -> None:
    guard, generator = LossGuard(BINS, 3.0, torch.device("cpu")), torch.Generator().manual_seed(4)
    feed(guard, 200, generator)
    before = guard.medians.clone()
    guard.judge(torch.full((BINS,), math.nan), torch.ones(BINS))
    guard.judge(torch.zeros(BINS), torch.zeros(BINS))  # a step whose every image was damaged
    assert torch.equal(guard.medians, before)


def test_its_state_survives_a_checkpoint_to_the_bit() -> None:
    one, other = (LossGuard(BINS, 3.0, torch.device("cpu")) for _ in range(2))
    feed(one, 57, torch.Generator().manual_seed(5))
    one.medians[2] = math.nan  # a bin that no image has fallen into
    other.restore(json.loads(json.dumps(one.state(), allow_nan=False)))
    assert torch.equal(one.medians.nan_to_num(-1), other.medians.nan_to_num(-1))
    assert one.steps == other.steps


def test_slow_ranks_are_told_by_the_median_of_their_times() -> None:
    steps = [(0.0, 0.0, 0.0, 0.0), *[(1.0, 1.1, 1.0, 1.5)] * 9, (9.0, 1.0, 1.0, 1.5)]
    found = slow_ranks(steps)
    assert list(found) == [3]
    assert 1.3 < found[3] < 1.5


def test_one_rank_and_no_times_are_no_slow_ranks() -> None:
    assert slow_ranks([]) == {}
    assert slow_ranks([(0.0, 0.0)]) == {}
    assert slow_ranks([(1.0,), (2.0,)]) == {}
