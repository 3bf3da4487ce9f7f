"""How far work has come, why it failed, and how often in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from fmscale.errors import UserError
from fmscale.requeue import _gone, _note, cause, failures, requeue
from fmscale.slurm import Task
from fmscale.starts import Start

OLD = "== job 12, restart 0, on n[1-2]\nfmscale train: run_dir: is gone\n== job 12 failed: …; requeued\n"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (
            "step 3 of 8\nfmscale train: data: no such folder\nsrun: error: n1: task 0: Exited with exit code 2\n",
            "data",
        ),
        (
            "srun: error: n2: task 3: Killed\nsrun: error: n1: tasks 0-1: Terminated\n",
            "srun: error: n2: task 3: Killed",
        ),
        ("Traceback (most recent call last):\n  File\ntorch.OutOfMemoryError: 3 GB\n", "torch.OutOfMemoryError: 3 GB"),
        ("nothing of note\n", "exit code 9"),
    ],
)
def test_the_cause_is_a_line_of_the_last_start(said: str, why: str, tmp_path: Path) -> None:
    log = tmp_path / "log.out"
    log.write_text(f"{OLD}== job 12, restart 1, on n[1-2]\n{said}")
    found = cause(log, 9)
    assert why in found
    assert "\n" not in found
    assert "is gone" not in found


def test_a_log_that_is_not_there_has_an_exit_code_for_a_cause(tmp_path: Path) -> None:
    assert cause(tmp_path / "log.out", 137) == "exit code 137"


def test_failures_without_progress_are_counted(tmp_path: Path) -> None:
    def fail(restart: int, job: int = 12, code: int = 1) -> int:
        return _note(Task(job, restart, "batch"), tmp_path, code, "why")

    done = tmp_path / "unfinished" / "done"
    assert fail(0) == 1
    (done / "unit").mkdir(parents=True)
    assert fail(1) == 0
    assert [fail(2), fail(3)] == [1, 2]
    assert [fail(4, code=140), fail(5, code=140), fail(6)] == [1, 2, 1], "to leave early is no failure"
    assert fail(0, job=13) == 1, "another job begins anew"
    assert [failure["reached"] for failure in failures(tmp_path)] == [0, 1, 1, 1, 1, 1, 1, 1]


def test_a_line_that_a_power_cut_has_torn_costs_itself_alone(tmp_path: Path) -> None:
    for restart in (0, 1):
        _note(Task(12, restart, "batch"), tmp_path, 1, "why")
        with (tmp_path / "slurm" / "failures.jsonl").open("a") as file:
            file.write('{"job": 12, "ti')
    assert [failure["restart"] for failure in failures(tmp_path)] == [0, 1]
    assert _note(Task(12, 2, "batch"), tmp_path, 1, "why") == 3


def test_a_run_that_is_another_s_by_now_is_left_to_it(tmp_path: Path) -> None:
    mine = Task(12, 0, "batch")
    assert _gone(mine, tmp_path) == "", "a dataset that is made has no starts"
    Start(tmp_path, "11.0.0.z", Task(11, 0, "0")).begin(ranks=4)
    assert _gone(mine, tmp_path) == "", "that job was before this one, which has not begun yet"
    Start(tmp_path, "12.0.0.a", Task(12, 0, "0")).begin(ranks=4)
    assert _gone(mine, tmp_path) == ""
    Start(tmp_path, "b", None).begin(ranks=1)
    assert "begun again by a start by hand" in _gone(mine, tmp_path)
    Start(tmp_path, "13.0.0.c", Task(13, 0, "0")).begin(ranks=4)
    assert "begun again by job 13" in _gone(mine, tmp_path)
    assert _gone(Task(13, 0, "batch"), tmp_path) == ""
    (tmp_path / "STOP").touch()
    assert "told to stop" in _gone(Task(13, 0, "batch"), tmp_path)


def test_outside_of_a_job_nothing_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match="not a job of Slurm's"):
        requeue(tmp_path, 0)


@pytest.mark.parametrize("how", ["done", "stopped"])
@pytest.mark.parametrize(("code", "kept"), [(0, 0), (140, 0), (143, 0), (1, 1), (134, 134)])
def test_a_signal_that_meets_a_run_at_its_end_is_no_failure(
    how: Literal["done", "stopped"], code: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's reaches ranks that have said how they ended, and listen no more."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    start = Start(tmp_path, "12.0.0.a", Task(12, 0, "0"))
    start.begin(ranks=4)
    start.end(how)
    assert requeue(tmp_path, code) == kept
