"""A checkpoint is a folder of safetensors fragments: each rank writes what it owns, any world reads what it needs.

    step-00001000/index.json                              step, world, parameters' shapes, files' checksums, description
                  partition-00000-of-00008.safetensors    one rank's pieces: see `fragments`

A folder that bears its final name is whole: `saver` writes it under another name, syncs it to disk, then renames it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from fmscale.distributed import World, first_text, from_main
from fmscale.engine.fragments import DamagedError, Partition
from fmscale.engine.zero import Piece
from fmscale.errors import SharedError, UserError
from fmscale.files import in_threads
from fmscale.log import get_logger

log = get_logger(__name__)
FORMAT = 2
_NAME = re.compile(r"step-(\d{8,})")
DELETING = ".deleting-"
WRITING = ".writing-"
NONE = -1
Opened = TypeVar("Opened")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        path: its folder.
        index: index.json: `step`, `updates`, `world_size`, `parameters`, `kinds`, `partitions`, `description`.
    """

    path: Path
    index: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return int(self.index["step"])


def find_all(root: Path) -> list[Path]:
    """Folders of whole checkpoints under `root`, oldest first."""
    found = [entry for entry in root.glob("step-*") if _NAME.fullmatch(entry.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder bears in its name."""
    return int(path.name.split("-")[1])


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's index and check that its files are there in full length.

    Raises:
        DamagedError: not a whole checkpoint.
        UserError: of another format.
        OSError: it cannot be read, which says nothing of what is in it.
    """
    try:
        index = json.loads((path / "index.json").read_text())
        given = index["format"]
        if given == FORMAT and (index["step"], bool(index["partitions"])) != (step_of(path), True):
            raise ValueError("it is of another step, or has no files")
        sizes = {path / entry["name"]: entry["bytes"] for entry in index["partitions"]} if given == FORMAT else {}
    except (FileNotFoundError, ValueError, LookupError, TypeError) as error:
        raise DamagedError(f"{path}: not a whole checkpoint ({error})") from None
    if given != FORMAT:
        raise UserError(f"{path}: checkpoint format {given}, this program reads {FORMAT}")
    for file, size in sizes.items():
        if not file.is_file() or file.stat().st_size != size:
            raise DamagedError(f"{file}: missing or cut short")
    return Checkpoint(path, index)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint has all its files in full length; their content is not looked at."""
    try:
        open_checkpoint(path)
    except UserError:
        return False
    return True


def latest(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint under `root`, or None where there never was one; content is not looked at.

    Args:
        root: a run's `checkpoints` folder.

    Raises:
        UserError: there are checkpoints, and not one of them is whole.
    """
    reason = ""
    for path in reversed(find_all(root)):
        try:
            return open_checkpoint(path)
        except UserError as error:
            reason = reason or str(error)
    if reason:
        raise UserError(f"{root}: no checkpoint is whole ({reason}); give another run_dir to start anew")
    return None


def choose(root: Path, world: World, before: int | None = None) -> Checkpoint | None:
    """The newest checkpoint whose files hold what was written, the same on every rank; each reads its share of them.

    Every rank calls it; rank 0, whose view of the file system may be newer, decides, and names what is passed over.

    Args:
        root: a run's `checkpoints` folder.
        world: this rank among the others.
        before: only those of earlier steps count; None for all.

    Raises:
        SharedError: there are checkpoints, and not one of them is sound.
    """
    steps = [step_of(path) for path in find_all(root)] if world.is_main else []
    candidates = iter(sorted((step for step in steps if before is None or step < before), reverse=True))
    reason = ""
    while (step := from_main(next(candidates, NONE), world.device)) != NONE:
        found, damage = _examine(root / f"step-{step:08d}", world)
        damage = first_text(damage, world.device)
        if found is not None and not damage:
            return found
        if world.is_main:
            log.warning("passed over: %s", damage)
        reason = reason or damage
    if reason:
        raise SharedError(f"{root}: no checkpoint is sound ({reason}); give another run_dir to start anew")
    return None


def _examine(path: Path, world: World) -> tuple[Checkpoint | None, str]:
    """A checkpoint, or what is wrong with this rank's share of it."""
    try:
        found = open_checkpoint(path)
        verify(found, rank=world.rank, world_size=world.world_size)
    except (UserError, OSError) as error:
        return None, str(error) or repr(error)
    return found, ""


def set_aside_after(found: Checkpoint) -> None:
    """Rename checkpoints of later steps: they were found damaged, and are neither to win later nor to count as kept."""
    for path in find_all(found.path.parent):
        if step_of(path) > found.step:
            aside = path.with_name(f".damaged-{path.name}")
            try:
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                log.warning("%s was set aside as %s", path, aside.name)
            except OSError as error:  # the run writes it anew when it comes to that step
                log.warning("%s could not be set aside: %s", path, error)


def discard(path: Path) -> None:
    """Remove a checkpoint such that at no moment a part of it bears its name."""
    gone = path.with_name(f"{DELETING}{path.name}")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def discard_after(root: Path, step: int) -> None:
    """Remove what was saved after a step, and what a save or a removal that was killed has left."""
    for leftover in (*root.glob(f"{WRITING}*"), *root.glob(f"{DELETING}*")):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in find_all(root):
        if step_of(path) > step:
            discard(path)


def at_step(root: Path, step: int | None, opened: Callable[[Checkpoint], Opened]) -> Opened:
    """What `opened` makes of the checkpoint of a step; for None of the newest one, passing over those that are damaged.

    Args:
        root: a run's `checkpoints` folder.
        step: optimizer steps done, or None.
        opened: called with a whole checkpoint; raises DamagedError where its content is not what was written.

    Raises:
        UserError: there is none, and the line names those that are there; or it is damaged, and so is any other.
        OSError: its folder cannot be read.
    """
    paths = {step_of(path): path for path in find_all(root)}
    if not paths:
        raise UserError(f"{root}: no checkpoint here; is this a run directory that has saved one?")
    if step is not None:
        if step not in paths:
            raise UserError(f"{root}: no checkpoint of step {step}; there are {', '.join(map(str, paths))}")
        return opened(open_checkpoint(paths[step]))
    tried: set[Path] = set()
    while untried := [path for path in find_all(root) if path not in tried]:  # a run may replace them meanwhile
        try:
            return opened(open_checkpoint(untried[-1]))
        except DamagedError as error:
            log.warning("passed over: %s", error)
        tried.add(untried[-1])
    raise UserError(f"{root}: no checkpoint is sound; the lines above say why")


def verify(checkpoint: Checkpoint, kinds: Collection[str] | None = None, *, rank: int = 0, world_size: int = 1) -> None:
    """Compare checksums; each rank reads its share of the files.

    Args:
        checkpoint: a whole one.
        kinds: of tensors that matter; None for all.
        rank, world_size: this rank among those who share the work.

    Raises:
        DamagedError: names the damaged file.
    """
    partitions = _partitions(checkpoint)[rank::world_size]
    work = [(partition, key) for partition in partitions for key in partition.keys(kinds)]
    in_threads(lambda item: item[0].check(item[1]), work)


def _partitions(checkpoint: Checkpoint) -> list[Partition]:
    return [
        Partition(checkpoint.path / entry["name"], entry["head_bytes"], entry["head_sha256"])
        for entry in checkpoint.index["partitions"]
    ]


class Fragments:
    """Random access to the parameters of a checkpoint, whatever world wrote it.

    Raises:
        DamagedError: it is not what was written, or cannot be read.
        UserError: a kind or range that is asked for is not in it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._places: dict[str, list[tuple[int, Partition]]] = {}
        for partition in _partitions(checkpoint):
            for name, start in partition.starts.items():
                self._places.setdefault(name, []).append((start, partition))

    def chunks(self, kind: str, name: str, start: int = 0, length: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Elements start … start + length of a flattened parameter, some at a time, in any order.

        Args:
            kind: `weight`, `exp_avg`, `exp_avg_sq` or the name of an average.
            name: of the parameter.
            start, length: all of it unless given.

        Yields:
            Where in the parameter they belong, and the elements, 1-D float32; no more than `fragments.CHUNK`.
        """
        if kind not in self.checkpoint.index["kinds"] or name not in self._places:
            raise UserError(f"{self.checkpoint.path}: holds no {kind} of {name}; is the config the one that wrote it?")
        length = prod(self.checkpoint.index["parameters"][name]) if length is None else length
        key, filled = f"{kind}/{name}", 0
        for begin, partition in self._places[name]:
            low, high = max(start, begin), min(start + length, begin + partition.length(key))
            for at, values in partition.chunks(key, low - begin, high - begin):
                yield begin + at, values
                filled += len(values)
        if filled != length:
            raise UserError(f"{self.checkpoint.path}: {kind} of {name} is incomplete: {filled} of {length} values")

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements start … start + length of a flattened parameter, shape (length,), float32."""
        out = torch.empty(length)
        for at, values in self.chunks(kind, name, start, length):
            out[at - start : at - start + len(values)] = values
        return out

    def full(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of one kind, name and tensor, one at a time."""
        for name, shape in self.checkpoint.index["parameters"].items():
            yield name, self.read(kind, name, 0, prod(shape)).reshape(shape)


def check_fits(checkpoint: Checkpoint, shapes: Mapping[str, Sequence[int]], kinds: Iterable[str]) -> None:
    """Refuse a checkpoint that cannot be restored into a model; reads its index alone.

    Args:
        checkpoint: to be restored.
        shapes: of every parameter of the model.
        kinds: names of the tensors that are kept of each parameter.

    Raises:
        UserError: names the first parameter or average that differs.
    """
    saved = {name: tuple(shape) for name, shape in checkpoint.index["parameters"].items()}
    for name in sorted(saved | dict(shapes)):
        ours, theirs = (table.get(name, "absent") for table in (shapes, saved))
        if ours != theirs:
            raise UserError(
                f"{checkpoint.path}: {name} is {theirs} there and {ours} in the config's model; start another run_dir"
            )
    if missing := sorted(set(kinds) - set(checkpoint.index["kinds"])):
        raise UserError(f"{checkpoint.path}: holds no {missing[0]}, which the config asks for; start another run_dir")


def restore(checkpoint: Checkpoint, pieces: Iterable[Piece], names: Mapping[str, str] = MappingProxyType({})) -> None:
    """Copy a checkpoint into a rank's pieces.

    Args:
        checkpoint: written by any world size and ZeRO stage, and found fit by `check_fits`.
        pieces: from `Engine.pieces`; call `Engine.refresh` afterwards.
        names: of tensors that are called otherwise there, by those that they have here.

    Raises:
        UserError: it lacks something all the same, or cannot be read.
    """
    fragments = Fragments(checkpoint)
    for piece in pieces:
        for kind, tensor in piece.tensors.items():
            for at, values in fragments.chunks(names.get(kind, kind), piece.name, piece.start, tensor.numel()):
                tensor.narrow(0, at - piece.start, len(values)).copy_(values)
