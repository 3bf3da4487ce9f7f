"""Workers that are killed, stopped and started at random make the dataset of one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from encoding import assert_same, done, make_source, settings
from running import PATIENCE_S, environment

from fmscale.cli import main
from fmscale.config import EncodeConfig, load
from fmscale.data.index import Index
from fmscale.encode import encode

pytestmark = pytest.mark.slow

KILLS = 5
SCRIPT = Path(__file__).parents[2] / "tools" / "encode_latents.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("source")
    make_source(out)
    return out


@pytest.fixture(scope="module")
def whole(source: Path) -> Index:
    config, *overrides = settings(source, source / "whole")
    return encode(load(EncodeConfig, Path(config), overrides))


def start(
    source: Path, out: Path, *more: str, program: Sequence[str | Path] = ("-m", "fmscale", "encode")
) -> subprocess.Popen[bytes]:
    with (source / f"{out.name}.txt").open("a") as file:
        command = [sys.executable, *program, *settings(source, out, *more)]
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment(), start_new_session=True)


def wait_for(reached: Callable[[], bool], worker: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert worker is None or worker.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end(worker: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, number)


def test_three_workers_killed_at_random_make_the_same_dataset(source: Path, whole: Index) -> None:
    """Killed without warning, one after another, and started again; one decodes by itself, the others in processes."""
    out, dice = source / "killed", random.Random(0)
    workers = [start(source, out, f"workers={number}") for number in range(3)]
    kills, deadline = 0, time.monotonic() + PATIENCE_S
    try:
        while not (out / "manifest.json").exists():
            assert time.monotonic() < deadline, (source / "killed.txt").read_text()
            time.sleep(dice.uniform(0, 0.3))
            # Before the first unit of a fresh start there is nothing to kill but imports.
            if kills < KILLS and done(out) > kills:
                worker = dice.randrange(3)
                end(workers[worker])
                workers[worker].wait()
                workers[worker] = start(source, out, f"workers={worker}")
                kills += 1
        assert [worker.wait(PATIENCE_S) for worker in workers] == [0, 0, 0], (source / "killed.txt").read_text()
    finally:
        for worker in workers:
            end(worker)
            worker.wait()
    assert kills >= 3
    assert_same(out, whole)


def test_a_worker_that_slept_is_overtaken_and_repeats_nothing(source: Path, whole: Index) -> None:
    """Stopped by a signal it is silent and not dead; its unit is done by another before it wakes."""
    out = source / "slept"
    slow = start(source, out, "claim_timeout_s=1")
    try:
        wait_for(lambda: done(out) > 0 and bool(list(out.glob("unfinished/writing/*/*.partial"))), slow)
        end(slow, signal.SIGSTOP)
        held = [path.stem for path in out.glob("unfinished/claims/*.claim")]
        fast = start(source, out, "claim_timeout_s=1")
        assert fast.wait(PATIENCE_S) == 0, (source / "slept.txt").read_text()
        end(slow, signal.SIGCONT)
        assert slow.wait(PATIENCE_S) == 0, (source / "slept.txt").read_text()
    finally:
        end(slow)
        slow.wait()
    assert held
    assert f"{held[0]}: the worker that was at it is dead, so another takes it" in (source / "slept.txt").read_text()
    assert_same(out, whole)


def test_local_workers_do_without_one_that_is_killed(source: Path, whole: Index) -> None:
    out = source / "local"
    parent = start(source, out, "--nproc", "2", program=[SCRIPT])  # which workers read as they begin
    try:
        wait_for(lambda: done(out) > 0 and len(list(out.glob("unfinished/claims/*.worker"))) == 2, parent)
        owner = json.loads(min(out.glob("unfinished/claims/*.worker")).read_text())
        os.kill(owner["pid"], signal.SIGKILL)
        assert parent.wait(PATIENCE_S) == 0, (source / "local.txt").read_text()
    finally:
        end(parent)
        parent.wait()
    assert_same(out, whole)


def test_local_workers_end_with_their_parent(source: Path) -> None:
    out = source / "orphans"
    parent = start(source, out, "shard_samples=1", "--nproc", "2")  # many units: they must not be done too soon
    try:
        wait_for(lambda: done(out) > 0, parent)
        parent.kill()
        parent.wait()
        wait_for(lambda: not list(out.glob("unfinished/claims/*")))
        assert not (out / "manifest.json").exists()
    finally:
        end(parent)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_worker_that_is_asked_to_end_lets_go_of_its_work(
    source: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    out = source / f"ended{number}"
    worker = start(source, out)
    try:
        wait_for(lambda: done(out) > 1, worker)
        end(worker, number)
        assert worker.wait(PATIENCE_S) == 130
    finally:
        end(worker)
        worker.wait()
    assert list((out / "unfinished" / "claims").iterdir()) == []
    assert list((out / "unfinished" / "writing").iterdir()) == []
    assert "fmscale encode: interrupted" in (source / f"{out.name}.txt").read_text()
    assert main(["index", str(out)]) == 2
    assert "is not finished: let its `fmscale encode` come to an end, or start it again" in capsys.readouterr().err
