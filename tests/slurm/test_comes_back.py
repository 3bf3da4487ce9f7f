"""Slurm sends a job away, for whatever reason, and it comes back as if it had never left."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm.cluster import Cluster
from slurm.conftest import SLOW, STEPS, Submitted, losses

from fmscale.config import TrainConfig

UNSAVED = (*SLOW, "checkpoint.every_steps=1000")  # nothing is saved before the end but what signals ask for


@pytest.fixture
def start(
    make_config: Callable[..., TrainConfig], tmp_path: Path, submit: Callable[..., Submitted]
) -> Callable[..., Submitted]:
    """Submits the slow run; overrides of the site."""
    return lambda *overrides: submit(make_config(tmp_path / "run", *UNSAVED, f"steps={STEPS}"), *overrides)


def train_until(job: Submitted, steps: int) -> None:
    job.wait_for(f"step {steps}", lambda: job.steps() >= steps)


def check_nothing_was_lost(job: Submitted, undisturbed: Callable[[int], dict[int, float]], left: int) -> None:
    """The run left so many times, was done in the end, went on with the next step each time, and is the same run."""
    assert job.endings() == ["left"] * left + ["done"], job.log()
    assert job.restarts() == left
    starts = [int(step) for step in re.findall(rf"^run .* steps (\d+) to {STEPS}$", job.log(), flags=re.MULTILINE)]
    stops = [int(step) for step in re.findall(r"^stopped as asked.*: (\d+) steps", job.log(), flags=re.MULTILINE)]
    assert starts == [0, *stops]
    shown = [int(step) for step in re.findall(rf"^step (\d+) of {STEPS}", job.log(), flags=re.MULTILINE)]
    assert shown == list(range(1, STEPS + 1)), "a step was lost, or done twice"
    assert losses(job.run_dir) == undisturbed(STEPS)


def test_three_signals(
    cluster: Cluster, start: Callable[..., Submitted], undisturbed: Callable[[int], dict[int, float]]
) -> None:
    job = start()
    for times in (1, 2, 3):
        train_until(job, 9 * times)
        cluster("scancel", "--signal=USR2", job.job)
        job.wait_for("the job's return", lambda times=times: job.restarts() == times)
    job.wait_for_end()
    check_nothing_was_lost(job, undisturbed, left=3)


def test_preemption(
    cluster: Cluster, start: Callable[..., Submitted], undisturbed: Callable[[int], dict[int, float]]
) -> None:
    job = start("site.partition=low")
    train_until(job, 20)
    cluster("sbatch", "--partition=high", "--exclusive", "--nodes=3", "--output=/dev/null", "--wrap=sleep 3")
    job.wait_for("the job's return", lambda: job.restarts() == 1)
    job.wait_for_end()
    check_nothing_was_lost(job, undisturbed, left=1)


def test_time_limit(
    cluster: Cluster,
    make_config: Callable[..., TrainConfig],
    tmp_path: Path,
    submit: Callable[..., Submitted],
    fmscale: Callable[..., object],
    undisturbed: Callable[[int], dict[int, float]],
) -> None:
    """The run would go on for hours; its limit is drawn near once it trains, and put off when it has come back.

    Slurm tells a job to leave up to 30 s sooner than it was asked to, and a limit is in whole minutes.
    """
    job = submit(make_config(tmp_path / "run", *UNSAVED, f"steps={10**6}"), "site.signal_delay_s=60")
    train_until(job, 10)
    hours, minutes, seconds = map(int, job.told()["RunTime"].split(":"))
    minutes += 60 * hours + (seconds + 150) // 60  # 90 to 150 s from now
    cluster("scontrol", "update", f"JobId={job.job}", f"TimeLimit={minutes}")
    job.wait_for("the job's return", lambda: job.restarts() == 1)
    cluster("scontrol", "update", f"JobId={job.job}", "TimeLimit=30")
    left = job.steps()
    train_until(job, left + 10)
    fmscale("stop", job.run_dir)
    job.wait_for_end()
    assert job.endings() == ["left", "stopped"], job.log()
    assert re.findall(r"^run .* steps (\d+) to", job.log(), flags=re.MULTILINE) == ["0", str(left)]
    assert losses(job.run_dir) == undisturbed(job.steps())
