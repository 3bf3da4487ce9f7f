"""Asked to stop, a run saves at the next step, ends with exit code 0, and goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from running import kill_all, lines, output, start, wait_for_lines, wait_until

from fmscale.building import Allowed
from fmscale.config import TrainConfig
from fmscale.engine.checkpoint import find_all
from fmscale.train import train

SETTINGS = ("checkpoint.every_steps=1000", "log.every_steps=1", "data.workers=1", "micro_batch=16")
ENDLESS = "steps=100000"


def stop(config: TrainConfig, how: str, *flags: str) -> str:
    """Start a training, ask it to stop in mid-run, and wait until it has; returns what it said."""
    process = start(config, *flags)
    try:
        wait_for_lines(config, process, 5)
        if how == "STOP":
            (config.run_dir / "STOP").touch()
        elif how == "parent":
            os.kill(process.pid, signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.Signals[how])
        assert process.wait(60) == 0, output(config).read_text()
        return output(config).read_text()
    finally:
        kill_all(process)


@pytest.mark.parametrize(
    ("how", "nproc"),
    [
        *(pytest.param(how, 1, marks=pytest.mark.slow) for how in ("SIGTERM", "SIGINT", "SIGUSR2", "STOP")),
        pytest.param("parent", 2, marks=pytest.mark.slow),
        ("SIGTERM", 2),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_and_ends_well(
    tmp_path: Path,
    make_config: Callable[..., TrainConfig],
    losses: Callable[[Path], dict[int, float]],
    how: str,
    nproc: int,
) -> None:
    """The signal goes to every process, those that read the data too; or to the parent of two ranks alone."""
    config = make_config(tmp_path / "run", *SETTINGS, ENDLESS)
    said = stop(config, how, "--nproc", str(nproc))
    assert "Traceback" not in said
    assert "stopped as asked, the same command goes on from here" in said
    done = lines(config.run_dir)
    assert [path.name for path in find_all(config.run_dir / "checkpoints")] == [f"step-{done:08d}"]
    assert not (config.run_dir / "STOP").exists()
    if nproc == 1:
        train(make_config(tmp_path / "run", *SETTINGS, f"steps={done + 4}"), Allowed(config_change=True))
        train(make_config(tmp_path / "whole", *SETTINGS, f"steps={done + 4}"))
        assert losses(config.run_dir) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_file_asks_for_a_checkpoint_and_the_run_goes_on(
    tmp_path: Path, make_config: Callable[..., TrainConfig]
) -> None:
    config = make_config(tmp_path / "run", *SETTINGS, ENDLESS)
    process = start(config)
    try:
        wait_for_lines(config, process, 5)
        (config.run_dir / "SAVE").touch()
        wait_until(config, process, lambda: len(find_all(config.run_dir / "checkpoints")) == 1)
        assert not (config.run_dir / "SAVE").exists()
        wait_for_lines(config, process, lines(config.run_dir) + 20)
        assert len(find_all(config.run_dir / "checkpoints")) == 1
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGINT)
        process.wait(60)
    finally:
        kill_all(process)
