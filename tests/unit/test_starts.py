"""Which start of a run may write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmscale.errors import OutageError
from fmscale.slurm import Task
from fmscale.starts import STARTS, Start, read, updates_saved


def begin(run_dir: Path, job: int, restart: int) -> Start:
    task = Task(job, restart, "0")
    start = Start(run_dir, task.start, task)
    start.begin(ranks=4)
    return start


def test_only_the_newest_start_may_write(tmp_path: Path) -> None:
    first = begin(tmp_path, 12, 0)
    first.check()
    second = begin(tmp_path, 12, 1)
    second.check()
    with pytest.raises(OutageError, match="job 12, restart 1, on"):
        first.check()
    by_hand = Start(tmp_path, "0123456789ab", None)
    by_hand.begin(ranks=1)
    with pytest.raises(OutageError, match="started again"):
        second.check()


def test_a_start_that_comes_late_does_not_begin(tmp_path: Path) -> None:
    newest = begin(tmp_path, 12, 2)
    with pytest.raises(OutageError, match="restart 2"):
        begin(tmp_path, 12, 1)
    newest.check()
    begin(tmp_path, 13, 0).check()


def test_what_an_old_start_says_of_its_end_makes_it_no_newer(tmp_path: Path) -> None:
    first, second = begin(tmp_path, 12, 0), begin(tmp_path, 12, 1)
    first.end("failed", why="cut off")
    second.check()
    assert [record.get("how") for record in read(tmp_path)] == [None, None, "failed"]


def test_a_line_that_a_power_cut_has_left_is_passed_over(tmp_path: Path) -> None:
    start = begin(tmp_path, 12, 0)
    with (tmp_path / STARTS).open("a") as file:
        file.write('{"began": "12.')
    start.check()
    begin(tmp_path, 12, 1).check()
    assert [record["restart"] for record in read(tmp_path)] == [0, 1]


def test_the_newest_checkpoint_that_is_whole_tells_how_far_a_run_has_come(tmp_path: Path) -> None:
    assert updates_saved(tmp_path) == 0
    for step, updates in ((8, 7), (100_000_000, 90)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "index.json").write_text(json.dumps({"updates": updates}))
    assert updates_saved(tmp_path) == 90
    (folder / "index.json").write_text("{")
    assert updates_saved(tmp_path) == 7
