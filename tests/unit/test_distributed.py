"""Who a process is among the ranks, as launchers describe it, and who speaks."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fmscale import log
from fmscale.cli import main
from fmscale.distributed import World, check_can_spawn, world_from_environment
from fmscale.errors import UserError

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}


def pretend(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World(0, 0, 1)),
        (TORCHRUN, World(3, 3, 4)),
        (SLURM, World(5, 1, 8)),
        (TORCHRUN | SLURM, World(3, 3, 4)),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, World(0, 0, 1)),  # in a batch script, outside of srun
    ],
)
def test_launchers_are_understood(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], world: World) -> None:
    pretend(monkeypatch, environment)
    assert world_from_environment() == world


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "0"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {**SLURM, "SLURM_LOCALID": ""}],
)
def test_a_rank_that_cannot_be_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: dict[str, str]
) -> None:
    pretend(monkeypatch, environment)
    assert main(["index", "/nowhere"]) == 2
    assert "the environment describes no rank of a job" in capsys.readouterr().err


def test_ranks_of_a_launcher_start_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, SLURM)
    with pytest.raises(UserError, match="leave --nproc out"):
        check_can_spawn(2)


@pytest.mark.parametrize("environment", [SLURM, TORCHRUN], ids=["srun", "torchrun"])
def test_only_the_first_rank_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: dict[str, str]
) -> None:
    pretend(monkeypatch, environment)
    level = logging.getLogger("fmscale").level
    try:
        assert main(["index", "/nowhere"]) == 2
        assert not log.get_logger("fmscale.train").isEnabledFor(logging.INFO)
    finally:
        logging.getLogger("fmscale").setLevel(level)
    assert f"rank {world_from_environment().rank}: /nowhere: no such folder" in capsys.readouterr().err


ENDING = """
import atexit, sys, threading, time, torch
from fmscale import __main__, cli
from fmscale.distributed import end, free_port

class Late:
    def __del__(self):
        print("torn down")

def write():
    time.sleep(0.2)
    print("a thread's")

def crash(argv):
    raise ValueError("crashed")

late = Late()
if "rank" in sys.argv:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    atexit.register(torch.distributed.destroy_process_group)
atexit.register(print, "registered")
threading.Thread(target=write).start()
print("said")
cli.main = crash
__main__.main() if "crash" in sys.argv else end(int(sys.argv[-1]))
"""


def ended(*words: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """A process that ends, as a rank or not, of itself or by a crash."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", ENDING, *words]
    return subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


@pytest.mark.parametrize("rank", [(), ("rank",)], ids=["alone", "rank"])
@pytest.mark.parametrize(("word", "code"), [("3", 3), ("crash", 1)])
def test_a_rank_ends_without_the_teardown_of_the_interpreter(rank: Sequence[str], word: str, code: int) -> None:
    done = ended(*rank, word)
    lines = ["said", "a thread's", "registered", *(() if rank else ("torn down",))]
    assert (done.returncode, done.stdout.splitlines()) == (code, lines), done.stderr
    assert ("ValueError: crashed" in done.stderr) == (word == "crash")


def test_a_rank_that_cannot_write_what_it_printed_says_so() -> None:
    with Path("/dev/full").open("w") as full:
        done = ended("rank", "0", stdout=full.fileno())
    assert (done.returncode, done.stderr) == (1, "what was printed cannot be written: No space left on device\n")


def test_a_rank_to_which_nobody_listens_ends_well() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = ended("rank", "0", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
