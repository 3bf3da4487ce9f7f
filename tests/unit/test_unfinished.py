from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fmscale.data.index import Index
from fmscale.data.index_build import build_index
from fmscale.data.shards import ShardWriter
from fmscale.errors import UserError
from fmscale.unfinished import Job, Outcome, check_same, clear_up, is_finished, open_job, read_manifest

UNITS = ["a", "b", "c"]
LONG_S = 60.0
NULL = {"clip_l": torch.zeros(2, 3)}


def description(**changes: Any) -> dict[str, Any]:
    return {
        "config": {"dtype": "fp32", "text": {"t5": None}},
        "units": UNITS,
        "made_by": {"vae": {"sha256": "0"}},
    } | changes


def make(job: Job, unit: str, samples: int = 2, key: str = "") -> bool:
    """What a worker does with a unit."""
    with job.attempt(unit) as folder:
        with ShardWriter(folder, prefix=f"{unit}-") as writer:
            for number in range(samples):
                writer.write(f"{key or unit}{number}", {"latents": torch.full((1, 2, 2), float(number))}, {})
        return job.commit(unit, folder, Outcome([{"key": f"{unit}x", "reason": "broken"}], {"odd": 2}))
    return False


def make_all(
    out: Path,
    units: list[str] = UNITS,
    samples: int = 2,
    key: str = "",
    finish: Callable[[Job], None] = lambda job: job.finish(lambda: NULL, {}),
) -> None:
    """What a worker does that is alone."""
    with open_job(out, description(units=units), LONG_S) as job:
        for unit in job.claimed():
            make(job, unit, samples, key)
        finish(job)


