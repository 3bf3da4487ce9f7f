"""Saving beside the training: a snapshot to host memory now, the files later, in a thread of their own.

    training thread    copies this rank's pieces to host memory, which every save uses again
    background thread  writes the partition, agrees with the other ranks, and on rank 0 writes the index, renames the
                       folder and removes old checkpoints

The ranks' threads agree over a gloo group that nobody else uses, so that the training's collectives go on beside it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fmscale.distributed import World, everywhere, total
from fmscale.engine.checkpoint import (
    DELETING,
    FORMAT,
    WRITING,
    Checkpoint,
    discard,
    find_all,
    is_whole,
    open_checkpoint,
    step_of,
)
from fmscale.engine.fragments import write_partition
from fmscale.engine.zero import Piece
from fmscale.errors import SharedError
from fmscale.files import replace_text, sync
from fmscale.log import get_logger

log = get_logger(__name__)
LAST_MINUTE_S = 60
Result = TypeVar("Result")


class SaveError(Exception):
    """A checkpoint could not be written; the text says which and why, on every rank. Older ones are untouched."""


class Retention(NamedTuple):
    """Which checkpoints stay once a new one is whole.

    Attributes:
        newest: so many of the newest, >= 1.
        every_steps: those of steps that this divides, for ever; None for no such steps.
    """

    newest: int
    every_steps: int | None = None


class Folder(NamedTuple):
    """Where saves go.

    Attributes:
        root: folder of `step-…` folders, on a file system that all ranks see.
        retention: which of them stay; None for all.
        kinds: what their names begin with, of the tensors that are written; "" for all.
    """

    root: Path
    retention: Retention | None = None
    kinds: str = ""


class Snapshot(NamedTuple):
    """A rank's pieces in host memory.

    Attributes:
        tensors: `KIND/NAME` -> 1-D float32.
        starts: where each parameter's piece begins in the flattened parameter.
    """

    tensors: dict[str, Tensor]
    starts: dict[str, int]

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def kinds(self) -> list[str]:
        """The kinds of tensor in it, sorted."""
        return sorted({key.split("/")[0] for key in self.tensors})

    def only(self, kinds: str) -> Snapshot:
        """The tensors whose kinds begin so."""
        return Snapshot({key: tensor for key, tensor in self.tensors.items() if key.startswith(kinds)}, self.starts)


class Saver:
    """Writes a run's checkpoints; one save at a time.

    Args:
        root: the run's `checkpoints` folder, on a file system that all ranks see.
        world: this rank among the others; all of them make a saver at the same point, and make the same calls.
        retention: which checkpoints stay.
        private: only the user may read the files.
        start: a name that no other start of the run has; it is in the names of folders that are being written.
        permit: raises where this start may not write any more.
    """

    def __init__(
        self,
        root: Path,
        world: World,
        retention: Retention,
        private: bool = True,
        start: str = "",
        permit: Callable[[], None] = lambda: None,
    ) -> None:
        self._world, self._private, self._start, self._permit = world, private, start, permit
        self.checkpoints = Folder(root, retention)
        several = torch.distributed.is_initialized() and world.world_size > 1
        self._group = torch.distributed.new_group(backend="gloo") if several else None
        self._memory: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self.progress = 0  # grows while a save goes on
        self._failure = ""
        for left in root.glob(f"{WRITING}*") if world.is_main else ():  # by a save that was killed
            shutil.rmtree(left, ignore_errors=True)

    def retain(self, retention: Retention) -> None:
        """Let others stay, once the next checkpoint is whole."""
        self.checkpoints = self.checkpoints._replace(retention=retention)

    def start(
        self,
        pieces: Iterable[Piece],
        *,
        step: int,
        updates: int,
        shapes: Mapping[str, Sequence[int]],
        description: Mapping[str, Any],
        folders: Sequence[Folder] = (),
    ) -> None:
        """Take a snapshot and begin to write it; a save that is still being written is waited for first.

        Args:
            pieces: from `Engine.pieces`.
            step, updates: optimizer steps done, and those of them that were applied.
            shapes: of every parameter.
            description: anything else a reader should know, as plain data.
            folders: where to, in this order; the checkpoints alone where there are none.

        Raises:
            SaveError: the save before this one has failed.
        """
        self.wait()
        folders = tuple(folders) or (self.checkpoints,)
        snapshot = self._take(pieces, tuple(folder.kinds for folder in folders))
        index = {
            "format": FORMAT,
            "step": step,
            "updates": updates,
            "world_size": self._world.world_size,
            "parameters": {key: list(shape) for key, shape in shapes.items()},
            "description": dict(description),
        }
        self._thread = threading.Thread(target=self._run, args=(snapshot, index, folders), daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def abandon(self) -> None:
        """Give a save that is being written a last minute: it may wait for a rank that does not answer."""
        if self._thread is not None:
            self._thread.join(LAST_MINUTE_S)

    def wait(self) -> None:
        """Return when no save is being written.

        Raises:
            SaveError: the last one has failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, ""
        if failure:
            raise SaveError(failure)

    def _take(self, pieces: Iterable[Piece], kinds: tuple[str, ...]) -> Snapshot:
        """Copy pieces to memory that stays: the first touch of fresh memory costs as much as the copy."""
        tensors: dict[str, Tensor] = {}
        starts: dict[str, int] = {}
        for piece in pieces:
            starts[piece.name] = piece.start
            for kind, tensor in piece.tensors.items():
                if not kind.startswith(kinds):
                    continue
                key = f"{kind}/{piece.name}"
                if key not in self._memory:
                    self._memory[key] = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
                tensors[key] = self._memory[key].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Snapshot(tensors, starts)

    def _run(self, snapshot: Snapshot, index: dict[str, Any], folders: Sequence[Folder]) -> None:
        failures = []
        try:
            for folder in folders:
                try:
                    part = snapshot.only(folder.kinds)
                    self._write(folder, part, {**index, "kinds": part.kinds})
                except SaveError as error:
                    failures.append(str(error))
        except Exception as error:  # a lost connection to another rank's thread, for instance
            failures.append(f"the checkpoint of step {index['step']} could not be written: {error!r}")
        self._failure = "; ".join(failures)

    def _write(self, folder: Folder, snapshot: Snapshot, index: dict[str, Any]) -> None:
        """Every rank's partition, then the index, then the final name; every rank returns when the folder has it."""
        final = folder.root / f"step-{index['step']:08d}"
        temporary = folder.root / f"{WRITING}{final.name}{self._start and '-'}{self._start}"
        rank, count = self._world.rank, self._world.world_size
        names = [f"partition-{r:05d}-of-{count:05d}.safetensors" for r in range(count)]
        need = int(total(torch.tensor([snapshot.bytes]), self._group))
        try:
            self._everywhere(final, lambda: self._begin(temporary, need) if rank == 0 else None)
            head, size = self._everywhere(final, lambda: self._write_partition(temporary / names[rank], snapshot))
            index["partitions"] = [
                {"name": name, **entry} for name, entry in zip(names, self._gather(head, size), strict=True)
            ]
            self._everywhere(final, lambda: self._publish(folder, temporary, final, index) if rank == 0 else None)
        except SaveError:
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _everywhere(self, what: Path, action: Callable[[], Result]) -> Result:
        """Do `action` on this rank; raise on every rank if it failed on any. Returns when all ranks have done it."""

        def permitted() -> Result:
            self._permit()
            return action()

        try:
            return everywhere(permitted, torch.device("cpu"), self._group)
        except Exception as error:
            said = str(error) if isinstance(error, SharedError) else repr(error)
            raise SaveError(f"{what}: the checkpoint could not be written: {said}") from error

    def _go_on(self) -> None:
        self.progress += 1

    def _begin(self, temporary: Path, need: int) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True, mode=0o700 if self._private else 0o777)
        free = shutil.disk_usage(temporary).free
        if free < need:
            temporary.rmdir()
            raise OSError(f"it needs {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")

    def _write_partition(self, path: Path, snapshot: Snapshot) -> tuple[bytes, int]:
        """Returns the file's head, and its size."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if self._private else 0o666)
        try:
            head = write_partition(descriptor, snapshot.tensors, snapshot.starts, self._go_on)
            return head, os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def _gather(self, head: bytes, size: int) -> list[dict[str, Any]]:
        """What the index says of every rank's file, by a sum over ranks of rows in which each fills its own."""
        own = hashlib.sha256(head).digest() + len(head).to_bytes(8, "little") + size.to_bytes(8, "little")
        rows = torch.zeros(self._world.world_size, len(own), dtype=torch.int32)
        rows[self._world.rank] = torch.tensor(list(own), dtype=torch.int32)
        table = [bytes(row) for row in total(rows, self._group).tolist()]
        number = functools.partial(int.from_bytes, byteorder="little")
        return [
            {"bytes": number(row[-8:]), "head_bytes": number(row[-16:-8]), "head_sha256": row[:-16].hex()}
            for row in table
        ]

    def _publish(self, folder: Folder, temporary: Path, final: Path, index: dict[str, Any]) -> None:
        index_path = temporary / "index.json"
        index_path.touch(0o600 if self._private else 0o666)
        index_path.write_text(json.dumps(index, indent=1) + "\n")
        sync(index_path)
        sync(temporary)
        if final.exists():  # a run that went back behind this step writes it again
            discard(final)
        temporary.rename(final)
        sync(final.parent)
        try:
            if folder.retention is not None:
                prune(folder.root, folder.retention, final)
        except OSError as error:
            log.warning("old checkpoints in %s stay: %s", folder.root, error)


