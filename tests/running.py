"""Real trainings in processes of their own, for tests that signal or kill them."""

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

PATIENCE_S = 300  # the imports alone take a minute on a machine that has other work


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
    return start_program(config, "-m", "fmscale", "train", str(path), *flags)


def start_program(config: TrainConfig, *arguments: str) -> subprocess.Popen[bytes]:
    """The same, of any program for Python that trains."""
    with output(config).open("w") as file:
        command = [sys.executable, *arguments]
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment(), start_new_session=True)


def output(config: TrainConfig) -> Path:
    return config.run_dir.parent / "output.txt"


def wait_for_lines(config: TrainConfig, process: subprocess.Popen[bytes], count: int) -> None:
    wait_until(config, process, lambda: lines(config.run_dir) >= count)


def wait_until(config: TrainConfig, process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """Wait for something that a training does before it ends."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        ended = process.poll() is not None
        if reached():
            return
        assert not ended, output(config).read_text()
        assert time.monotonic() < deadline, output(config).read_text()
        time.sleep(0.01)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
