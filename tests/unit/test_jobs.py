"""The table of runs, of which some are damaged or gone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fmscale.errors import UserError
from fmscale.files import append
from fmscale.jobs import _trains, ended, status
from fmscale.slurm import Task, _values
from fmscale.starts import Start


def make_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("steps: 100\n")
    append(folder / "metrics.jsonl", *({"step": step, "loss": 1.5, "step_s": 2.0} for step in range(1, 41)))
    Start(folder, "a", None).begin(ranks=1)
    return folder


def test_a_run_that_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status([make_run(tmp_path / "run")]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["run", "job", "state"]
    assert row.split()[1:5] == ["-", "-", "40/100", "1.5000"]
    assert "0:02:00" in row


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", b"steps: x\n"),
        ("config.yaml", b"\xff\xfe"),
        ("starts.jsonl", b'\xff\n{"ended": "a"}\n'),
        ("metrics.jsonl", b'{"step": 1}{"step": 2}\n{"step": 3}\n'),
    ],
)
def test_a_damaged_run_costs_its_own_row(
    file: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = make_run(tmp_path / "good"), make_run(tmp_path / "bad")
    (bad / file).write_bytes(content)
    assert status([bad, good, tmp_path / "gone"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4
    assert "40/100" in rows[2]
    assert rows[3].endswith("no run was submitted or started here")


def test_one_run_that_is_none_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run was submitted"):
        status([tmp_path])


def test_whether_the_newest_start_of_a_job_trains(tmp_path: Path) -> None:
    def begin(restart: int, job: int = 12) -> Start:
        start = Start(tmp_path, f"{job}.{restart}.0.{time.time()}", Task(job, restart, "0"))
        start.begin(ranks=4)
        return start

    assert not _trains(tmp_path, "12", "0")
    first = begin(0)
    assert _trains(tmp_path, "12", "0")
    assert not _trains(tmp_path, "12", "1"), "the restart has not begun yet"
    second = begin(1)
    first.end("failed", why="cut off")
    assert _trains(tmp_path, "12", "1"), "it was another start that ended"
    second.end("left")
    assert not _trains(tmp_path, "12", "1")


@pytest.mark.parametrize(
    ("state", "over"), [("COMPLETED", True), ("2 COMPLETED, 1 RUNNING", False), ("FORGOTTEN", True), ("UNKNOWN", False)]
)
def test_what_has_ended(state: str, over: bool) -> None:
    assert ended(state) is over


def test_values_with_spaces_and_what_a_user_wrote(tmp_path: Path) -> None:
    line = "JobId=7 JobName=run Restarts=0 CPUs/Task=1 StdOut=/a b/log.out Comment=x Restarts=9"
    told = _values(line)
    assert told["Restarts"] == "0"
    assert told["StdOut"] == "/a b/log.out"
    assert told["CPUs/Task"] == "1"
