"""Who trains in a run directory: each start of a run writes itself down there, and only the newest may write.

    RUN/starts.jsonl    one object when a start begins, one when it ends, and one when its job judges a failure

A rank may outlive its job: cut off from Slurm, it trains on while the job runs elsewhere. Before it writes, it looks
here, and finds that it is no longer the newest.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fmscale.distributed import World, everywhere, from_main
from fmscale.errors import OutageError
from fmscale.files import append_safely, read_records
from fmscale.slurm import Task, this_task

STARTS = "starts.jsonl"
STOP, SAVE = "STOP", "SAVE"  # files that ask something of a run
BEGAN, ENDED = "began", "ended"  # what an object's first key says
Ending = Literal["done", "stopped", "left", "failed"]


class Start(NamedTuple):
    """One start of a run, on all its ranks.

    Attributes:
        run_dir: of the run.
        name: no other start has it.
        task: what Slurm says of it, or None.
    """

    run_dir: Path
    name: str
    task: Task | None

    def begin(self, ranks: int) -> None:
        """Become the newest start of the run; rank 0 calls it, before it changes anything.

        Raises:
            OutageError: the job has been started again since.
        """
        newest = newest_start(self.run_dir)
        if self.task and newest.get("job") == self.task.job and newest["restart"] > self.task.restart:
            raise OutageError(self._overtaken(newest))
        self.run_dir.mkdir(parents=True, exist_ok=True)
        where = {"job": self.task.job, "restart": self.task.restart} if self.task else {}
        facts = {"host": socket.gethostname(), "ranks": ranks, "updates": updates_saved(self.run_dir)}
        append_safely(self.run_dir / STARTS, {BEGAN: self.name, "time": time.time(), **where, **facts})

    def check(self) -> None:
        """Refuse to write on behalf of a start that is no longer the newest.

        Raises:
            OutageError: names the one that is.
        """
        newest = newest_start(self.run_dir)
        if newest and newest[BEGAN] != self.name:
            raise OutageError(self._overtaken(newest))

    def _overtaken(self, newest: Mapping[str, Any]) -> str:
        job = f"job {newest['job']}, restart {newest['restart']}, " if "job" in newest else ""
        where = f"{job}on {newest['host']}"
        return f"{self.run_dir}: the run was started again ({where}), so this start of it writes no more"

    def touch(self) -> None:
        """Be seen to live: the time of the file is the run's last heartbeat."""
        with suppress(OSError):  # a file server that hiccups is no reason to end a run
            os.utime(self.run_dir / STARTS)

    def end(self, how: Ending, why: str = "") -> None:
        """Say how this start has ended; rank 0 calls it."""
        facts = {"how": how, "why": " ".join(why.split())}
        append_safely(self.run_dir / STARTS, {ENDED: self.name, "time": time.time(), **facts})


def new_start(run_dir: Path, world: World) -> Start:
    """The start that all ranks are in, which is the run's newest when this returns; every rank calls it.

    Raises:
        OutageError: the job has been started again since.
    """
    task, number = this_task(), f"{from_main(secrets.randbits(48), world.device):012x}"
    start = Start(run_dir, f"{task.start}.{number}" if task else number, task)
    everywhere(lambda: start.begin(world.world_size) if world.is_main else None, world.device)
    return start


def read(run_dir: Path) -> list[dict[str, Any]]:
    """What starts have written, oldest first."""
    return read_records(run_dir / STARTS)


def newest_start(run_dir: Path) -> dict[str, Any]:
    """What the newest start has written when it began; empty where there was none."""
    return next((record for record in reversed(read(run_dir)) if BEGAN in record), {})


def updates_saved(run_dir: Path) -> int:
    """Optimizer steps that had been applied when the newest checkpoint was written; 0 where there is none."""
    for folder in sorted((run_dir / "checkpoints").glob("step-*"), key=lambda path: (len(path.name), path.name))[::-1]:
        try:
            return int(json.loads((folder / "index.json").read_text())["updates"])
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return 0
