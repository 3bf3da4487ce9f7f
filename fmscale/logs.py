"""`fmscale logs`, and `submit --follow`: what a rank of a job prints."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fmscale import slurm
from fmscale.errors import UserError
from fmscale.jobs import describe, ended, newest_job

POLL_S = 1.0
STATE_S = 5.0  # between two questions to Slurm, which has others to answer


def find_log(folder: Path, job: str, rank: int) -> Path | None:
    """Where the output of a rank, or of a task of an array, goes; None as long as there is none."""
    names = (f"{job}_{rank}_log.out", f"{job}_{rank}_0_log.out")
    return next((path for name in names for path in (folder / slurm.FOLDER).glob(f"*/{name}")), None)


def show_log(folder: Path, rank: int) -> int:
    """Print what a rank of the last job has printed so far.

    Raises:
        UserError: there is no such output.
    """
    job = newest_job(folder)
    path = find_log(folder, job, rank) if job else None
    if path is None:
        raise UserError(f"{folder}: {f'no output of rank {rank} of job {job}' if job else 'no job was submitted here'}")
    for piece in _pieces(path):
        sys.stdout.write(piece)
    return 0


def _pieces(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        while piece := file.read(1 << 16):
            yield piece


def follow(folder: Path) -> int:
    """Print what rank 0 of the last job prints, until the job has ended; it comes back as often as it is requeued.

    Returns:
        Exit code: 0 where the job has, else 1.
    """
    job, shown, asked_s, state = newest_job(folder), 0, 0.0, ""
    while True:
        if time.monotonic() - asked_s > STATE_S:
            asked_s, before, state = time.monotonic(), state, describe(job)["JobState"]
            if state != before:
                print(f"job {job}: {state}", file=sys.stderr, flush=True)
        path = find_log(folder, job, 0)
        if path is not None:
            with path.open("rb") as file:
                file.seek(shown)
                while piece := file.read(1 << 16):
                    sys.stdout.write(piece.decode(errors="replace"))
                    shown += len(piece)
                sys.stdout.flush()
        if ended(state):
            return 0 if state.endswith("COMPLETED") and "," not in state else 1
        time.sleep(POLL_S)
