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


def run_until_killed(config: TrainConfig, after: int) -> None:
    """Start a training, and kill its processes without warning when it has written so many lines."""
    path = config.run_dir.with_suffix(".yaml")
    path.write_text(dump(config))
    command = [sys.executable, "-m", "fmscale", "train", str(path)]
    ours = rank_environment(World(0, 0, 1), "", 0)  # which trainings in this process have left behind
    env = {name: value for name, value in os.environ.items() if name not in ours}
    with (config.run_dir.parent / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while lines(config.run_dir) < after:
            assert process.poll() is None, (config.run_dir.parent / "output.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert lines(config.run_dir) < STEPS


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
