"""What a run says of each step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fmscale.train as training
from fmscale.config import TrainConfig
from fmscale.draws import draw_step
from fmscale.engine.metrics import read_metrics
from fmscale.errors import UserError
from fmscale.reporting import BIN_NAMES, speed
from fmscale.tally import BINS, by_timestep
from fmscale.train import train

Make = Callable[..., TrainConfig]
PACKAGE = Path(training.__file__).parent


def test_values_are_added_up_by_bin_of_t() -> None:
    t = torch.tensor([0.0, 0.05, 0.1, 0.999, 1.0, 0.55])
    sums = by_timestep(t, torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, float("nan")]))
    assert sums[[0, 1, 9]].tolist() == [3, 4, 24]
    assert sums[5].isnan()
    assert sums[[2, 3, 4, 6, 7, 8]].eq(0).all()


def test_speed_counts_what_the_network_takes(tmp_path: Path, make_config: Make) -> None:
    fast = speed(make_config(tmp_path, "global_batch=6"), bucket=(8, 16), text_tokens=7, seconds=0.5)
    assert (fast["step_s"], fast["images_per_s"], fast["tokens_per_s"]) == (0.5, 12, 12 * (4 * 8 + 7))
    assert fast["flops_per_s"] == 12 * speed(make_config(tmp_path, "global_batch=1"), (8, 16), 7, 1.0)["flops_per_s"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_config: Make) -> TrainConfig:
    """Eight steps, the fifth of which is skipped, with a stop and a new start after the sixth."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    settings = ("log.every_steps=3", "log.tensorboard=true", "log.histogram_every_steps=4", "engine.zero_stage=2")
    with pytest.MonkeyPatch.context() as patch:
        losses = training.losses_of
        patch.setattr(
            training,
            "losses_of",
            lambda job, batch, draws: losses(job, batch, draws) * (float("nan") if batch.step == 4 else 1),
        )
        train(make_config(run_dir, *settings, "steps=6"))
    time.sleep(1)  # TensorBoard orders what two starts wrote by the second; within one process, then by the alphabet
    config = make_config(run_dir, *settings, "steps=8")
    train(config)
    return config


def test_each_step_tells_its_losses_by_timestep(run: TrainConfig) -> None:
    for record in read_metrics(run.run_dir / "metrics.jsonl"):
        assert tuple(record["loss_by_t"]) == BIN_NAMES
        bucket = (int(side) for side in record["bucket"].split("x"))
        t = draw_step(run, record["step"] - 1, 2, (next(bucket), next(bucket))).times.t
        counts = [int(((t >= i / BINS) & (t < (i + 1) / BINS)).sum()) for i in range(BINS)]
        losses = list(record["loss_by_t"].values())
        if record["step"] == 5:
            assert all(loss is None for loss in losses)
            continue
        assert [loss is None for loss in losses] == [count == 0 for count in counts]
        mean = sum(loss * count for loss, count in zip(losses, counts, strict=True) if count) / run.global_batch
        assert mean == pytest.approx(record["loss"], rel=1e-5)


def test_steps_that_log_tell_the_norms_of_the_gradient(run: TrainConfig) -> None:
    for record in read_metrics(run.run_dir / "metrics.jsonl"):
        norms = record["grad_norms"]
        if record["step"] in (3, 4, 6, 8):
            assert list(norms) == ["attention", "embeddings", "mlp", "modulation", "output"]
            assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(record["grad_norm"], rel=1e-5)
        else:
            assert norms is None


def test_skipped_steps_are_counted_over_a_new_start(run: TrainConfig) -> None:
    records = read_metrics(run.run_dir / "metrics.jsonl")
    assert [record["skipped_steps"] for record in records] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_what_a_cpu_cannot_say_is_null(run: TrainConfig) -> None:
    for record in read_metrics(run.run_dir / "metrics.jsonl"):
        assert record["mfu"] is None
        assert 0.05 < record["memory_gb"] < 50
        assert record["tokens_per_s"] > record["images_per_s"] > 0


def test_tensorboard_shows_them_too(run: TrainConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.run_dir / "tensorboard"), size_guidance={"histograms": 0})  # 0 keeps all
    events.Reload()
    tags = events.Tags()
    assert {f"train/loss_by_t/{name}" for name in BIN_NAMES[2:8]} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("train/grad_norms/mlp")] == [3, 4, 6, 8]
    parts = ("attention", "embeddings", "mlp", "modulation", "output")
    assert set(tags["histograms"]) == {f"{kind}/{part}" for kind in ("weights", "gradients") for part in parts}
    for tag in tags["histograms"]:
        assert [event.step for event in events.Histograms(tag)] == [4, 8]
        histogram = events.Histograms(tag)[1].histogram_value
        assert histogram.num == sum(histogram.bucket) > 0


def test_histograms_without_tensorboard_are_refused(tmp_path: Path, make_config: Make) -> None:
    with pytest.raises(UserError, match="histogram_every_steps needs tensorboard"):
        make_config(tmp_path, "log.tensorboard=false", "log.histogram_every_steps=5")


class Waits(TorchDispatchMode):
    """Notes which functions of the training process read a tensor's value, for which they would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            assert frame is not None
            place = Path(frame.f_code.co_filename)
            if place.is_relative_to(PACKAGE) and not place.is_relative_to(PACKAGE / "data"):  # that is the readers'
                self.found.add(f"{place.name}:{frame.f_code.co_name}")
        return func(*args, **(kwargs or {}))


def within(mode: TorchDispatchMode, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, watched."""

    def watched(*args: Any) -> Any:
        with mode:
            return function(*args)

    return watched


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_that_does_not_log_waits_for_nothing(
    tmp_path: Path, make_config: Make, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_steps, in_flush = Waits(), Waits()
    monkeypatch.setattr(training, "train_step", within(in_steps, training.train_step))
    monkeypatch.setattr(training.Reporter, "take", within(in_steps, training.Reporter.take))
    monkeypatch.setattr(training.Reporter, "flush", within(in_flush, training.Reporter.flush))
    train(make_config(tmp_path / "run", "steps=5", "log.every_steps=5", f"engine.zero_stage={stage}"))
    assert in_flush.found == {"metrics.py:_plain"}  # else nothing would be seen here
    assert not in_steps.found
