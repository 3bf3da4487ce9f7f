from __future__ import annotations

import json
from pathlib import Path

import torch

from fmscale.engine.metrics import MetricsLog, read_metrics


def test_a_step_is_never_written_twice(tmp_path: Path) -> None:
    first = MetricsLog(tmp_path, 1, tensorboard=False)
    for step in range(1, 8):
        first.add(step=step, loss=torch.tensor(step / 2))
    first.close()
    again = MetricsLog(tmp_path, 5, tensorboard=False)  # resumed after step 4
    again.add(step=5, loss=9.0)
    again.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in records] == [
        (1, 0.5),
        (2, 1.0),
        (3, 1.5),
        (4, 2.0),
        (5, 9.0),
    ]


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1]
    log = MetricsLog(tmp_path, 2, tensorboard=False)
    log.add(step=2, loss=0.5)
    log.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 1, tensorboard=False)
    log.add(step=1, loss=torch.tensor(float("nan")), grad_norm=float("inf"), mfu=None)
    assert log.flush() == [{"step": 1, "loss": None, "grad_norm": None, "mfu": None}]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None
    log.close()


def test_tensorboard_shows_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 1, tensorboard=True)
    for step in (1, 2, 3):
        log.add(step=step, loss=step / 4, bucket="8x8")
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.25), (2, 0.5), (3, 0.75)]
