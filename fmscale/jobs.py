"""`fmscale status` and `stop`: what Slurm and a run directory say of a job, without torch."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from fmscale import slurm
from fmscale.errors import OutageError, UserError
from fmscale.files import whole_records
from fmscale.log import get_logger
from fmscale.plain_yaml import parse_yaml
from fmscale.requeue import failures
from fmscale.starts import BEGAN, ENDED, STARTS, STOP, newest_start, read

log = get_logger(__name__)
TAIL_BYTES = 1 << 16  # of metrics.jsonl: the last twenty steps and more
STEPS = 20  # whose times tell how long the others will take
MARK = "fmscale:"  # what the comments of our jobs begin with; the run directory follows
COLUMNS = ("run", "job", "state", "step", "loss", "images/s", "heartbeat", "restarts", "left", "last error")
ENDED_STATES = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
    *("PREEMPTED", "REVOKED"),
)
FORGOTTEN = "FORGOTTEN"  # neither the controller nor the accounts know the job any more


def ended(state: str) -> bool:
    """Whether all of a job has, by what `describe` says."""
    return all(part.split()[-1].startswith((*ENDED_STATES, FORGOTTEN)) for part in state.split(", "))


def newest_job(folder: Path) -> str:
    """The number of the last job that worked in a folder; empty where there was none."""
    told = [record for record in read(folder) if "job" in record] + _submitted(folder)
    return str(max(told, key=lambda record: record["time"])["job"]) if told else ""


def _submitted(folder: Path) -> list[dict[str, Any]]:
    found = []
    for file in sorted((folder / slurm.FOLDER).glob("*/job.json")):
        try:
            found.append(json.loads(file.read_text()))
        except ValueError:  # it is being written
            continue
    return found


def describe(job: str) -> dict[str, str]:
    """What Slurm says of a job: the controller, or else the accounts; at least `JobState`; of arrays, counted."""
    if not job:
        return {"JobState": "-"}
    try:
        told = slurm.describe(job)
        states = [one["JobState"] for one in told] or _account(job)  # the controller forgets jobs after a while
    except OutageError as error:
        return {"JobState": "UNKNOWN", "error": str(error)}
    counted = ", ".join(f"{count} {state}" for state, count in Counter(states).most_common())
    newest = max(told, key=lambda one: int(one.get("Restarts", 0)), default={})
    return {**newest, "JobState": counted if len(states) > 1 else (states or [FORGOTTEN])[0]}


def _account(job: str) -> list[str]:
    try:
        lines = slurm.ask("sacct", "-X", "-n", "-P", "-o", "State", "-j", job).splitlines()
    except OutageError:  # many clusters keep no accounts
        return []
    return [line.split()[0] for line in lines if line.split()]  # `CANCELLED by 0`


def status(folders: Sequence[Path]) -> int:
    """Print a table of runs, those of the user's jobs unless they are named.

    Raises:
        UserError: a folder holds no run.
    """
    if not folders:
        comments = slurm.ask("squeue", "--me", "--noheader", "--format=%k").splitlines()
        ours = [text for text in dict.fromkeys(comments) if text.startswith(MARK)]
        folders = [Path(text.removeprefix(MARK)) for text in ours]
    if not folders:
        print("no job of yours that fmscale submitted; name a run directory to see one that has ended")
        return 0
    rows = [COLUMNS, *(_row_or_why(folder, alone=len(folders) == 1) for folder in folders)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _row_or_why(folder: Path, alone: bool) -> tuple[str, ...]:
    """A run as the table shows it; of one among several that cannot be read, why."""
    try:
        return _row(folder)
    except UserError as error:
        if alone:
            raise
        why = str(error)
    except (OSError, ValueError, LookupError, TypeError) as error:  # damaged files, of whatever kind
        why = f"its files cannot be read: {error!r}"
    return (str(folder), *["-"] * (len(COLUMNS) - 2), " ".join(why.split()))


def _row(folder: Path) -> tuple[str, ...]:
    """A run as the table shows it."""
    if not any((folder / name).exists() for name in (STARTS, slurm.FOLDER, "config.yaml")):
        raise UserError(f"{folder}: no run was submitted or started here")
    job = newest_job(folder)
    told, last = describe(job), _last_steps(folder)
    state = told["JobState"] + (f" ({told['Reason']})" if told.get("Reason", "None") != "None" else "")
    newest = last[-1] if last else {}
    done, steps = newest.get("step", 0), _steps(folder)
    seconds = [record["step_s"] for record in last[-STEPS:]]
    left_s = (steps - done) * sum(seconds) / len(seconds) if seconds and steps else None
    loss, rate = newest.get("loss"), newest.get("images_per_s")
    return (
        str(folder),
        job or "-",
        state,
        f"{done}/{steps}" if steps else _units(folder),
        "-" if loss is None else f"{loss:.4f}",
        "-" if rate is None else f"{rate:.1f}",
        _heartbeat(folder),
        told.get("Restarts", "-"),
        "-" if left_s is None else str(timedelta(seconds=round(left_s))),
        _last_error(folder) or "-",
    )


def _steps(folder: Path) -> int:
    """How many the run is to have; 0 where it has not begun."""
    try:
        config = parse_yaml((folder / "config.yaml").read_text(), str(folder / "config.yaml"))
        return int(config["steps"])
    except (OSError, LookupError, TypeError):
        return 0


def _units(folder: Path) -> str:
    """How much of a dataset is done."""
    unfinished = folder / "unfinished"
    try:
        units = json.loads((unfinished / "job.json").read_text())["job"]["units"]
        return f"{len(list((unfinished / 'done').iterdir()))}/{len(units)} units"
    except (OSError, ValueError, LookupError):
        return "finished" if (folder / "manifest.json").is_file() else "-"


def _last_steps(folder: Path) -> list[dict[str, Any]]:
    """The last objects of metrics.jsonl."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            whole = file.read().rpartition(b"\n")[0].split(b"\n")
    except FileNotFoundError:
        return []
    return list(whole_records(whole))


