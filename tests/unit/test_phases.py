"""Phases: what each of them says, and when it is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import fmscale.train as train_module
from fmscale import guards
from fmscale.batch import Batch
from fmscale.building import check_setup
from fmscale.config import TrainConfig
from fmscale.draws import Draws
from fmscale.engine.checkpoint import latest
from fmscale.engine.metrics import read_metrics
from fmscale.errors import UserError
from fmscale.phases import changes, phase_of, phases_of
from fmscale.train import Job, train

Make = Callable[..., TrainConfig]


def make(make_config: Make, folder: Path, *phases: dict[str, Any]) -> TrainConfig:
    return make_config(folder, "steps=30", f"phases={json.dumps(phases)}")


def test_a_run_without_phases_has_one(make_config: Make, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    (phase,) = phases_of(config)
    assert (phase.start, phase.until, phase.rate_until, phase.images_seen(3)) == (0, config.steps, config.steps, 96)
    assert phase.config == config


def test_each_goes_on_with_the_one_before(make_config: Make, tmp_path: Path) -> None:
    config = make(
        make_config,
        tmp_path,
        {"until_step": 10, "flow": {"shift": 2.0}},
        {"until_step": 20, "conditioning": {"dropout": 0.5}, "data": {"workers": 1}},
        {"global_batch": 8, "optimizer": {"lr": 1e-5}},
    )
    phases = phases_of(config)
    assert [phase.config.flow.shift for phase in phases] == [2.0, 2.0, 2.0]
    assert [phase.config.conditioning.dropout for phase in phases] == [0.1, 0.5, 0.5]
    assert [(phase.start, phase.until) for phase in phases] == [(0, 10), (10, 20), (20, 30)]
    assert [phase.data_start for phase in phases] == [0, 0, 20]  # other workers read the same order
    assert [(phase.rate_start, phase.rate_until) for phase in phases] == [(0, 20), (0, 20), (20, 30)]
    assert [phase.images_seen(phase.until) for phase in phases] == [320, 640, 720]
    assert [phase_of(phases, done).number for done in (0, 1, 10, 11, 20, 21, 30)] == [0, 0, 0, 1, 1, 2, 2]
    assert changes(phases[1].config, phases[2].config) == ["global_batch: 32 -> 8", "optimizer.lr: 0.001 -> 1e-05"]


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([{"until_step": 10}], r"phases\.0\.until_step: 10; the run ends at steps=30"),
        ([{"until_step": 10}, {"until_step": 10}, {}], r"phases\.1\.until_step: 10 is not after 10"),
        ([{"until_step": 40}, {}], r"phases\.0\.until_step: 40; the run ends at steps=30"),
        ([{}, {}], r"phases\.0\.until_step: give the steps that are done at its end"),
        ([{"until_step": "10"}, {}], r"phases\.0\.until_step: give the steps"),
        (
            [{"until_step": 10}, {"model": {"layers": 3}}],
            r"phases\.1\.model\.layers: is the same in all phases, as the network is built once; leave it out there$",
        ),
        ([{"until_step": 10}, {"engine": {"zero_stage": 3}}], r"engine\.zero_stage: .* hooks are laid out once"),
        ([{"until_step": 10}, {"seed": 3}], r"phases\.1\.seed: is the same in all phases, as it belongs to the run"),
        ([{"until_step": 10}, {"phases": [{}]}], r"phases\.1\.phases: is the same in all phases"),
        ([{"until_step": 10}, {"data": {"mixture": [{"path": "a", "weight": 1}]}}], r"phases\.1: data: give either"),
        (
            [{"until_step": 10}, {"flow": {"shfit": 3}}],
            r"phases\.1: flow\.shfit: no such key; did you mean flow\.shift",
        ),
        ([{"until_step": 10}, {"flow.shift": 3}], r"within one another, as flow: \{shift: …\}; allowed here"),
        ([{"until_step": 10}, {"ema": {"decays": [0.9]}}], r"phases\.1\.ema: keep as many decays"),
    ],
)
def test_phases_that_make_no_sense_are_refused(
    make_config: Make, tmp_path: Path, phases: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        phases_of(make(make_config, tmp_path, *phases))


def test_phases_share_what_is_opened_where_nothing_asks_for_another(make_config: Make, tmp_path: Path) -> None:
    dropping = {"until_step": 10, "conditioning": {"dropout": 0.5}}
    first, second, third = check_setup(
        make(make_config, tmp_path / "run", {"until_step": 5}, dropping, {"conditioning": {"null": "zeros"}}), 1
    ).datasets
    assert second is first
    assert third.generations == first.generations
    assert third.null_sha256 != first.null_sha256
    with pytest.raises(UserError, match=r"phases\.1: flow\.coupling: `paired` needs a dataset made by"):
        check_setup(make(make_config, tmp_path / "run", {"until_step": 5}, {"flow": {"coupling": "paired"}}), 1)


def test_a_phase_may_name_what_was_null_and_the_reverse(make_config: Make, tmp_path: Path) -> None:
    measured = {"validation": {"path": "held_out"}}
    phases = phases_of(
        make(make_config, tmp_path, {"until_step": 10}, {"until_step": 20, **measured}, {"validation": None})
    )
    assert [phase.config.validation is None for phase in phases] == [True, False, True]
    assert "validation.path: None -> held_out" in changes(phases[0].config, phases[1].config)
    assert "validation.path: held_out -> None" in changes(phases[1].config, phases[2].config)


def test_what_watches_and_keeps_a_run_goes_on_with_the_phase(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits, what is kept, curves, and blocks that recompute: of parts that are made once."""
    first = {"until_step": 2, "guard": {"max_loss_ratio": 3.0}, "log": {"tensorboard": True}}
    second = {
        "guard": {"max_loss_ratio": None, "silent_s": 50.0},
        "checkpoint": {"keep": 1},
        "log": {"tensorboard": False},
        "engine": {"recompute": ["mlp"]},
    }
    seen: dict[int, Any] = {}

    def look(job: Job, batches: Any, step: int, wish: Any) -> Any:
        blocks = job.engine.engine.module.blocks
        recomputing = any("forward" in vars(module) for module in blocks.modules())
        seen[step] = (job.guard._limit, job.watch._limits.silent_s, recomputing)
        return train_step(job, batches, step, wish)

    train_step = train_module.train_step
    monkeypatch.setattr(train_module, "train_step", look)
    settings = ("steps=4", "checkpoint.every_steps=1", "checkpoint.keep=2", "log.every_steps=1")
    config = make_config(tmp_path / "run", *settings, f"phases={json.dumps([first, second])}")
    train(config)
    assert seen[1] == (3.0, 60.0, False)
    assert seen[2] == seen[3] == (math.inf, 50.0, True)
    assert [path.name for path in sorted((config.run_dir / "checkpoints").iterdir())] == ["step-00000004"]
    events = EventAccumulator(str(config.run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


def test_a_phase_with_another_loss_teaches_anew_what_a_loss_is_as_a_rule(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where variance explodes the velocity is hundreds of times as long: no reason to drop the step."""
    monkeypatch.setattr(guards, "SETTLED_STEPS", 2)
    phases = [{"until_step": 4}, {"flow": {"path": "variance_exploding"}}]
    config = make_config(tmp_path / "run", "steps=6", f"phases={json.dumps(phases)}")
    train(config)
    records = read_metrics(config.run_dir / "metrics.jsonl")
    assert records[4]["loss"] > 20 * records[3]["loss"]
    assert all(record["applied"] for record in records)


def test_weights_of_t_are_no_leap_of_the_loss(make_config: Make, tmp_path: Path) -> None:
    """1 / t² differs a thousandfold within one bin."""
    for weight in ("none", "sigma_sqrt"):
        train(make_config(tmp_path / weight, "steps=1", f"flow.weight={weight}"))
    (plain,), (weighted,) = (read_metrics(tmp_path / weight / "metrics.jsonl") for weight in ("none", "sigma_sqrt"))
    assert weighted["loss"] > 1.5 * plain["loss"]
    first, second = (latest(tmp_path / weight / "checkpoints") for weight in ("none", "sigma_sqrt"))
    assert first is not None
    assert second is not None
    assert first.index["description"]["loss_guard"] == second.index["description"]["loss_guard"]


def test_a_run_goes_back_over_a_switch_to_averages_of_other_decays(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    losses_of = train_module.losses_of

    def poisoned(job: Job, batch: Batch, draws: Draws) -> Tensor:
        return losses_of(job, batch, draws) * (math.nan if batch.step in (5, 6) else 1)

    monkeypatch.setattr(train_module, "losses_of", poisoned)
    settings = ("steps=8", "checkpoint.every_steps=4", "guard.max_skipped_steps=2", "log.every_steps=1")
    phases = [{"until_step": 5, "ema": {"decays": [0.9]}}, {"ema": {"decays": [0.5]}}]
    config = make_config(tmp_path / "run", *settings, f"phases={json.dumps(phases)}")
    train(config)
    assert "step 7: back to the weights of" in caplog.text
    found = latest(config.run_dir / "checkpoints")
    assert found is not None
    assert found.index["updates"] == 5
    assert "ema_0.5" in found.index["kinds"]
