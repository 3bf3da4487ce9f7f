"""What Slurm says of this process, of a job, and what it is told."""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from fmscale.distributed import World
from fmscale.errors import OutageError
from fmscale.files import replace_text

FOLDER = "slurm"  # in a run directory: what was submitted, and its logs
DELAY = "FMSCALE_SIGNAL_DELAY_S"  # from the signal to the end, as the batch script was told
Result = TypeVar("Result")
MEET_S = 300.0
ASK_S = 30.0
ATTEMPTS = 6  # a busy controller answers later


class SilenceError(OutageError):
    """A command of Slurm's has failed, or its controller does not answer."""


class Task(NamedTuple):
    """This process's place in Slurm.

    Attributes:
        job: its number.
        restart: how often the job has been started before.
        step: of the job: `0` for the first `srun`, `batch` for the script itself.
        array: number of the array and place in it, such as `12_3`; empty where the job is in none.
    """

    job: int
    restart: int
    step: str
    array: str = ""

    @property
    def handle(self) -> str:
        """What Slurm is told that this job alone is meant: one of an array has the array's number too."""
        return self.array or str(self.job)

    @property
    def start(self) -> str:
        """A name that all ranks of this start of the job have, and no others."""
        return f"{self.job}.{self.restart}.{self.step}"


def this_task(env: Mapping[str, str] = os.environ) -> Task | None:
    """What Slurm's variables say of this process; None outside a job."""
    job = env.get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        return None
    array = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_JOB_ID" in env else ""
    return Task(int(job), int(env.get("SLURM_RESTART_COUNT") or 0), env.get("SLURM_STEP_ID") or "batch", array)


def signal_delay_s(env: Mapping[str, str] = os.environ) -> float:
    """Seconds from Slurm's signal to the end of the job, as its batch script says; infinite where there is none."""
    return float(env.get(DELAY) or math.inf)


def leave_s(signal_delay_s: float) -> float:
    """Seconds from the signal in which all ranks must have ended, such that there is time to requeue."""
    return max(signal_delay_s - 25, signal_delay_s / 3)


@contextmanager
def meeting(world: World, folder: Path) -> Iterator[None]:
    """Where the ranks of a job step meet while the block runs, unless the launcher has said so: rank 0 writes it down.

    Args:
        world: this rank among the others.
        folder: that all of them see; made where there is none.

    Raises:
        OutageError: rank 0 is not heard of.
    """
    task = this_task()
    if task is None or world.world_size == 1 or ("MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ):
        yield
        return
    place = folder / f"{task.start}.address"
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("", 0))
            replace_text(place, f"{socket.gethostname()} {probe.getsockname()[1]}\n")
    deadline = time.monotonic() + MEET_S
    while not place.exists():
        if time.monotonic() > deadline:
            raise OutageError(f"rank 0 has not written {place} for {MEET_S:.0f} s; do all nodes see that folder?")
        time.sleep(0.2)
        with suppress(FileNotFoundError):
            os.listdir(folder)  # lets NFS look again
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place.read_text().split()
    yield
    if world.is_main:
        place.unlink(missing_ok=True)


def ask(*command: str) -> str:
    """What a command of Slurm's prints.

    Raises:
        SilenceError: it fails, or does not answer.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False)
    except FileNotFoundError:
        raise SilenceError(f"{command[0]}: no such program; is this a machine of a Slurm cluster?") from None
    except subprocess.TimeoutExpired:
        raise SilenceError(f"{' '.join(command)}: no answer within {ASK_S:.0f} s") from None
    if done.returncode:
        raise SilenceError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def describe(job: str) -> list[dict[str, str]]:
    """What the controller knows of a job, or of each of an array, as `scontrol show job` names it; maybe nothing."""
    try:
        shown = ask("scontrol", "show", "job", "--oneliner", job)
    except SilenceError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    return [_values(line) for line in shown.splitlines() if line.strip()]


def _values(line: str) -> dict[str, str]:
    """`Key=value Key=value …`, where values may hold spaces; what a user may have written comes last."""
    found: dict[str, str] = {}
    for word in re.split(r" (?=[A-Z][\w:/]*=)", line.strip()):
        key, _, value = word.partition("=")
        found.setdefault(key, value)
    return found


def own_job(task: Task) -> dict[str, str]:
    """What the controller knows of this job, in so far as it is this start of it.

    Raises:
        OutageError: the job has ended, or runs elsewhere by now; or Slurm does not answer again and again.
    """
    told = next(iter(_again_and_again(lambda: describe(task.handle))), {})
    if told.get("Restarts", "0") != str(task.restart):
        raise OutageError(f"job {task.job} was started again meanwhile")
    if told.get("JobState") != "RUNNING":
        raise OutageError(f"job {task.job} is {told.get('JobState', 'forgotten')}, so it does not come back")
    return told


def requeue(task: Task) -> None:
    """Have this job started again; this process ends with its job's current start.

    Raises:
        OutageError: as for `own_job`, or Slurm refuses.
    """

    def act() -> None:
        own_job(task)
        ask("scontrol", "requeue", task.handle)

    _again_and_again(act)


def _again_and_again(action: Callable[[], Result]) -> Result:
    for attempt in range(ATTEMPTS - 1):
        try:
            return action()
        except SilenceError:
            time.sleep(2**attempt)
    return action()
