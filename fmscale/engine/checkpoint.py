"""A checkpoint is a folder of safetensors fragments: each rank writes what it owns, any world reads what it needs.

    step-00001000/index.json                              step, world, parameters' shapes, files' checksums, description
                  partition-00000-of-00008.safetensors    `weight/NAME`, `exp_avg/NAME`, …: 1-D fp32 pieces
                                                          metadata: where each NAME's piece starts

A folder that bears its final name is whole: `saver` writes it under another name, syncs it to disk, then renames it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmscale.distributed import World, any_rank, from_main
from fmscale.engine.zero import Piece
from fmscale.errors import UserError
from fmscale.files import sha256
from fmscale.log import get_logger

log = get_logger(__name__)
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
DELETING = ".deleting-"
WRITING = ".writing-"
NONE, DAMAGED = -1, -2


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
        UserError: not a whole checkpoint, or of another format.
        OSError: it cannot be read, which says nothing of what is in it.
    """
    try:
        index = json.loads((path / "index.json").read_text())
        given = index["format"]
        if given == FORMAT and (index["step"], bool(index["partitions"])) != (step_of(path), True):
            raise ValueError("it is of another step, or has no files")
        sizes = {path / entry["name"]: entry["bytes"] for entry in index["partitions"]} if given == FORMAT else {}
    except (FileNotFoundError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: not a whole checkpoint ({error})") from None
    if given != FORMAT:
        raise UserError(f"{path}: checkpoint format {given}, this program reads {FORMAT}")
    for file, size in sizes.items():
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{file}: missing or cut short")
    return Checkpoint(path, index)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint has all its files in full length; their content is not looked at."""
    try:
        open_checkpoint(path)
    except UserError:
        return False
    return True


def latest(root: Path, passed: Collection[int] = (), before: int | None = None) -> Checkpoint | None:
    """The newest whole checkpoint under `root`, or None where there never was one; those passed over are named.

    Args:
        root: a run's `checkpoints` folder.
        passed: steps of checkpoints that were found damaged.
        before: only those of earlier steps count; None for all.

    Raises:
        UserError: there are checkpoints, and not one of them is whole.
    """
    reason = ""
    for path in reversed(find_all(root)):
        if before is not None and step_of(path) >= before:
            continue
        if step_of(path) in passed:
            reason = reason or f"{path}: damaged"
            continue
        try:
            return open_checkpoint(path)
        except UserError as error:
            reason = reason or str(error)
            log.warning("passed over: %s", error)
    if reason:
        raise UserError(f"{root}: no checkpoint is whole ({reason}); give another run_dir to start anew")
    return None


def choose(root: Path, world: World, before: int | None = None) -> Checkpoint | None:
    """The newest checkpoint whose files hold what was written, the same on every rank; each reads its share of them.

    Every rank calls it; rank 0, whose view of the file system may be newer, decides.

    Args:
        root, before: as for `latest`.
        world: this rank among the others.

    Raises:
        UserError: there are checkpoints, and not one of them is sound.
    """
    passed: set[int] = set()
    while (step := from_main(_newest(root, passed, before) if world.is_main else NONE, world.device)) >= 0:
        found, damage = None, ""
        try:
            found = open_checkpoint(root / f"step-{step:08d}")
            verify(found, world.rank, world.world_size)
        except (UserError, OSError) as error:
            damage = str(error)
            log.warning("passed over: %s", damage)
        if not any_rank(bool(damage), world.device):
            return found
        passed.add(step)
    if step == DAMAGED:
        raise UserError(f"{root}: no checkpoint is sound; give another run_dir to start anew")
    return None


def _newest(root: Path, passed: Collection[int], before: int | None) -> int:
    """Step of the newest whole checkpoint, `NONE`, or `DAMAGED` where there are others."""
    try:
        found = latest(root, passed, before)
    except (UserError, OSError) as error:
        log.warning("%s", error)
        return DAMAGED
    return NONE if found is None else found.step


def set_aside_after(found: Checkpoint) -> None:
    """Rename checkpoints of later steps: they were found damaged, and are neither to win later nor to count as kept."""
    for path in find_all(found.path.parent):
        if step_of(path) > found.step:
            aside = path.with_name(f".damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            log.warning("%s was set aside as %s", path, aside.name)


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


def at_step(root: Path, step: int | None) -> Checkpoint:
    """The checkpoint of a step, or the newest whole one for None.

    Raises:
        UserError: there is none; the line names those that are there.
    """
    found = find_all(root)
    newest = latest(root) if step is None else None
    if not found:
        raise UserError(f"{root}: no checkpoint here; is this a run directory that has saved one?")
    if newest is not None:
        return newest
    wanted = root / f"step-{step:08d}"
    if wanted not in found:
        raise UserError(
            f"{root}: no checkpoint of step {step}; there are {', '.join(str(int(p.name[5:])) for p in found)}"
        )
    return open_checkpoint(wanted)


def verify(checkpoint: Checkpoint, rank: int = 0, world_size: int = 1) -> None:
    """Compare checksums; each rank reads its share of the files.

    Raises:
        UserError: names the damaged file.
    """
    for partition in checkpoint.index["partitions"][rank::world_size]:
        file = checkpoint.path / partition["name"]
        if sha256(file) != partition["sha256"]:
            raise UserError(f"{file}: damaged: its checksum differs")


class Fragments:
    """Random access to the parameters of a checkpoint, whatever world wrote it.

    Raises:
        UserError: a kind or range that is asked for is not in the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        from safetensors import safe_open

        self.checkpoint = checkpoint
        self.files = [safe_open(checkpoint.path / p["name"], "pt") for p in checkpoint.index["partitions"]]
        self.places: dict[str, list[tuple[int, Any]]] = {}
        for file in self.files:
            for name, start in json.loads(file.metadata()["starts"]).items():
                self.places.setdefault(name, []).append((start, file))

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements start … start + length of a flattened parameter.

        Args:
            kind: `weight`, `exp_avg`, `exp_avg_sq` or the name of an average.
            name: of the parameter.

        Returns:
            Shape (length,), float32.
        """
        if kind not in self.checkpoint.index["kinds"] or name not in self.places:
            raise UserError(f"{self.checkpoint.path}: holds no {kind} of {name}; is the config the one that wrote it?")
        out = torch.empty(length)
        filled = 0
        for piece_start, file in self.places[name]:
            piece = file.get_slice(f"{kind}/{name}")
            low, high = max(start, piece_start), min(start + length, piece_start + piece.get_shape()[0])
            if low < high:
                out[low - start : high - start] = piece[low - piece_start : high - piece_start]
                filled += high - low
        if filled != length:
            raise UserError(f"{self.checkpoint.path}: {kind} of {name} is incomplete: {filled} of {length} values")
        return out

    def full(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of one kind, name and tensor, one at a time."""
        for name, shape in self.checkpoint.index["parameters"].items():
            yield name, self.read(kind, name, 0, int(torch.Size(shape).numel())).reshape(shape)


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


def restore(checkpoint: Checkpoint, pieces: Iterable[Piece]) -> None:
    """Copy a checkpoint into a rank's pieces.

    Args:
        checkpoint: written by any world size and ZeRO stage, and found fit by `check_fits`.
        pieces: from `Engine.pieces`; call `Engine.refresh` afterwards.

    Raises:
        UserError: it lacks something all the same.
    """
    fragments = Fragments(checkpoint)
    for piece in pieces:
        for kind, tensor in piece.tensors.items():
            tensor.copy_(fragments.read(kind, piece.name, piece.start, tensor.numel()))
