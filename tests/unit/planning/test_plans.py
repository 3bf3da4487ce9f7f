"""Memory, time and advice of plans: by closed forms, by their own edges, and on the published networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fmscale.config import TrainConfig, load
from fmscale.engine.collectives import Collective
from fmscale.models.shapes import weights_of
from fmscale.phases import phases_of
from fmscale.planning.advice import advice_of, changed, refusals
from fmscale.planning.devices import CALL_S, CPU, DEVICES, Cluster, Rates, stated_rates
from fmscale.planning.memory import largest_micro_batch, memory_of
from fmscale.planning.pace import flops_of, image_s, sent_s
from fmscale.planning.plans import fits, plan_of, plan_phase, scaling
from fmscale.planning.stock import stock_of

CONFIGS = Path(__file__).parents[3] / "configs"
H100 = Cluster("h100", DEVICES["h100"], stated_rates("h100", "bf16"), 8, 50e9)
NO_CPU_RATES = Cluster(CPU, None, None, 2, 50e9)


def preset(name: str, *overrides: str) -> TrainConfig:
    return load(TrainConfig, CONFIGS / f"{name}.yaml", overrides)


@pytest.mark.parametrize("world_size", [8, 64, 512])
@pytest.mark.parametrize("name", ["sd3_medium_256", "sd35_large_256", "flux_dev_256"])
def test_published_networks_are_planned(name: str, world_size: int) -> None:
    plan = plan_of(preset(name), world_size, H100)
    (phase,) = plan.phases
    assert phase.split.world_size == world_size
    assert refusals(plan, None) == []
    # No better than the peak, and no worse than a tenth of it while few GPUs wait for one another.
    (bucket,) = phase.buckets
    mfu = bucket.flops.train_step * phase.images_per_s / world_size / 989.4e12
    assert (0.1 if world_size == 8 else 0) < mfu < 0.6


def test_a_step_is_work_over_rates(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    stock = stock_of(config)

    def seconds(*rates: float) -> float:
        return image_s(config, stock.shapes[0], stock.text_tokens, Cluster("x", None, Rates(*rates, 1.0, ""), 8, 1.0))

    never, flops = 1e300, flops_of(config, stock.shapes[0], stock.text_tokens)
    assert seconds(1e9, never, never) == pytest.approx((flops.train_step - flops.attention) / 1e9)
    assert seconds(never, 1e9, never) == pytest.approx(flops.attention / 1e9)
    assert seconds(1e9, 1e9, 1e9) == pytest.approx(
        seconds(1e9, never, never) + seconds(never, 1e9, never) + seconds(never, never, 1e9)
    )


def test_forgotten_blocks_cost_their_forward_pass_again() -> None:
    kept, forgotten = preset("sd3_medium_256"), preset("sd3_medium_256", "engine.recompute_every=1")
    stock = stock_of(kept)
    times = [image_s(config, stock.shapes[0], stock.text_tokens, H100) for config in (kept, forgotten)]
    products = H100._replace(rates=Rates(1e12, 1e12, 1e300, 1.0, ""))
    ratio = [image_s(config, stock.shapes[0], stock.text_tokens, products) for config in (kept, forgotten)]
    assert times[0] < times[1]
    assert ratio[1] / ratio[0] == pytest.approx(4 / 3, rel=0.01)  # two thirds of a step are its backward pass


@pytest.mark.parametrize(("world_size", "ring"), [(2, 0.8 * 450e9), (8, 0.8 * 450e9), (16, 0.8 * 450e9)])
def test_a_sum_takes_what_its_ring_takes(world_size: int, ring: float) -> None:
    payload = 10**12  # so much that latency does not count
    seconds = sent_s(Collective("all_reduce", "", payload, 1, False), H100, world_size)
    assert seconds == pytest.approx(2 * payload * (world_size - 1) / world_size / ring, rel=1e-3)
    slow = H100._replace(network=1e9)
    assert sent_s(Collective("all_reduce", "", payload, 1, False), slow, world_size) == pytest.approx(
        2 * payload * (world_size - 1) / world_size / (ring if world_size <= 8 else 8e9), rel=1e-3
    )


def test_what_sends_nothing_takes_no_time_and_calls_take_theirs() -> None:
    assert sent_s(Collective("reduce", "", 0, 0, False), H100, 8) == 0
    assert sent_s(Collective("all_reduce", "", 4, 10, False), H100, 8) >= 10 * CALL_S


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    config = preset("sd3_medium_256")
    (phase,) = plan_of(config, 8, H100).phases
    (bucket,) = phase.buckets
    usable = DEVICES["h100"].usable
    most = largest_micro_batch(config, phase.base, bucket.shape, phase.stock.text_tokens, usable)

    def total(images: int) -> int:
        return memory_of(config, phase.base, bucket.shape, phase.stock.text_tokens, images).total

    assert total(most) <= usable < total(most + 1)
    assert largest_micro_batch(config, phase.base, bucket.shape, phase.stock.text_tokens, 1.0) == 0


@pytest.mark.parametrize("world_size", [1, 8])
def test_advice_for_what_does_not_fit_fits(world_size: int) -> None:
    config = preset("sd35_large_256", "engine.zero_stage=1", "engine.recompute_every=0", "micro_batch=64")
    cluster = H100
    plan = plan_of(config, world_size, cluster)
    (phase,) = plan.phases
    assert not fits(phase, cluster)
    assert "GiB" in refusals(plan, None)[0]
    first = advice_of(plan, phase, [])[0]
    other = changed(phase, cluster, first.change)
    assert other is not None
    assert fits(other, cluster)


def test_where_nothing_fits_it_is_said() -> None:
    small = Cluster("l4", DEVICES["l4"], stated_rates("l4", "bf16"), 1, 50e9)
    plan = plan_of(preset("flux_dev_256"), 1, small)
    assert "nothing fits" in advice_of(plan, plan.phases[0], [])[0].why


def test_the_fastest_that_fits_may_have_a_larger_micro_batch() -> None:
    small = Cluster("a10", DEVICES["a10"], stated_rates("a10", "bf16"), 8, 50e9)
    plan = plan_of(preset("flux_dev_256", "micro_batch=1"), 3, small)
    first = advice_of(plan, plan.phases[0], [])[0]
    assert first.change["micro_batch"] > 1


def test_advice_saves_what_it_says() -> None:
    plan = plan_of(preset("sd3_medium_256"), 64, H100)
    (phase,) = plan.phases
    first = next(each for each in advice_of(plan, phase, []) if each.change == {"engine.compile": True})
    other = changed(phase, H100, first.change)
    assert other is not None
    assert other.step is not None
    assert f"{other.step.total:.3f} s a step" in first.why


def test_a_batch_that_leaves_slots_empty_is_named() -> None:
    plan = plan_of(preset("sd3_medium_256", "global_batch=1000"), 48, H100)
    (phase,) = plan.phases
    change = next(each.change for each in advice_of(plan, phase, []) if "global_batch" in each.change)
    other = changed(phase, H100, change)
    assert other is not None
    assert other.step is not None
    assert phase.step is not None
    assert other.step.empty == 0 < phase.step.empty


def test_a_bucket_smaller_than_a_batch_is_named(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    plan = plan_of(make_config(tmp_path / "run"), 2, NO_CPU_RATES)
    said = [each.why for each in advice_of(plan, plan.phases[0], [])]
    assert any("bucket 8x16 has 20 samples, fewer than global_batch 32" in why for why in said)


def test_raw_settings_that_nothing_counts_are_named() -> None:
    config = preset("sd3_medium_256", "engine.deepspeed={zero_optimization: {round_robin_gradients: true}}")
    plan = plan_of(config, 8, H100)
    assert any("round_robin_gradients" in each.why for each in advice_of(plan, plan.phases[0], []))


def test_scaling_goes_by_what_grows(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    (phase,) = plan_of(preset("sd3_medium_256"), 64, H100).phases
    rows = scaling(phase, H100)
    assert [row.world_size for row in rows] == [2**power for power in range(11)]
    (here,) = (row for row in rows if row.world_size == 64)
    assert phase.step is not None
    assert here.weak.total == pytest.approx(phase.step.total)
    assert here.strong is not None
    assert here.strong.total == pytest.approx(phase.step.total)
    assert all(0 < row.weak_efficiency <= 1 for row in rows)
    few = scaling(phase._replace(phase=phases_of(preset("sd3_medium_256", "global_batch=64"))[0]), H100)
    assert [row.strong is None for row in few] == [row.world_size > 64 for row in few]


def test_the_same_batch_on_fewer_ranks_may_not_fit() -> None:
    a40 = Cluster("a40", DEVICES["a40"], stated_rates("a40", "bf16"), 8, 50e9)
    settings = "engine.zero_stage=3", "engine.recompute_every=0", "global_batch=1024", "micro_batch=64"
    (phase,) = plan_of(preset("sd3_medium_256", *settings), 512, a40).phases
    rows = {row.world_size: row for row in scaling(phase, a40)}
    assert rows[8].fits
    assert not rows[8].strong_fits
    assert rows[512].strong_fits
    strong = plan_of(preset("sd3_medium_256", *settings), 16, a40).phases[0]
    assert rows[16].strong_fits == fits(strong, a40)


@pytest.mark.parametrize(("name", "world_size"), [("sd35_large_256", 64), ("flux_dev_256", 512)])
def test_the_largest_gradient_and_its_weight_are_there_together(name: str, world_size: int) -> None:
    """The modulation of all blocks is one matrix of a third of the network, which comes last, and in no bucket."""
    config = preset(name)
    largest = max(weight.numel for weight in weights_of(config.model.model_dump()))
    for stage, least in ((3, 2 * 2 * largest), (2, 2 * largest)):
        staged = config.model_copy(update={"engine": config.engine.model_copy(update={"zero_stage": stage})})
        (phase,) = plan_of(staged, world_size, H100).phases
        assert phase.fullest.memory.total >= phase.base.device + least


def test_an_offloaded_optimizer_leaves_what_micro_batches_add_up_in() -> None:
    settings = "engine.zero_stage=2", "engine.offload=optimizer", "global_batch=16", "micro_batch=8"
    (phase,) = plan_of(preset("sd3_medium_256", *settings), 1, H100).phases
    own, weights = phase.base.gradients, weights_of(phase.phase.config.model.model_dump())
    assert own.before == own.update == 4 * sum(weight.numel for weight in weights)


def test_ranks_of_stage_1_update_with_their_own_gradients_alone() -> None:
    (phase,) = plan_of(preset("sd3_medium_256", "engine.zero_stage=1"), 8, H100).phases
    total = sum(weight.numel for weight in weights_of(phase.phase.config.model.model_dump()))
    assert 2 * total / 8 + 4 * total / 8 <= phase.base.gradients.update < 2 * total


def test_phases_are_planned_one_by_one(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    phases = "[{until_step: 2}, {micro_batch: 4, optimizer: {lr: 2.0e-3, warmup_steps: 0}}]"
    plan = plan_of(make_config(tmp_path / "run", f"phases={phases}"), 2, NO_CPU_RATES)
    assert [(phase.steps, phase.split.accumulation) for phase in plan.phases] == [(2, 1), (6, 4)]
    assert [phase.rates[1] for phase in plan.phases] == [pytest.approx(5e-4), 2e-3]
    alone = [plan_phase(phase.phase, phase.stock, 2, NO_CPU_RATES) for phase in plan.phases]
    assert tuple(alone) == plan.phases