def write_checkpoint(root: Path, index: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
    """Write a checkpoint of one process, outside of training.

    Args:
        root: folder of checkpoints, in a run directory that nobody sees yet.
        index: but for `partitions`.
        tensors: `KIND/NAME` -> 1-D float32; each is asked for twice.

    Raises:
        OSError: it could not be written.
    """
    folder = root / f"step-{index['step']:08d}"
    folder.mkdir(parents=True, mode=0o700)
    path = folder / "partition-00000-of-00001.safetensors"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        starts = {key.split("/", 1)[1]: 0 for key in tensors}
        head = write_partition(descriptor, tensors, starts, lambda: None)
    finally:
        os.close(descriptor)
    entry = {"name": path.name, "bytes": path.stat().st_size}
    entry |= {"head_bytes": len(head), "head_sha256": hashlib.sha256(head).hexdigest()}
    replace_text(folder / "index.json", json.dumps({**index, "partitions": [entry]}, indent=1) + "\n")
    sync(folder)
    return open_checkpoint(folder)


def prune(root: Path, retention: Retention, new: Path) -> None:
    """Remove checkpoints that need not stay. One that is damaged does not count as one that is there.

    Args:
        root: the run's `checkpoints` folder.
        retention: which stay.
        new: the one that was just written, which stays in any case.
    """
    for leftover in root.glob(f"{DELETING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    whole = [path for path in find_all(root) if is_whole(path)]
    for path in whole[: -retention.newest]:
        if path != new and (retention.every_steps is None or step_of(path) % retention.every_steps):
            discard(path)
