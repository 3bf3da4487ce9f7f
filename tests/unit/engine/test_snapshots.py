"""Averages made from the snapshots of a real training, against those that the same training tracked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fmscale.config import TrainConfig
from fmscale.engine.checkpoint import find_all, step_of
from fmscale.engine.snapshots import make_average
from fmscale.errors import UserError
from fmscale.runs import Run, open_run, snapshots_dir
from fmscale.train import train

Make = Callable[..., TrainConfig]
TRACKED = (0.05, 0.1)  # as the paper has them
TRACKED_TOO = (0.07, 0.15)
STEPS, EVERY = 100, 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, make_config: Make) -> Run:
    """A run of 100 steps that averages over four widths, with a snapshot every 5."""
    settings = (
        f"ema={{decays: [], sigma_rels: {[*TRACKED, *TRACKED_TOO]}, snapshot_every_steps: {EVERY}}}",
        f"steps={STEPS}",
        "checkpoint.every_steps=50",
        "global_batch=8",
        "micro_batch=8",
        "optimizer.lr=1e-2",  # so that the weights move far
    )
    config = make_config(tmp_path_factory.mktemp("averages") / "run", *settings)
    train(config)
    return open_run(config.run_dir)


def made(run: Run, sigma_rel: float) -> dict[str, Tensor]:
    """From the first two widths alone."""
    average = make_average(snapshots_dir(run.path), run.checkpoint, TRACKED, sigma_rel)
    return {name: average(name) for name in run.checkpoint.index["parameters"]}


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Norm of the difference of all parameters together."""
    assert ours.keys() == theirs.keys()
    return float(sum((ours[name].double() - theirs[name].double()).square().sum() for name in theirs)) ** 0.5


@pytest.mark.parametrize(("step", "sigma_rel"), [(STEPS, 0.07), (STEPS, 0.15), (STEPS // 2, 0.07)])
def test_a_made_average_is_the_one_that_was_tracked(trained: Run, sigma_rel: float, step: int) -> None:
    run = open_run(trained.path, step)
    tracked, raw = run.state(sigma_rel), run.state("raw")
    norm = distance(tracked, {name: torch.zeros_like(value) for name, value in tracked.items()})
    error, moved = distance(made(run, sigma_rel), tracked), distance(raw, tracked)
    print(f"step {step}, width {sigma_rel}: off by {error / norm:.1e} of the weights, {error / moved:.1e} of the move")
    assert error <= 1e-3 * norm
    assert error <= 1e-2 * moved  # of how far averaging moves the weights
    assert moved > 0.03 * norm


def test_averages_of_other_widths_lie_in_order(trained: Run) -> None:
    """Between those that were tracked, and beyond: the wider, the further from the newest weights."""
    raw = trained.state("raw")
    far = [distance(made(trained, width), raw) for width in (0.03, 0.05, 0.06, 0.08, 0.1, 0.12, 0.2)]
    assert far == sorted(far)


def test_a_snapshot_holds_the_averages_alone_at_its_step(trained: Run) -> None:
    found = find_all(snapshots_dir(trained.path))
    assert [step_of(path) for path in found] == list(range(EVERY, STEPS + 1, EVERY))
    snapshot = open_run(trained.path, STEPS - EVERY, weights=0.06)
    assert snapshot.checkpoint.path.parent == snapshots_dir(trained.path)
    assert snapshot.checkpoint.index["kinds"] == ["ema_sigma_0.05", "ema_sigma_0.07", "ema_sigma_0.1", "ema_sigma_0.15"]
    both = (open_run(trained.path, 50, weights).checkpoint for weights in (0.05, "ema"))
    snapshot_state, checkpoint_state = (Run(trained.path, trained.config, one).state(0.05) for one in both)
    assert all(torch.equal(snapshot_state[name], value) for name, value in checkpoint_state.items())


def test_the_first_width_is_sampled_where_there_is_no_fixed_decay(trained: Run) -> None:
    assert trained.weight_kind("ema") == "ema_sigma_0.05"


def test_what_was_solved_is_told(trained: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fmscale"):
        made(trained, 0.08)
        told = [float(line.split()[-1]) for line in caplog.text.splitlines() if "coefficient" in line]
        assert len(TRACKED) < len(told) < STEPS // EVERY * len(TRACKED)  # the oldest count for nothing
        assert sum(told) == pytest.approx(1, abs=1e-4)
        assert "average of width 0.08 at update 100: off by 0.19 % of its response" in caplog.text
        assert "rough" not in caplog.text
        made(trained, 0.01)
        assert "that is rough" in caplog.text


def test_a_width_that_does_not_exist_is_refused(trained: Run) -> None:
    with pytest.raises(UserError, match=r"is between 0 and 0\.28, given 0\.3"):
        trained.model(0.3)


def test_a_damaged_snapshot_is_named(trained: Run) -> None:
    file = next((snapshots_dir(trained.path) / "step-00000090").glob("*.safetensors"))
    content = file.read_bytes()
    first = 8 + int.from_bytes(content[:8], "little")  # byte of the first tensor, behind the head
    try:
        file.write_bytes(content[:first] + bytes([content[first] ^ 1]) + content[first + 1 :])
        with pytest.raises(UserError, match=r"ema/step-00000090/.*safetensors: damaged"):
            made(trained, 0.08)
    finally:
        file.write_bytes(content)


def test_a_run_without_snapshots_says_what_it_lacks(tmp_path: Path, make_config: Make) -> None:
    for number, settings in enumerate(((), ("ema.sigma_rels=[0.05, 0.1]",))):
        config = make_config(tmp_path / str(number), "steps=1", *settings)
        train(config)
        assert not snapshots_dir(config.run_dir).exists()
        with pytest.raises(UserError, match=r"ema: no snapshots up to step 1 .*ema\.snapshot_every_steps"):
            open_run(config.run_dir).model(0.08)
