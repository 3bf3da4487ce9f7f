"""A checkpoint is whole or absent, says what is wrong with it, and is read by ranges whoever wrote it."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fmscale.distributed import World
from fmscale.engine import saver as saving
from fmscale.engine.checkpoint import (
    Checkpoint,
    Fragments,
    at_step,
    check_fits,
    choose,
    discard,
    find_all,
    latest,
    open_checkpoint,
    restore,
    verify,
)
from fmscale.engine.fragments import DamagedError, write_partition
from fmscale.engine.saver import Retention, SaveError, Saver, prune
from fmscale.engine.zero import Piece
from fmscale.errors import UserError

SHAPES = {"matrix": (3, 4), "vector": (5,)}


def make_pieces(value: float) -> list[Piece]:
    """All of a model of two parameters whose weights count up from `value`."""
    return [
        Piece(name, 0, {"weight": torch.arange(size) + value, "exp_avg": torch.full((size,), value)})
        for name, size in (("matrix", 12), ("vector", 5))
    ]


def begin(saver: Saver, step: int, pieces: list[Piece] | None = None) -> None:
    saver.start(
        make_pieces(float(step)) if pieces is None else pieces,
        step=step,
        updates=step,
        shapes=SHAPES,
        description={"note": "test"},
    )


def write(root: Path, step: int, keep: int = 9, pieces: list[Piece] | None = None, **options: Any) -> Path:
    saver = Saver(root, World(0, 0, 1), Retention(keep), **options)
    begin(saver, step, pieces)
    saver.wait()
    return root / f"step-{step:08d}"


def at(root: Path, step: int | None = None) -> Checkpoint:
    return at_step(root, step, lambda found: found)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, 3)
    found = latest(tmp_path)
    assert found is not None
    verify(found)
    assert (found.step, found.index["updates"], found.index["description"]) == (3, 3, {"note": "test"})
    full = dict(Fragments(found).full("weight"))
    assert torch.equal(full["matrix"], torch.arange(12.0).reshape(3, 4) + 3)
    pieces = make_pieces(0.0)
    restore(found, pieces)
    assert torch.equal(pieces[1].tensors["exp_avg"], torch.full((5,), 3.0))


def test_any_range_is_read_from_the_pieces_of_other_ranks(tmp_path: Path) -> None:
    """Two ranks wrote: 0 … 6 and 7 … 11 of a parameter."""
    folder = write(tmp_path, 1, pieces=[Piece("matrix", 0, {"weight": torch.arange(7.0)})])
    other = write(tmp_path / "other", 1, pieces=[Piece("matrix", 7, {"weight": torch.arange(7.0, 12.0)})])
    second = next(other.glob("*.safetensors"))
    second.rename(folder / "second.safetensors")
    index = json.loads((folder / "index.json").read_text())
    theirs = json.loads((other / "index.json").read_text())["partitions"][0]
    index["partitions"].append({**theirs, "name": "second.safetensors"})
    (folder / "index.json").write_text(json.dumps(index))
    fragments = Fragments(open_checkpoint(folder))
    for start in range(12):
        for length in range(1, 13 - start):
            assert torch.equal(
                fragments.read("weight", "matrix", start, length), torch.arange(start, start + length).float()
            )
    with pytest.raises(UserError, match="weight of matrix is incomplete: 5 of 6"):
        fragments.read("weight", "matrix", 7, 6)
    with pytest.raises(UserError, match=r"holds no ema_0\.9 of matrix"):
        fragments.read("ema_0.9", "matrix", 0, 1)


def test_old_ones_go_once_the_new_one_is_whole(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        write(tmp_path, step, keep=2)
    assert [path.name for path in find_all(tmp_path)] == ["step-00000003", "step-00000010"]
    with pytest.raises(UserError, match="no checkpoint of step 1; there are 3, 10"):
        at(tmp_path, 1)


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, 1)
    found = at(tmp_path, 1)
    check_fits(found, SHAPES, ["weight", "exp_avg"])
    with pytest.raises(UserError, match=r"matrix is \(3, 4\) there and \(2, 4\) in the config's model"):
        check_fits(found, {**SHAPES, "matrix": (2, 4)}, ["weight"])
    with pytest.raises(UserError, match=r"more is absent there and \(1,\) in"):
        check_fits(found, {**SHAPES, "more": (1,)}, ["weight"])
    with pytest.raises(UserError, match=r"holds no ema_0\.9, which the config asks for"):
        check_fits(found, SHAPES, ["weight", "ema_0.9"])


def test_a_damaged_one_is_named_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (tmp_path / "step-00000004" / "index.json").unlink()
    spoil(next((tmp_path / "step-00000003").glob("*.safetensors")), "flipped bit")
    spoil(next((tmp_path / "step-00000002").glob("*.safetensors")), "cut short")
    found = choose(tmp_path, World(0, 0, 1))
    assert found is not None
    assert found.step == 1
    said = [record.getMessage() for record in caplog.records]
    for line, named in zip(said, ("4: not a whole checkpoint", "3/.* damaged", "2/.* cut short"), strict=True):
        assert re.match(f"passed over: .*step-0000000{named}", line)


def test_nothing_but_damage_is_no_new_start(tmp_path: Path) -> None:
    (write(tmp_path, 2) / "index.json").unlink()
    spoil(next(write(tmp_path, 1).glob("*.safetensors")), "flipped bit")
    with pytest.raises(UserError, match="no checkpoint is sound"):
        choose(tmp_path, World(0, 0, 1))
    assert choose(tmp_path / "none", World(0, 0, 1)) is None


def test_some_stay_for_ever_and_damaged_ones_do_not_count(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5, 6):
        write(tmp_path, step)
    (tmp_path / "step-00000006" / "index.json").unlink()
    new = tmp_path / "step-00000005"
    prune(tmp_path, Retention(newest=2, every_steps=3), new)
    assert [path.name[-1] for path in find_all(tmp_path)] == ["3", "4", "5", "6"]
    prune(tmp_path, Retention(newest=9), new)
    prune(tmp_path, Retention(newest=1), new)
    assert [path.name[-1] for path in find_all(tmp_path)] == ["5", "6"]


@pytest.mark.parametrize(("private", "modes"), [(True, (0o700, 0o600)), (False, (0o755, 0o644))])
def test_files_are_the_users_own_unless_told_otherwise(tmp_path: Path, private: bool, modes: tuple[int, int]) -> None:
    before = os.umask(0o022)
    try:
        folder = write(tmp_path, 1, private=private)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == modes[0]
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {modes[1]}


def test_training_goes_on_while_a_snapshot_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is what was there when the save began; a second save waits for the first."""
    go = threading.Event()
    sync = saving.sync
    monkeypatch.setattr(saving, "sync", lambda path: (go.wait(20), sync(path))[1])
    saver, pieces = Saver(tmp_path, World(0, 0, 1), Retention(9)), make_pieces(1.0)
    begin(saver, 1, pieces)
    for piece in pieces:
        piece.tensors["weight"].fill_(99)
    assert saver.busy
    assert find_all(tmp_path) == []
    go.set()
    begin(saver, 2, pieces)
    saver.wait()
    assert not saver.busy
    weights = [dict(Fragments(at(tmp_path, step)).full("weight"))["vector"] for step in (1, 2)]
    assert torch.equal(weights[0], torch.arange(5) + 1.0)
    assert torch.equal(weights[1], torch.full((5,), 99.0))


