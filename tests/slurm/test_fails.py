"""Ranks die and hang, numbers run away: the job ends soon, says why, and comes back as long as that helps."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

from slurm.cluster import Cluster, wait_until
from slurm.conftest import STEPS, Submitted, losses

from fmscale.config import TrainConfig
from fmscale.requeue import failures

END_S = 30  # from a rank's death to the end of its job


def check_it_is_the_same_run(job: Submitted, undisturbed: Callable[[int], dict[int, float]]) -> None:
    assert losses(job.run_dir) == undisturbed(STEPS)


def test_one_rank_killed(start: Callable[..., Submitted], undisturbed: Callable[[int], dict[int, float]]) -> None:
    job = start()
    job.wait_for("step 15", lambda: job.steps() >= 15)
    killed = time.monotonic()
    os.kill(job.processes(3)[0], signal.SIGKILL)
    wait_until(lambda: bool(failures(job.run_dir)), "the end of the job", END_S)
    print(f"the job ended {time.monotonic() - killed:.1f} s after a rank was killed")
    (failure,) = failures(job.run_dir)
    assert re.match(r"rank 3 on n\d \(last in step \d+, .*\): not heard of any more$", failure["why"])
    assert failure["idle"] == 0
    job.wait_for_end()
    assert job.restarts() == 1
    check_it_is_the_same_run(job, undisturbed)


def test_a_rank_that_hangs_when_the_job_is_told_to_leave(
    cluster: Cluster, start: Callable[..., Submitted], undisturbed: Callable[[int], dict[int, float]]
) -> None:
    job = start("site.signal_delay_s=45")
    job.wait_for("step 15", lambda: job.steps() >= 15)
    os.kill(job.processes(2)[0], signal.SIGSTOP)
    told = time.monotonic()
    cluster("scancel", "--signal=USR2", job.job)
    wait_until(lambda: bool(failures(job.run_dir)), "the end of the job", 60)
    print(f"the job ended {time.monotonic() - told:.1f} s after it was told to leave")
    assert re.match(
        r"rank 2 on n\d .*: not through, and the job was told to end \d+ s ago", failures(job.run_dir)[0]["why"]
    )
    job.wait_for_end()
    assert job.restarts() == 1
    check_it_is_the_same_run(job, undisturbed)


def test_numbers_that_run_away_again_and_again(
    make_config: Callable[..., TrainConfig], tmp_path: Path, submit: Callable[..., Submitted]
) -> None:
    wild = ("optimizer.lr=1e20", "optimizer.warmup_steps=0", "guard.max_skipped_steps=3")
    config = make_config(tmp_path / "run", *wild, "steps=100", "log.every_steps=1", "checkpoint.every_steps=1")
    job = submit(config, "site.tasks_per_node=1")
    wait_until(lambda: job.state() == "FAILED", "the end", 480)
    assert job.restarts() == 2
    assert [failure["idle"] for failure in failures(job.run_dir)] == [0, 1, 2]
    last = job.log().splitlines()[-1]
    assert re.match(rf"== job {job.job} failed: guard.max_skipped_steps: .*; that makes 2 starts in a row", last)


def test_a_job_that_is_cancelled_does_not_come_back(cluster: Cluster, start: Callable[..., Submitted]) -> None:
    job = start("site.tasks_per_node=1")
    job.wait_for("step 5", lambda: job.steps() >= 5)
    cluster("scancel", job.job)
    wait_until(lambda: job.told()["EndTime"] != "Unknown" and not job.processes(0), "the end")
    time.sleep(10)  # in which it would come back
    assert job.state() == "CANCELLED"
    assert job.restarts() == 0


def test_a_run_that_is_stopped_does_not_come_back(start: Callable[..., Submitted], fmscale: Callable[..., str]) -> None:
    job = start("site.tasks_per_node=1")
    job.wait_for("step 5", lambda: job.steps() >= 5)
    assert "saves at its next step" in fmscale("stop", job.run_dir).stderr
    job.wait_for_end()
    assert (job.endings(), job.restarts()) == (["stopped"], 0)
    assert "nothing to stop; job" in fmscale("stop", job.run_dir).stderr
