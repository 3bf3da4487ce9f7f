"""Trainings of two ranks in which a save meets a fault at a given point, and what is left of them.

    python faults_in_saves.py CONFIG FAULT,FAULT… POINT,POINT… [--mount]

Prints a row of JSON for each fault and point, and one for a rank that cannot read its part of a checkpoint. Ranks are
forks of this process, since its imports take longer than all trainings together. With --mount, in a mount namespace of
its own, checkpoints go to a file system of a few megabytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # with all of torch.compile, so that forks need not
import torch

import fmscale.train as training
from fmscale.cli import main
from fmscale.config import TrainConfig, check, dump
from fmscale.distributed import World, free_port, rank_environment
from fmscale.engine import fragments
from fmscale.engine import saver as saving
from fmscale.engine.checkpoint import WRITING, Checkpoint, at_step, verify
from fmscale.runs import start_run_dir

WORLD_SIZE = 2
FAULTY_STEP, FIRST_STOP, SECOND_STOP = 4, 6, 8  # of saves every second step
STOPPED_S = 0.5
GIVE_UP_S = 100


def kill(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(folder: Path) -> None:
    """`run_ranks` lets it go on after a while. Sent to this thread, it stops here and not some way further on."""
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def fill(folder: Path) -> None:
    """Leave no room on the file system, which stays so until the run has ended."""
    with (folder / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while filler.write(bytes(4096)):
            pass


FAULTS = {"kill -9": kill, "no space": fill, "slow rank": stop}


class Arrangement:
    """Makes a rank meet a fault when the save of `FAULTY_STEP` comes to a point.

    Args:
        fault: what happens then; it happens once.
    """

    def __init__(self, fault: Callable[[], None]) -> None:
        self.fault = fault
        self.step = 0
        self.met = False
        self.over, self.writing = threading.Event(), threading.Event()
        write = saving.Saver._write

        def noted(saver: saving.Saver, folder: saving.Folder, snapshot: saving.Snapshot, index: dict[str, Any]) -> None:
            self.step = index["step"]
            write(saver, folder, snapshot, index)

        saving.Saver._write = noted  # type: ignore[method-assign]

    def meet(self) -> None:
        if self.step == FAULTY_STEP and not self.met:
            self.met = True
            self.fault()
            self.over.set()

    def before(self, name: str) -> None:
        """When the saver is about to call one of its own functions."""
        function = getattr(saving.Saver, name)
        setattr(saving.Saver, name, lambda *args: (self.meet(), function(*args))[1])

    def within_file(self, meet: Callable[[], None]) -> None:
        """When a tensor has been written by half."""
        write_at = fragments.write_at

        def torn(descriptor: int, data: bytes | memoryview, offset: int) -> None:
            half = len(data) // 2
            write_at(descriptor, data[:half], offset)
            if len(data) > 1000 and isinstance(data, memoryview):
                meet()
            write_at(descriptor, data[half:], offset + half)

        fragments.write_at = torn

    def at_rename(self, prefix: str, after: bool) -> None:
        """When a folder whose name begins with `prefix` is given another name."""
        rename = Path.rename

        def call(path: Path, target: Path) -> Path:
            concerned = path.name.startswith(prefix)
            if concerned and not after:
                self.meet()
            renamed = rename(path, target)
            if concerned and after:
                self.meet()
            return renamed

        Path.rename = call  # type: ignore[method-assign]

    def beside_writing(self) -> None:
        """In the training thread, while the other is in the middle of a file."""
        train_step = training.train_step

        def step(*args: Any) -> Any:
            if self.writing.is_set():
                self.meet()
            return train_step(*args)

        def wait() -> None:
            if self.step == FAULTY_STEP:
                self.writing.set()
                self.over.wait(GIVE_UP_S)

        training.train_step = step
        self.within_file(wait)


POINTS: dict[str, tuple[int, Callable[[Arrangement], None]]] = {  # the rank that meets the fault, and when
    "before write": (0, lambda it: it.before("_begin")),
    "mid-file": (1, lambda it: it.within_file(it.meet)),
    "after files": (1, lambda it: it.before("_gather")),
    "after index": (0, lambda it: it.at_rename(WRITING, after=False)),
    "after rename": (0, lambda it: it.at_rename(WRITING, after=True)),
    "during retention": (0, lambda it: it.at_rename("step-", after=True)),
    "during background write": (1, lambda it: it.beside_writing()),
}


def nothing() -> None:
    """No fault."""


def run_ranks(config: TrainConfig, concerned: int = 0, prepare: Callable[[], None] = nothing) -> tuple[list[int], str]:
    """Train in forks.

    Args:
        config: what to train.
        concerned: the rank that is prepared to meet a fault.
        prepare: does so.

    Returns:
        Exit codes of the ranks, a signal as a negative number, and all that they said. If one dies or fails, the
        others are killed, as a launcher does.
    """
    yaml, said = config.run_dir.with_suffix(".yaml"), config.run_dir.with_suffix(".txt")
    yaml.write_text(dump(config))
    said.unlink(missing_ok=True)
    port = free_port()
    prepared = [prepare if rank == concerned else nothing for rank in range(WORLD_SIZE)]
    ranks = [fork(functools.partial(be_rank, rank, port, yaml, said, prepared[rank])) for rank in range(WORLD_SIZE)]
    codes: dict[int, int] = {}
    while len(codes) < WORLD_SIZE:
        pid, status = os.waitpid(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            newest_sound(config.run_dir)  # at no time is there none
            time.sleep(STOPPED_S)
            os.kill(pid, signal.SIGCONT)
            continue
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] not in (0, 2):
            for other in set(ranks) - set(codes):
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in ranks], said.read_text()


def fork(action: Callable[[], None]) -> int:
    if pid := os.fork():
        return pid
    signal.alarm(GIVE_UP_S)
    action()
    os._exit(99)


def be_rank(rank: int, port: int, yaml: Path, said: Path, prepare: Callable[[], None]) -> None:
    os.environ |= rank_environment(World(rank, rank, WORLD_SIZE), "127.0.0.1", port)
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        prepare()
        code = main(["train", str(yaml)])
    finally:
        os._exit(code)


def newest_sound(run_dir: Path) -> int:
    """Step of the newest whole checkpoint; its checksums are right."""

    def checked(found: Checkpoint) -> int:
        verify(found)
        return found.step

    return at_step(run_dir / "checkpoints", None, checked)


def digests(run_dir: Path) -> list[str]:
    """Of the files of the last checkpoint."""
    files = sorted((run_dir / "checkpoints" / f"step-{SECOND_STOP:08d}").glob("*.safetensors"))
    assert len(files) == WORLD_SIZE
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def make_run(config: TrainConfig, name: str, steps: int, room: Path) -> TrainConfig:
    """The config of a run whose checkpoints are in a folder of `room`."""
    run_dir = config.run_dir / name.replace(" ", "-")
    if not run_dir.exists():
        start_run_dir(config.model_copy(update={"run_dir": run_dir, "steps": steps}), ["cpu"], {})
        (room / run_dir.name).mkdir()
        (run_dir / "checkpoints").symlink_to(room / run_dir.name)
    return config.model_copy(update={"run_dir": run_dir, "steps": steps})


def try_fault(config: TrainConfig, room: Path, fault: str, point: str, whole: list[str]) -> dict[str, Any]:
    """Train with the fault, look what is there, train on without it, and compare with a run that met none."""
    first, again = (make_run(config, f"{fault} {point}", steps, room) for steps in (FIRST_STOP, SECOND_STOP))
    folder = again.run_dir / "checkpoints"
    concerned, arrange = POINTS[point]
    codes, said = run_ranks(first, concerned, lambda: arrange(Arrangement(lambda: FAULTS[fault](folder))))
    (folder / "filler").unlink(missing_ok=True)
    newest = newest_sound(again.run_dir)
    codes_again, said_again = run_ranks(again)
    assert codes_again == [0] * WORLD_SIZE, said_again
    row = {
        "fault": fault,
        "point": point,
        "codes": codes,
        "newest": newest,
        "resumed": [int(line[-8:]) for line in said_again.splitlines() if line.startswith("resumed ")],
        "same": digests(again.run_dir) == whole,
        "left": sorted(path.name for path in folder.iterdir()),
        "complaints": [line for line in said.splitlines() if "could not be written" in line],
    }
    shutil.rmtree(folder.resolve())
    return row


def fail_to_restore(config: TrainConfig) -> dict[str, Any]:
    """Go on with a run of whose checkpoint one rank cannot read its part."""

    def fail(*args: object) -> None:
        raise OSError("the disk of one rank hiccups")

    def prepare() -> None:
        training.checkpoints.restore = fail

    codes, said = run_ranks(config, 1, prepare)
    return {"codes": codes, "complaints": [line for line in said.splitlines() if "hiccups" in line]}


if __name__ == "__main__":
    config = check(TrainConfig, json.loads(sys.argv[1]), "test")
    room = config.run_dir / "room"
    room.mkdir(parents=True)
    torch.empty(1, device="meta").normal_()  # these two import much, and start programs, so that the forks need not
    assert deepspeed.ops.__compatible_ops__
    if "--mount" in sys.argv:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(room)], check=True)
    reference = make_run(config, "whole", SECOND_STOP, room)
    codes, said = run_ranks(reference)
    assert codes == [0] * WORLD_SIZE, said
    print("RESTORE " + json.dumps(fail_to_restore(make_run(config, "whole", SECOND_STOP + 2, room))))
    whole = digests(reference.run_dir)
    for fault in sys.argv[2].split(","):
        for point in sys.argv[3].split(","):
            print("ROW " + json.dumps(try_fault(config, room, fault, point, whole)), flush=True)