def test_a_save_that_fails_is_told_once_and_the_next_one_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, World(0, 0, 1), Retention(9))
    begin(saver, 1)
    saver.wait()
    free = shutil.disk_usage(tmp_path)._replace(free=10)
    with monkeypatch.context() as patch:
        patch.setattr(saving.shutil, "disk_usage", lambda path: free)
        begin(saver, 2)
        with pytest.raises(SaveError, match=r"step-00000002: .* could not be written: it needs 0\.00 GB and 0\.00 GB"):
            saver.wait()
    saver.wait()
    begin(saver, 3)
    saver.wait()
    assert [path.name[-1] for path in sorted(tmp_path.iterdir())] == ["1", "3"]


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmscale.engine.fragments.SYNC_BYTES", 20)
    synced: list[int] = []
    tensors = {"a/b": torch.randn(7), "none": torch.zeros(0), "umlaut-ä": torch.arange(3.0)}
    with (tmp_path / "x").open("wb") as new:
        head = write_partition(new.fileno(), tensors, {"ä": 1}, lambda: synced.append(1))
    assert len(synced) == 1  # after the first tensor, which has 28 bytes; the others have 12
    assert (tmp_path / "x").read_bytes().startswith(head)
    with safe_open(tmp_path / "x", "pt") as file:
        assert json.loads(file.metadata()["starts"]) == {"ä": 1}
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def spoil(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how.startswith("flipped bit"):
        place = 40 if how.endswith("head") else len(content) - 3
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    elif how == "cut short":
        file.write_bytes(content[:-1])
    else:
        file.unlink()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("flipped bit", "damaged"),
        ("flipped bit in the head", "damaged"),
        ("cut short", "missing or cut short"),
        ("gone", "missing or cut short"),
    ],
)
def test_damage_is_named(tmp_path: Path, how: str, said: str) -> None:
    spoil(next(write(tmp_path, 1).glob("*.safetensors")), how)
    with pytest.raises(UserError, match=rf"partition-00000-of-00001\.safetensors: {said}"):
        verify(at(tmp_path, 1))


