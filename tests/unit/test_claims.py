from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fmscale import claims
from fmscale.claims import Claims, has_ended, machine, process
from fmscale.errors import UserError

LONG_S = 1000.0


def test_one_of_many_gets_a_claim(tmp_path: Path) -> None:
    workers = [Claims(tmp_path, LONG_S).__enter__() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for number in range(50):
            taken = list(pool.map(lambda worker, name=f"u{number}": worker.take(name), workers))
            assert sum(taken) == 1
    assert sum(len(worker.mine) for worker in workers) == 50
    for worker in workers:
        worker.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_claim_that_was_released_can_be_taken(tmp_path: Path) -> None:
    with Claims(tmp_path, LONG_S) as first, Claims(tmp_path, LONG_S) as second:
        assert first.take("a")
        assert not first.take("a")
        assert not second.take("a")
        first.release("a")
        assert second.take("a")


def test_a_claim_that_is_released_while_another_tries_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was there when the other asked for it, and is gone when that one looks whose it is."""
    with Claims(tmp_path, LONG_S) as worker:
        monkeypatch.setattr(claims, "link", lambda file, name: False)
        assert not worker.take("a")
        monkeypatch.undo()
        assert worker.take("a")


def test_a_silent_worker_loses_its_claim_and_does_not_release_what_became_anothers(tmp_path: Path) -> None:
    """It is another machine's, of whose processes nothing is known here."""
    with Claims(tmp_path, LONG_S) as slow, Claims(tmp_path, 60.0) as other:
        assert slow.take("a")
        os.utime(tmp_path / f"{slow.worker}.worker", (time.time() - 50, time.time() - 50))
        assert not other.take("a")
        os.utime(tmp_path / f"{slow.worker}.worker", (time.time() - 70, time.time() - 70))
        assert other.take("a")
        slow.release("a")
        assert not slow.take("a")


def test_a_heart_beats(tmp_path: Path) -> None:
    with Claims(tmp_path, 0.2) as worker, Claims(tmp_path, 0.2) as other:
        assert worker.take("a")
        os.utime(tmp_path / "a.claim", (0, 0))
        deadline = time.monotonic() + 30
        while (tmp_path / "a.claim").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not other.is_gone(worker.worker)
    with Claims(tmp_path, 0.2) as other:
        assert other.is_gone(worker.worker)


@pytest.mark.parametrize("reaped", [True, False])
def test_a_dead_process_of_this_machine_is_known_at_once(tmp_path: Path, reaped: bool) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom fmscale.claims import Claims\n"
        f"claims = Claims(Path(sys.argv[1]), {LONG_S}).__enter__()\nassert claims.take('a')\nos.kill(os.getpid(), 9)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    if reaped:
        child.wait()
    with Claims(tmp_path, LONG_S) as other:
        deadline = time.monotonic() + 60
        while not (tmp_path / "a.claim").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        while not other.take("a"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    child.wait()


def test_a_number_that_returned_is_another_process() -> None:
    us = {"machine": machine(), **process(os.getpid())}
    assert not has_ended(us)
    assert has_ended({**us, "started": us["started"] - 1})
    assert not has_ended({**us, "machine": "another", "started": us["started"] - 1})
    assert not has_ended({})


def test_a_file_system_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(claims.os, "link", refuse)
    with pytest.raises(UserError, match="makes no hard links"), Claims(tmp_path, LONG_S) as worker:
        worker.take("a")
