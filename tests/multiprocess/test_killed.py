"""kill -9 in mid-run, the same command again: the run that was never interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fmscale.config import TrainConfig, dump
from fmscale.distributed import World, rank_environment
from fmscale.train import train

STEPS = 60
SETTINGS = (f"steps={STEPS}", "checkpoint.every_steps=4", "checkpoint.keep=2", "log.every_steps=1", "data.workers=1")
KILLED_AFTER = (11, 33)  # lines of metrics
PATIENCE_S = 120


def lines(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def start(config: TrainConfig) -> subprocess.Popen[bytes]:
    """A training in processes of its own; what it says goes to `output.txt` beside the run."""
    path = config.run_dir.with_suffix(".yaml")
    path.write_text(dump(config))
    command = [sys.executable, "-m", "fmscale", "train", str(path)]
    ours = rank_environment(World(0, 0, 1), "", 0)  # which trainings in this process have left behind
    env = {name: value for name, value in os.environ.items() if name not in ours}
    with (config.run_dir.parent / "output.txt").open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)


def wait_for_lines(config: TrainConfig, process: subprocess.Popen[bytes], count: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while lines(config.run_dir) < count:
        assert process.poll() is None, (config.run_dir.parent / "output.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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
    output = (tmp_path / "output.txt").read_text()
    assert "Traceback" not in output
    assert "fmscale train: a process that reads the data has died (" in output.splitlines()[-1]
    assert "goes on from its checkpoint" in output.splitlines()[-1]


def test_a_killed_run_goes_on_to_the_bit(
    tmp_path: Path, make_config: Callable[..., TrainConfig], losses: Callable[[Path], dict[int, float]]
) -> None:
    whole, killed = (make_config(tmp_path / name, *SETTINGS) for name in ("whole", "killed"))
    for after in KILLED_AFTER:
        run_until_killed(killed, after)
    for config in (whole, killed):
        train(config)
    assert losses(killed.run_dir) == losses(whole.run_dir)
    assert sorted(path.name for path in (killed.run_dir / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (STEPS - 4, STEPS)
    ]