def test_damage_is_noticed_by_those_whom_it_concerns(tmp_path: Path) -> None:
    """The last tensor of the file is a moment of `vector`: who reads weights has nothing to fear."""
    spoil(next(write(tmp_path, 1).glob("*.safetensors")), "flipped bit")
    found = at(tmp_path)
    verify(found, ["weight"])
    assert len(dict(Fragments(found).full("weight"))) == 2
    with pytest.raises(DamagedError, match="the checksum of exp_avg/vector differs"):
        verify(found, ["exp_avg"])
    with pytest.raises(DamagedError, match="the checksum of exp_avg/vector differs"):
        dict(Fragments(found).full("exp_avg"))


def test_a_reader_passes_over_damage_unless_it_was_told_the_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def sound(found: Checkpoint) -> int:
        verify(found)
        return found.step

    for step in (1, 2):
        write(tmp_path, step)
    spoil(next((tmp_path / "step-00000002").glob("*.safetensors")), "flipped bit")
    assert at_step(tmp_path, None, sound) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"passed over: {tmp_path}/step-00000002/partition-00000-of-00001.safetensors: damaged: the checksum of "
        "exp_avg/vector differs"
    ]
    with pytest.raises(DamagedError, match="step-00000002"):
        at_step(tmp_path, 2, sound)
    (tmp_path / "step-00000001" / "index.json").unlink()
    with pytest.raises(UserError, match="no checkpoint is sound"):
        at_step(tmp_path, None, sound)


def test_a_reader_takes_the_checkpoint_that_came_while_the_one_before_went(tmp_path: Path) -> None:
    def slow(found: Checkpoint) -> int:
        if found.step == 1:
            write(tmp_path, 2)
            discard(tmp_path / "step-00000001")
        verify(found)
        return found.step

    write(tmp_path, 1)
    assert at_step(tmp_path, None, slow) == 2


def test_an_unreadable_index_is_named(tmp_path: Path) -> None:
    (write(tmp_path, 1) / "index.json").write_text("{")
    with pytest.raises(UserError, match="step-00000001: not a whole checkpoint"):
        at(tmp_path, 1)


def in_a_fork(action: Callable[[], Any]) -> int | None:
    """Run `action` in a copy of this process; returns its exit code, negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("moment", ["sync", "rmtree", "rename"])
def test_kill_9_at_each_point_of_a_save_leaves_whole_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The process dies at its first, second, third … call of what touches the disk."""
    write(tmp_path, 1)
    deaths = 0
    while in_a_fork(functools.partial(die_in_save, tmp_path, moment, deaths)) == -signal.SIGKILL:
        deaths += 1
        found = latest(tmp_path)
        assert found is not None
        verify(found)
        assert found.step in (1, 2)
        assert torch.equal(dict(Fragments(found).full("weight"))["vector"], torch.arange(5) + float(found.step))
        assert deaths < 50
    assert deaths >= {"sync": 4, "rmtree": 1, "rename": 1}[moment]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]  # the last save lived, and left no debris


def die_in_save(root: Path, moment: str, survived: int) -> None:
    """Save step 2 over step 1, and die at call number `survived` of a function that touches the disk."""
    calls = 0

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if calls == survived:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return function(*args, **kwargs)

        return call

    if moment == "sync":
        saving.sync = mortal(saving.sync)
        saving.os.fsync = mortal(saving.os.fsync)
    elif moment == "rmtree":
        saving.shutil.rmtree = mortal(saving.shutil.rmtree)
    else:
        Path.rename = mortal(Path.rename)  # type: ignore[method-assign]
    write(root, 2, keep=1)


def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 1)
    code = in_a_fork(functools.partial(save_without_room, tmp_path))
    assert code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    found = latest(tmp_path)
    assert found is not None
    verify(found)


def save_without_room(root: Path) -> None:
    """Save with a limit on the size of files, at which the system refuses to write as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        write(root, 2)
    except SaveError as error:
        os._exit(2 if "could not be written" in str(error) else 3)
    os._exit(0)
