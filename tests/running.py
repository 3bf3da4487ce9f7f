"""Real trainings in processes of their own, for tests that signal or kill them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from fmscale.config import TrainConfig, dump
from fmscale.distributed import World, rank_environment

PATIENCE_S = 120


def lines(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def environment() -> dict[str, str]:
    """This process's, without what trainings in it have left behind."""
    ours = rank_environment(World(0, 0, 1), "", 0)
    return {name: value for name, value in os.environ.items() if name not in ours}


def start(config: TrainConfig, *flags: str) -> subprocess.Popen[bytes]:
    """A training in processes of its own; what it says goes to `output.txt` beside the run."""
    path = config.run_dir.with_suffix(".yaml")
    path.write_text(dump(config))
    command = [sys.executable, "-m", "fmscale", "train", str(path), *flags]
    with (config.run_dir.parent / "output.txt").open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment(), start_new_session=True)


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
