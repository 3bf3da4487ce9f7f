"""A dataset in the making, by workers that share nothing but its folder, and the moment at which it becomes whole.

    OUT/unfinished/job.json              what is made, of what, with what: the same for all workers
    OUT/unfinished/claims/               who is at what (see `claims`)
    OUT/unfinished/writing/UNIT.WORKER/  the shards of a unit, as one worker writes them
    OUT/unfinished/done/UNIT/            the same, whole, with record.json: one rename brought them here together
    OUT/                                 shards, index, null.safetensors, failures.jsonl, once every unit is done
    OUT/manifest.json                    last of all: the dataset is whole, and `unfinished` goes

A folder cannot be renamed onto one that holds something: of two workers that made the same unit, one has done it, and
what the other made is removed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fmscale import slurm
from fmscale.claims import Claims, link
from fmscale.data.index import UNFINISHED
from fmscale.data.index_build import index_shard, join_index
from fmscale.encoders.null import save_null
from fmscale.errors import UserError
from fmscale.files import replace_text, sync
from fmscale.log import get_logger

log = get_logger(__name__)
MANIFEST, RECORD, FAILURES = "manifest.json", "record.json", "failures.jsonl"
BEFORE = {UNFINISHED, slurm.FOLDER}  # may be there before anything is said of what is made
FINISH = ".finish"  # no unit's name holds a dot; claimed by the one that puts everything in place
POLLS = 60  # looks at what others do, in the time after which a claim is dead
MAX_POLL_S = 5.0


@dataclass(frozen=True)
class Outcome:
    """What became of a unit's images; it grows as they come.

    Attributes:
        failures: `key`, `reason` and `detail` of each that was skipped.
        facts: numbers about the others, of which the manifest tells sums.
    """

    failures: list[dict[str, str]] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)


def is_finished(out: Path) -> bool:
    """Whether a dataset is whole."""
    return (out / MANIFEST).is_file()


def read_manifest(out: Path) -> dict[str, Any]:
    """What a dataset that is whole says of itself."""
    return json.loads((out / MANIFEST).read_text())


def check_same(out: Path, description: Mapping[str, Any]) -> None:
    """Refuse to go on with a dataset that is made otherwise, or to write into a folder that holds something else.

    Args:
        out: the dataset's folder, which need not exist.
        description: what is made, of what and with what, or a part of it.

    Raises:
        UserError: names the first thing that differs.
    """
    if files := [place for place in out.parents if place.exists() and not place.is_dir()]:
        raise UserError(f"{out}: {files[0]} is a file; give another folder")
    job = _read_job(out)
    if job is None and (not out.exists() or (out.is_dir() and {entry.name for entry in out.iterdir()} <= BEFORE)):
        return
    if job is None:
        raise UserError(f"{out} exists already; give another folder, or remove it first")
    if job.keys() != description.keys() and not description.keys() <= job.keys():
        raise UserError(f"{out} holds a dataset that another command makes; give another folder")
    if wrong := _difference({part: job[part] for part in description}, dict(description), ""):
        raise UserError(f"{out} was begun otherwise: {wrong}; give another folder, or remove it first")


def _read_job(out: Path) -> Mapping[str, Any] | None:
    for file in (out / UNFINISHED / "job.json", out / MANIFEST):  # in this order: the first goes when the second came
        with suppress(OSError, ValueError, LookupError, TypeError):
            return json.loads(file.read_text())["job"]
    return None


def _difference(before: Any, now: Any, name: str) -> str:
    """The first thing in which two descriptions differ, in words; empty where they agree."""
    if isinstance(before, dict) and isinstance(now, dict):
        parts = (_difference(before.get(key), now.get(key), f"{name}.{key}".strip(".")) for key in sorted(before | now))
        return next(filter(None, parts), "")
    if name == "units" and (odd := sorted(set(before) ^ set(now))):
        return f"of the source, {odd[0]} {'is gone' if odd[0] in before else 'is new'}"
    return "" if before == now else f"{name} was {json.dumps(before)}, and is {json.dumps(now)}"


@contextmanager
def open_job(out: Path, description: Mapping[str, Any], timeout_s: float) -> Iterator[Job]:
    """Take part in making a dataset; claims are released when the block ends.

    Args:
        out: the dataset's folder, made where there is none.
        description: what is made, of what and with what; its `units` are the names of the pieces of work.
        timeout_s: a worker that has not been heard of for so long is dead.

    Raises:
        UserError: it was begun otherwise.
    """
    folder = out / UNFINISHED
    try:
        for part in ("claims", "writing", "done"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        with Claims(folder / "claims", timeout_s) as claims:
            _write_once(folder / "job.json", json.dumps({"job": description}), claims.worker)
            check_same(out, description)
            yield Job(out, description, claims, timeout_s)
    except (OSError, UserError) as error:
        if not is_finished(out):  # others, who took this worker for dead, may have come to the end without it
            if isinstance(error, OSError) and not folder.exists():
                raise UserError(
                    f"{folder} was removed: another worker found no image that could be used and says why, or somebody "
                    "did it by hand"
                ) from error
            raise
    clear_up(out)


def clear_up(out: Path) -> None:
    """Remove what only the making of a dataset needs, if that is whole; a worker may have been killed at it before."""
    if is_finished(out):
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)


def _write_once(path: Path, text: str, worker: str) -> None:
    """Write a file that exists from now on, by whomever."""
    mine = path.with_name(f"{path.name}.{worker}")
    mine.write_text(text)
    sync(mine)
    try:
        link(mine, path)
    finally:
        mine.unlink(missing_ok=True)


class Job:
    """One worker's part in making a dataset; see `open_job`."""

    def __init__(self, out: Path, description: Mapping[str, Any], claims: Claims, timeout_s: float) -> None:
        self.units: list[str] = description["units"]
        self.done = 0  # units, by whomever, when last looked
        self._out, self._description, self._claims = out, description, claims
        self._folder = out / UNFINISHED
        self._poll_s = min(timeout_s / POLLS, MAX_POLL_S)
        self._changed = threading.Event()  # a unit was committed, or this worker leaves
        self._leaving = False

    def close(self) -> None:
        """Claim no more units."""
        self._leaving = True
        self._changed.set()

    def claimed(self) -> Iterator[str]:
        """Units that are not done, each claimed for this worker; ends when all are done, by whomever, or at `close`.

        Another thread may commit what this one is given; several may be asked for before the first is committed.
        """
        told = False
        while not self._leaving and not is_finished(self._out) and (left := self._left()):
            unit = next(filter(self._take, left), None)
            if unit is not None:
                yield unit
                continue
            if not told and not self._claims.mine.issuperset(left):
                told = True
                log.info("the last %d units are others'; waiting for them, or for their owners to die", len(left))
            self._changed.wait(self._poll_s)
            self._changed.clear()

    def _left(self) -> list[str]:
        """Units that are not done; each worker begins at another, lest all try for the same."""
        done = set(os.listdir(self._folder / "done"))
        self.done = len(done)
        left = [unit for unit in self.units if unit not in done]
        start = hash(self._claims.worker) % max(len(left), 1)
        return left[start:] + left[:start]

    def _take(self, unit: str) -> bool:
        taken = self._claims.take(unit)
        if taken and (self._folder / "done" / unit).exists():  # since we looked
            self._claims.release(unit)
            return False
        return taken

    @contextmanager
    def attempt(self, unit: str) -> Iterator[Path]:
        """A new folder to make a unit in; what was not committed when the block ends is removed."""
        writing = self._folder / "writing"
        folder = writing / f"{unit}.{self._claims.worker}"
        for left in writing.iterdir():
            name, _, worker = left.name.partition(".")
            if name == unit and self._claims.is_gone(worker):
                with suppress(FileNotFoundError):  # it was not dead, and is committing this at this moment
                    left.rename(folder)  # before its files go: whoever commits a folder commits all of it
                shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        except (OSError, UserError):
            if folder.exists():
                raise
            log.warning("%s: another worker took this one for dead, and does it", unit)
            self._claims.release(unit)  # that one may die, and leave it to this one
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit(self, unit: str, folder: Path, outcome: Outcome) -> bool:
        """Put a unit among those that are done, all of it at once; False where another was faster.

        Args:
            unit: its name.
            folder: from `attempt`; holds its shards, whole.
            outcome: what became of its images.
        """
        shards = sorted(tar.name for tar in folder.glob("*.tar"))
        for name in shards:
            index_shard(folder / name)
        record = {"worker": self._claims.worker, "shards": shards, **asdict(outcome)}
        (folder / RECORD).write_text(json.dumps(record))
        sync(folder / RECORD)
        sync(folder)
        won = self._publish(folder, self._folder / "done" / unit)
        self._claims.release(unit)
        self._changed.set()
        return won

    def _publish(self, folder: Path, done: Path) -> bool:
        try:
            folder.rename(done)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
            if not done.is_dir():
                raise
            won = json.loads((done / RECORD).read_text())["worker"] == self._claims.worker  # NFS asks twice at times
            if not won:
                log.warning("%s: another worker was faster, so what was made of it here is dropped", done.name)
            return won
        sync(done.parent)
        return True

    def finish(
        self,
        null: Callable[[], Mapping[str, Tensor]],
        made_by: dict[str, Any],
        about: Callable[[Mapping[str, float]], Mapping[str, Any]] = dict,
    ) -> None:
        """Put everything in place once all units are done, or wait until another worker has.

        A worker that dies at it leaves nothing that the next cannot go on with.

        Args:
            null: makes the features of the empty caption.
            made_by: what the index says of the dataset's making.
            about: what the manifest tells of the sums of all units' facts.

        Raises:
            UserError: no image could be used, or two have the same key.
        """
        while not is_finished(self._out):
            if not self._claims.take(FINISH):
                time.sleep(self._poll_s)
            elif not is_finished(self._out):  # who had claimed it may have come to the end since we looked
                self._finish(null(), made_by, about)

    def _finish(
        self,
        null: Mapping[str, Tensor],
        made_by: dict[str, Any],
        about: Callable[[Mapping[str, float]], Mapping[str, Any]],
    ) -> None:
        scans: list[Path] = []
        reasons: Counter[str] = Counter()
        facts: Counter[str] = Counter()
        failures = self._folder / FAILURES
        with failures.open("w") as file:
            for unit in self.units:
                folder = self._folder / "done" / unit
                record = json.loads((folder / RECORD).read_text())
                for name in record["shards"]:
                    _move(folder / name, self._out / name)
                    scans.append(folder / f"{name}.npz")
                for failure in record["failures"]:
                    file.write(json.dumps(failure) + "\n")
                    reasons[failure["reason"]] += 1
                facts.update(record["facts"])
        if not scans:
            shutil.rmtree(self._folder)
            with suppress(OSError):
                self._out.rmdir()
            raise UserError(f"{self._out}: not one sample could be made ({tally(reasons)})")
        save_null(self._out, null)
        index = join_index(self._out, sorted(scans, key=lambda scan: scan.name), made_by)
        sync(failures)
        failures.replace(self._out / FAILURES)
        manifest = {
            "fingerprint": index.fingerprint,
            "samples": len(index),
            "buckets": {bucket.name: bucket.count for bucket in index.buckets},
            "failures": dict(reasons.most_common()),
            **about(facts),
            "job": self._description,
        }
        replace_text(self._out / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def tally(reasons: Mapping[str, int]) -> str:
    """The most frequent reasons, in words."""
    return ", ".join(f"{count} x {reason}" for reason, count in Counter(reasons).most_common(5))


def _move(from_: Path, to: Path) -> None:
    """Rename a file that a worker who died at this may have renamed already."""
    try:
        from_.rename(to)
    except FileNotFoundError:
        if not to.exists():
            raise