def _heartbeat(folder: Path) -> str:
    try:
        return f"{time.time() - (folder / STARTS).stat().st_mtime:.0f} s ago"
    except FileNotFoundError:
        return "-"


def _last_error(folder: Path) -> str:
    """Of the last failure, unless the run has ended well since."""
    ends = [record for record in read(folder) if ENDED in record]
    failed = [*(record for record in ends if record["how"] == "failed"), *failures(folder)]
    whys = [record["why"] for record in sorted(failed, key=lambda record: record["time"])]
    return "" if ends and ends[-1]["how"] == "done" else (whys or [""])[-1]


def stop(folder: Path) -> int:
    """End a run for good: one that trains saves first; one that waits, and a dataset in the making, is cancelled.

    Raises:
        UserError: there is no job that could be stopped.
        OutageError: Slurm does not answer.
    """
    job = newest_job(folder)
    told = describe(job)
    if "error" in told:
        raise OutageError(told["error"])
    state = told["JobState"]
    if not job or ended(state):
        raise UserError(f"{folder}: nothing to stop; {f'job {job} is {state}' if job else 'it has no job'}")
    if state == "RUNNING" and _trains(folder, job, told.get("Restarts", "0")):
        (folder / STOP).touch()
        log.info("job %s saves at its next step, and ends", job)
    else:
        slurm.ask("scancel", job)
        log.info("job %s is cancelled", job)
    return 0


def _trains(folder: Path, job: str, restarts: str) -> bool:
    """Whether this start of a job has begun to train, and will look for the file that stops it."""
    newest = newest_start(folder)
    mine = (str(newest.get("job")), str(newest.get("restart"))) == (job, restarts)
    return mine and newest[BEGAN] not in [record.get(ENDED) for record in read(folder)]
