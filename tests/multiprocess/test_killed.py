"""kill -9 in mid-run, the same command again: the run that was never interrupted."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from running import PATIENCE_S, kill_all, lines, output, start, start_program, wait_for_lines, wait_until

from fmscale.config import TrainConfig
from fmscale.train import train

STEPS = 60
SETTINGS = (f"steps={STEPS}", "checkpoint.every_steps=4", "checkpoint.keep=2", "log.every_steps=1", "data.workers=1")
SNAPSHOTS = ("ema.sigma_rels=[0.1]", "ema.snapshot_every_steps=5")
KILLED_AFTER = (11, 33)  # lines of metrics


def run_until_killed(config: TrainConfig, after: int) -> None:
    """Start a training, and kill its processes without warning when it has written so many lines."""
    process = start(config)
    try:
        wait_for_lines(config, process, after)
    finally:
        kill_all(process)
    assert lines(config.run_dir) < STEPS


def test_a_killed_reader_ends_the_run_within_seconds_with_one_line(
    tmp_path: Path, make_config: Callable[..., TrainConfig]
) -> None:
    config = make_config(tmp_path / "run", *SETTINGS, "steps=100000")
    process = start(config)
    try:
        wait_for_lines(config, process, 5)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        os.kill(int(children[0]), signal.SIGKILL)
        assert process.wait(15) == 1
    finally:
        kill_all(process)
    said = output(config).read_text()
    assert "Traceback" not in said
    assert "fmscale train: a process that reads the data has died (" in said.splitlines()[-1]
    assert "goes on from its checkpoint" in said.splitlines()[-1]


def test_a_killed_run_goes_on_to_the_bit(
    tmp_path: Path, make_config: Callable[..., TrainConfig], losses: Callable[[Path], dict[int, float]]
) -> None:
    whole, killed = (make_config(tmp_path / name, *SETTINGS, *SNAPSHOTS) for name in ("whole", "killed"))
    for after in KILLED_AFTER:
        run_until_killed(killed, after)
    for config in (whole, killed):
        train(config)
    assert losses(killed.run_dir) == losses(whole.run_dir)
    assert sorted(path.name for path in (killed.run_dir / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (STEPS - 4, STEPS)
    ]
    files = sorted(path.relative_to(whole.run_dir) for path in (whole.run_dir / "ema").rglob("*.safetensors"))
    assert [file.parent.name for file in files] == [f"step-{step:08d}" for step in range(5, STEPS + 1, 5)]
    for file in files:
        assert (killed.run_dir / file).read_bytes() == (whole.run_dir / file).read_bytes()
    assert len(list((killed.run_dir / "ema").iterdir())) == len(files)


@pytest.mark.slow
def test_an_error_of_ours_ends_the_process_although_readers_outlive_signals(
    tmp_path: Path, make_config: Callable[..., TrainConfig]
) -> None:
    config = make_config(tmp_path / "run", *SETTINGS, "data.workers=2", "steps=100000")
    program = Path(__file__).parent / "train_and_fail.py"
    process = start_program(config, str(program), config.model_dump_json())
    try:
        wait_until(config, process, lambda: "ValueError: an error that nobody expected" in output(config).read_text())
        began = time.monotonic()
        assert process.wait(PATIENCE_S) == 1
        assert time.monotonic() - began < 30  # readers outlive a signal by a minute
    finally:
        kill_all(process)
