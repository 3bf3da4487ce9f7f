"""A rank that is stopped, killed or hangs: the job ends within a bounded time, and names it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from running import environment, kill_all, lines, output, start, wait_for_lines

from fmscale.config import TrainConfig
from fmscale.distributed import World, free_port, rank_environment
from fmscale.watchdog import STALLS

SILENT_S, STALLED_S = 6, 8
SETTINGS = ("steps=100000", "log.every_steps=1", "data.workers=1", "micro_batch=8", f"guard.silent_s={SILENT_S}")
PROGRAM = Path(__file__).parent / "train_and_hang.py"
WATCHED = Path(__file__).parent / "watched.py"
TO_THE_END = Path(__file__).parent / "watched_to_the_end.py"


def children(pid: int) -> list[int]:
    """The ranks that a launcher has started, in order."""
    found = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return sorted(child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize(("how", "rank"), [("SIGSTOP", 0), ("SIGKILL", 1)])
def test_a_rank_that_is_not_heard_of_ends_the_job_and_is_named(
    tmp_path: Path, make_config: Callable[..., TrainConfig], how: str, rank: int
) -> None:
    config = make_config(tmp_path / "run", *SETTINGS)
    process = start(config, "--nproc", "3")
    output = tmp_path / "output.txt"
    try:
        wait_for_lines(config, process, 5)
        ranks = children(process.pid)
        assert len(ranks) == 3
        os.kill(ranks[rank], signal.Signals[how])
        began, done = time.monotonic(), lines(config.run_dir)
        assert process.wait(60) == 1, output.read_text()
        taken = time.monotonic() - began
    finally:
        kill_all(process)
    said = output.read_text()
    found = re.search(
        rf"rank {rank} on \S+ \(last in step (\d+), [a-z -]+\): not heard of any more; so the job ends", said
    )
    assert found, said
    assert done - 50 <= int(found[1]) <= done + 50  # told once a second
    assert "fmscale/train.py" not in said  # no traceback of ours; a reader whose rank was killed may print its own
    assert taken < 50
    others = {f"rank-{other:05d}.txt" for other in range(3) if other != rank}
    assert {path.name for path in (config.run_dir / STALLS).iterdir()} == others
    stacks = (config.run_dir / STALLS / others.pop()).read_text()
    assert "Thread 0x" in stacks
    assert how == "SIGKILL" or "train_step" in stacks  # whoever was cut off has left it


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_and_is_named(tmp_path: Path, make_config: Callable[..., TrainConfig]) -> None:
    config = make_config(tmp_path / "run", *SETTINGS, f"guard.stalled_s={STALLED_S}")
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), config.model_dump_json()],
            env=environment() | rank_environment(World(rank, rank, 2), "127.0.0.1", port) | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [1, 1], said
    where, why = r"rank 1 on \S+ \(last in step 6, in a micro-batch\)", r"not moved on for \d+ s \(guard\.stalled_s\)"
    assert re.search(f"{where}: {why}; so the job ends", said[0])
    assert "so the job ends" not in said[1]
    stacks = [(config.run_dir / STALLS / f"rank-0000{rank}.txt").read_text() for rank in range(2)]
    assert "train_and_hang.py" in stacks[1]  # the line where it hangs
    assert "distributed_c10d.py" in stacks[0]  # the collective in which it is waited for


@pytest.mark.slow
@pytest.mark.parametrize(("loop", "code", "words"), [(False, 2, "Is a directory"), (True, 1, "Too many levels of")])
def test_an_error_of_rank_0_alone_is_heard_and_keeps_its_exit_code(
    tmp_path: Path, make_config: Callable[..., TrainConfig], loop: bool, code: int, words: str
) -> None:
    """The others read of it and end first; the one error is the user's mistake, the other nobody expected."""
    config = make_config(tmp_path / "run", *SETTINGS)
    process = start(config, "--nproc", "2")
    try:
        wait_for_lines(config, process, 5)
        place = config.run_dir / "metrics.jsonl"
        spoiled = False
        while not spoiled:  # the run may write between one line and the next
            place.unlink(missing_ok=True)
            with suppress(FileExistsError):
                place.symlink_to(place.name) if loop else place.mkdir()
                spoiled = True
        ended = process.wait(60)
    finally:
        kill_all(process)
    said = output(config).read_text()
    assert ended == code, said
    assert said.count(words) == 1
    assert ("Traceback" in said) is loop


def start_watched(
    run_dir: Path, world_size: int, program: Path = WATCHED, *arguments: str
) -> list[subprocess.Popen[str]]:
    """Ranks of a program that is watched."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, str(program), str(run_dir), *arguments],
            env=environment() | rank_environment(World(rank, rank, world_size), "127.0.0.1", port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


@pytest.mark.slow
def test_a_disk_that_hangs_too_does_not_keep_a_rank(tmp_path: Path) -> None:
    """A single rank, whose stacks go where a write never returns: to a pipe that nobody reads."""
    (tmp_path / STALLS).mkdir()
    os.mkfifo(tmp_path / STALLS / "rank-00000.txt")
    (process,) = start_watched(tmp_path, 1)
    try:
        said = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 1
    assert re.search(r"rank 0 on \S+ \(last in step 0, starting\): not moved on for \d+ s", said)


@pytest.mark.slow
def test_an_error_is_told_though_rank_0_was_stopped(tmp_path: Path) -> None:
    """Whose store no longer answers."""
    stopped, failed = start_watched(tmp_path, 2)
    try:
        said = failed.communicate(timeout=120)[1]
    finally:
        for process in (stopped, failed):
            process.kill()
            process.wait()
    assert failed.returncode == 1
    assert "an error of rank 1" in said


def test_a_rank_that_waits_in_the_store_at_the_end_ends_well(tmp_path: Path) -> None:
    """Python would abort if it ended while a thread is there."""
    ranks = start_watched(tmp_path, 2, TO_THE_END, "0.5")
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], said
