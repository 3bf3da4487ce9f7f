"""The last line of a batch script: whether its job comes back.

    the program ended well              no, even if a signal met it when all was done
    it was told to leave, by a signal   yes: Slurm's time is over, or another job's has come
    it failed                           yes, unless it has failed twice without getting any further
    it was stopped, or another job has begun the run since      no

A failure is written down in FOLDER/slurm, with how far the work had come.
"""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

from fmscale import slurm
from fmscale.errors import UserError
from fmscale.files import append_safely, read_records
from fmscale.slurm import Task, this_task
from fmscale.starts import BEGAN, ENDED, STOP, newest_start, read, updates_saved

FAILURES = "failures.jsonl"
ENOUGH = 2  # failures in a row without progress
LEFT_CODES = (130, 128 + signal.SIGUSR2)  # `encode` was interrupted; a rank was signalled before it could listen
LATE_CODES = (*LEFT_CODES, 128 + signal.SIGTERM)  # or when it had done all and listened no more
ENOUGH_LEFT = 10  # such endings in a row without progress
LEFT_EARLY = "told to leave before there was anything to save"
NO_MORE = "that makes {} starts in a row without progress, so it stops"
OPENING = "== job"  # the batch script's first line in the log of each start


def requeue(folder: Path, code: int) -> int:
    """Have this job started again where it is worth it.

    Args:
        folder: the run directory, or the dataset that is made.
        code: with which the program ended.

    Returns:
        The job's exit code, where it does not come back.

    Raises:
        UserError: this is no job of Slurm's.
        OutageError: Slurm does not answer, the job was cancelled, or it runs elsewhere by now.
    """
    task = this_task()
    if task is None:
        raise UserError("this is not a job of Slurm's; `requeue` is for the end of a batch script")
    ended = _of(task, folder, ENDED)
    how = ended.get("how", "done" if code == 0 else "failed")
    if how in ("done", "stopped"):
        return 0 if code in LATE_CODES else code
    if refusal := _gone(task, folder):
        print(f"{OPENING} {task.job} does not come back: {refusal}", flush=True)
        return code
    job, idle, enough = slurm.own_job(task), 0, ENOUGH
    said = "left as asked"
    if how != "left" and job.get("PreemptTime", "None") == "None":
        told = code in LEFT_CODES
        why = ended.get("why") or (LEFT_EARLY if told else cause(Path(job.get("StdOut", "")), code))
        idle, enough = _note(task, folder, code, why), ENOUGH_LEFT if told else ENOUGH
        said = f"failed: {why}"
    again = idle < enough
    print(f"{OPENING} {task.job} {said}; {'requeued' if again else NO_MORE.format(enough)}", flush=True)
    if again:
        slurm.requeue(task)
    return code


def _gone(task: Task, folder: Path) -> str:
    """Why the work in a folder is no longer this job's; empty where it is."""
    if (folder / STOP).exists():
        return "the run was told to stop"
    newest, begun = newest_start(folder), any(record.get("job") == task.job for record in read(folder))
    if begun and newest.get("job") != task.job:  # one that has not begun yet finds older starts than itself
        other = f"job {newest['job']}" if "job" in newest else "a start by hand"
        return f"the run was begun again by {other}, on {newest['host']}"
    return ""


def _of(task: Task, folder: Path, kind: str) -> dict[str, Any]:
    """What this start of the job has written of itself, or nothing."""
    mine = f"{task.job}.{task.restart}."
    return next((record for record in reversed(read(folder)) if str(record.get(kind, "")).startswith(mine)), {})


def _note(task: Task, folder: Path, code: int, why: str) -> int:
    """Write a failure down; returns how many alike there were in a row without progress, this one included."""
    place = folder / slurm.FOLDER / FAILURES
    before = [record for record in failures(folder) if record["job"] == task.job]
    reached = progress(folder)
    began = _of(task, folder, BEGAN)
    last = before[-1]["reached"] if before else began.get("updates", reached)
    alike = bool(before) and (before[-1]["code"] in LEFT_CODES) == (code in LEFT_CODES)
    idle = 0 if reached > last else 1 + (before[-1]["idle"] if alike else 0)
    place.parent.mkdir(parents=True, exist_ok=True)
    facts = {"time": time.time(), "code": code, "reached": reached, "idle": idle, "why": why}
    append_safely(place, {"job": task.job, "restart": task.restart, **facts})
    return idle


def failures(folder: Path) -> list[dict[str, Any]]:
    """The failures of all jobs that worked in a folder, oldest first."""
    return read_records(folder / slurm.FOLDER / FAILURES)


def progress(folder: Path) -> int:
    """How far the work in a folder has come: updates of a run that were saved, units of a dataset that are done."""
    done = folder / "unfinished" / "done"
    return updates_saved(folder) + (len(list(done.iterdir())) if done.is_dir() else 0)


def cause(log: Path, code: int) -> str:
    """The line of a job's log that says why its last start failed."""
    try:
        said = log.read_text(encoding="utf-8", errors="replace").rpartition(OPENING)[2].splitlines()
    except OSError:
        said = []
    signs = (r"fmscale \w+: ", r"srun: error: .*task.*: (?!Terminated)", r"\w+(\.\w+)*(Error|Exception)\b")
    for sign in signs:
        if lines := [line for line in said if re.match(sign, line)]:
            return lines[0 if sign.startswith("srun") else -1]
    return f"exit code {code}"