def test_workers_share_the_units_and_one_puts_everything_in_place(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_job(out, description(), LONG_S) as first:
        with open_job(out, description(), LONG_S) as second:
            units, others = first.claimed(), second.claimed()
            mine = [next(units), next(others), next(units)]
            assert sorted(mine) == UNITS
            for job, unit in zip((first, second, first), mine, strict=True):
                assert make(job, unit)
            assert list(units) == list(others) == []
            assert not is_finished(out)
            second.finish(lambda: NULL, {"program": "tests"})
        first.finish(pytest.fail, {"program": "tests"})
    index = Index.open(out)
    assert sorted(index.key(row) for row in range(len(index))) == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert index.made_by == {"program": "tests"}
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [failure["key"] for failure in failures] == ["ax", "bx", "cx"]
    manifest = read_manifest(out)
    assert (manifest["samples"], manifest["buckets"], manifest["failures"]) == (6, {"2x2": 6}, {"broken": 3})
    assert manifest["odd"] == 6
    assert not (out / "unfinished").exists()


def test_of_two_who_make_a_unit_one_has_made_it(tmp_path: Path) -> None:
    with (
        open_job(tmp_path, description(units=["a"]), LONG_S) as slow,
        open_job(tmp_path, description(units=["a"]), LONG_S) as fast,
    ):
        assert next(slow.claimed()) == "a"
        assert make(fast, "a", samples=3)
        assert not make(slow, "a", samples=2)
        assert list((tmp_path / "unfinished" / "writing").iterdir()) == []
        slow.finish(lambda: NULL, {})
    assert len(Index.open(tmp_path)) == 3


def test_who_was_taken_for_dead_goes_on_with_the_next_unit(tmp_path: Path) -> None:
    """Others have done its unit, and removed what it had begun."""
    with open_job(tmp_path, description(), LONG_S) as slow, open_job(tmp_path, description(), LONG_S) as fast:
        with slow.attempt("a") as folder, ShardWriter(folder) as writer:
            (tmp_path / "unfinished" / "claims" / f"{folder.name.partition('.')[2]}.worker").unlink()
            assert make(fast, "a")
            assert not folder.exists()
            writer.write("a0", {"latents": torch.zeros(1, 2, 2)}, {})
        assert list((tmp_path / "unfinished" / "writing").iterdir()) == []


def test_what_another_removes_can_no_longer_be_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that was taken for dead wakes while another removes its files, one after another."""
    remove, woken = shutil.rmtree, []

    def slowly(path: Path, ignore_errors: bool = False) -> None:
        if not woken:
            woken.append(path)
            with pytest.raises(FileNotFoundError):
                slow.commit("a", folder, Outcome())
        remove(path, ignore_errors)

    with open_job(tmp_path, description(), LONG_S) as slow, open_job(tmp_path, description(), LONG_S) as fast:
        with slow.attempt("a") as folder:
            (tmp_path / "unfinished" / "claims" / f"{folder.name.partition('.')[2]}.worker").unlink()
            monkeypatch.setattr(shutil, "rmtree", slowly)
            assert make(fast, "a")
        assert woken
        assert len(list((tmp_path / "unfinished" / "done" / "a").glob("*.tar"))) == 1


def test_a_unit_comes_back_to_the_one_that_was_taken_for_dead(tmp_path: Path) -> None:
    """The other had removed its files, and died."""
    with open_job(tmp_path, description(units=["a"]), LONG_S) as slow:
        units = slow.claimed()
        with slow.attempt(next(units)) as folder, ShardWriter(folder) as writer:
            shutil.rmtree(folder)
            writer.write("a0", {"latents": torch.zeros(1, 2, 2)}, {})
        patience = threading.Timer(3, slow.close)
        patience.start()
        assert next(units, None) == "a"
        patience.cancel()


def test_who_comes_when_all_is_done_by_others_has_nothing_to_complain_of(tmp_path: Path) -> None:
    with open_job(tmp_path, description(), LONG_S) as slow:
        units = slow.claimed()
        unit = next(units)
        with open_job(tmp_path, description(), LONG_S) as fast:
            for name in UNITS:
                make(fast, name)
            fast.finish(lambda: NULL, {})
        make(slow, unit)
        pytest.fail("the folder is gone")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["index"]


@pytest.mark.parametrize("renames", range(4))  # of the three shards and the index
def test_a_death_while_everything_is_put_in_place_is_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    rename, left = Path.rename, renames

    def dying(self: Path, target: Path) -> Path:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return rename(self, target)

    def finish(job: Job) -> None:
        monkeypatch.setattr(Path, "rename", dying)
        job.finish(lambda: NULL, {})

    with pytest.raises(KeyboardInterrupt):
        make_all(tmp_path, finish=finish)
    monkeypatch.undo()
    assert not is_finished(tmp_path)
    assert len(list(tmp_path.glob("*.tar"))) == min(renames, 3)
    make_all(tmp_path)
    assert len(Index.open(tmp_path)) == 6


def test_keys_that_come_twice_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"key 'k\d' is in .*/a-2x2-00000\.tar and .*/b-2x2-00000\.tar"):
        make_all(tmp_path, units=["a", "b"], key="k")
    with pytest.raises(UserError, match="is not finished"):
        Index.open(tmp_path)


def test_nothing_usable_leaves_nothing(tmp_path: Path) -> None:
    def wait_for_another() -> None:
        with open_job(tmp_path / "out", description(), LONG_S) as job:
            with pytest.raises(UserError, match=r"not one sample could be made \(3 x broken\)"):
                make_all(tmp_path / "out", samples=0)
            job.finish(lambda: NULL, {})

    with pytest.raises(UserError, match="unfinished was removed: another worker found no image that could be used"):
        wait_for_another()
    assert list(tmp_path.iterdir()) == []


def test_what_a_worker_left_that_was_killed_at_the_very_end_is_cleared_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)
    make_all(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="is not finished"):
        build_index(tmp_path, None)
    clear_up(tmp_path)
    assert len(build_index(tmp_path, None)) == 6


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"config": {"dtype": "bf16", "text": {"t5": None}}}, 'config.dtype was "fp32", and is "bf16"'),
        ({"config": {"dtype": "fp32", "text": {"t5": "x"}}}, 'config.text.t5 was null, and is "x"'),
        ({"units": ["a", "b"]}, "of the source, c is gone"),
        ({"units": ["a", "b", "c", "d"]}, "of the source, d is new"),
        ({"made_by": {"vae": {"sha256": "1"}}}, 'made_by.vae.sha256 was "0", and is "1"'),
    ],
)
def test_what_was_begun_otherwise_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with open_job(tmp_path, description(), LONG_S) as job:
        make(job, "a")
    with pytest.raises(UserError, match=complaint), open_job(tmp_path, description(**changes), LONG_S):
        pytest.fail("it was let in")
    check_same(tmp_path, description())
    assert [path.name for path in (tmp_path / "unfinished" / "done").iterdir()] == ["a"]


def test_a_file_system_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    with pytest.raises(UserError, match="makes no hard links"), open_job(tmp_path, description(), LONG_S):
        pytest.fail("it was let in")


def test_another_folder_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"")
    with pytest.raises(UserError, match="exists already; give another folder, or remove it first"):
        check_same(tmp_path, description())
