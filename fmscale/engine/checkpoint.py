"""A checkpoint is a folder of safetensors fragments: each rank writes what it owns, any world reads what it needs.

    step-00001000/index.json                              step, world, parameters' shapes, files' checksums, description
                  partition-00000-of-00008.safetensors    `weight/NAME`, `exp_avg/NAME`, …: 1-D fp32 pieces
                                                          metadata: where each NAME's piece starts

A folder that bears its final name is whole: it is written under another name, synced to disk, then renamed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fmscale.distributed import any_rank, total
from fmscale.engine.zero import Piece
from fmscale.errors import UserError
from fmscale.files import sha256, sync

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_DELETING = ".deleting-"
_DIGEST_BYTES = 32
Result = TypeVar("Result")


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


def save(
    root: Path,
    pieces: Iterable[Piece],
    *,
    step: int,
    updates: int,
    shapes: Mapping[str, Sequence[int]],
    description: Mapping[str, Any],
    keep: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Path:
    """Write a checkpoint; every rank calls it, and returns when the folder is whole.

    Args:
        root: the run's `checkpoints` folder, on a file system that all ranks see.
        pieces: from `Engine.pieces`.
        step, updates: optimizer steps done, and those of them that were applied.
        shapes: of every parameter.
        description: anything else a reader should know, as plain data.
        keep: newest checkpoints that stay; older ones are deleted once this one is whole.
        device: on which the ranks' small collectives run.

    Raises:
        UserError: a rank could not write; nothing is left behind and older checkpoints are untouched.
    """
    final = root / f"step-{step:08d}"
    temporary = root / f".writing-{final.name}"
    names = [f"partition-{r:05d}-of-{world_size:05d}.safetensors" for r in range(world_size)]
    try:
        _everywhere(final, device, lambda: _begin(temporary) if rank == 0 else None)
        digest, size, kinds = _everywhere(final, device, lambda: _write_partition(temporary / names[rank], pieces))
        digests = _gather_digests(digest, size, rank, world_size, device)
        index = {
            "format": FORMAT,
            "step": step,
            "updates": updates,
            "world_size": world_size,
            "kinds": kinds,
            "parameters": {key: list(shape) for key, shape in shapes.items()},
            "partitions": [
                {"name": name, "sha256": sha, "bytes": length}
                for name, (sha, length) in zip(names, digests, strict=True)
            ],
            "description": dict(description),
        }
        _everywhere(final, device, lambda: _publish(temporary, final, index) if rank == 0 else None)
    except UserError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if rank == 0:
        _prune(root, keep)
    return final


def _everywhere(what: Path, device: torch.device, action: Callable[[], Result]) -> Result:
    """Do `action` on this rank; raise on every rank if it failed on any. Returns when all ranks have done it."""
    from safetensors import SafetensorError

    failure = ""
    try:
        result = action()
    except (OSError, SafetensorError) as error:
        failure = str(error)
    if any_rank(bool(failure), device):
        raise UserError(
            f"{what}: the checkpoint could not be written: {failure or 'another rank failed, see its line'}"
        )
    return result


def _begin(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write_partition(path: Path, pieces: Iterable[Piece]) -> tuple[bytes, int, list[str]]:
    """Write a rank's pieces; returns the file's SHA-256, size in bytes and the kinds of tensor in it."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    for piece in pieces:
        starts[piece.name] = piece.start
        tensors |= {
            f"{kind}/{piece.name}": tensor.detach().cpu().contiguous() for kind, tensor in piece.tensors.items()
        }
    save_file(tensors, path, metadata={"starts": json.dumps(starts)})
    sync(path)
    return bytes.fromhex(sha256(path)), path.stat().st_size, sorted({key.split("/")[0] for key in tensors})


def _gather_digests(
    digest: bytes, size: int, rank: int, world_size: int, device: torch.device
) -> list[tuple[str, int]]:
    """Every rank's (SHA-256 in hex, size), by a sum over ranks of rows in which each fills its own."""
    rows = torch.zeros(world_size, _DIGEST_BYTES + 8, dtype=torch.int32, device=device)
    rows[rank] = torch.tensor(list(digest + size.to_bytes(8, "little")), dtype=torch.int32)
    table = [bytes(row) for row in total(rows).tolist()]
    return [(row[:_DIGEST_BYTES].hex(), int.from_bytes(row[_DIGEST_BYTES:], "little")) for row in table]


def _publish(temporary: Path, final: Path, index: dict[str, Any]) -> None:
    index_path = temporary / "index.json"
    index_path.write_text(json.dumps(index, indent=1) + "\n")
    sync(index_path)
    sync(temporary)
    shutil.rmtree(final, ignore_errors=True)  # a run that went back behind this step writes it again
    temporary.rename(final)
    sync(final.parent)


def _prune(root: Path, keep: int) -> None:
    for checkpoint in find_all(root)[:-keep]:
        checkpoint.rename(root / f"{_DELETING}{checkpoint.name}")  # a folder that bears its final name is whole
    for leftover in root.glob(f"{_DELETING}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def find_all(root: Path) -> list[Path]:
    """Folders of whole checkpoints under `root`, oldest first."""
    found = [entry for entry in root.glob("step-*") if _NAME.fullmatch(entry.name)]
    return sorted(found, key=lambda entry: int(entry.name.split("-")[1]))


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's index and check that its files are there in full length.

    Raises:
        UserError: not a checkpoint, of another format, or a file is missing or cut short.
    """
    try:
        index = json.loads((path / "index.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole checkpoint ({error}); remove it to use an older one") from None
    given = index.get("format") if isinstance(index, dict) else None
    if given != FORMAT:
        raise UserError(f"{path}: checkpoint format {given}, this program reads {FORMAT}")
    for partition in index["partitions"]:
        file = path / partition["name"]
        if not file.is_file() or file.stat().st_size != partition["bytes"]:
            raise UserError(f"{file}: missing or cut short; remove {path.name} to use an older checkpoint")
    return Checkpoint(path, index)


def latest(root: Path) -> Checkpoint | None:
    """The newest checkpoint under `root`, or None where there is none."""
    found = find_all(root)
    return open_checkpoint(found[-1]) if found else None


def at_step(root: Path, step: int | None) -> Checkpoint:
    """The checkpoint of a step, or the newest for None.

    Raises:
        UserError: there is none; the line names those that are there.
    """
    found = find_all(root)
    if not found:
        raise UserError(f"{root}: no checkpoint here; is this a run directory that has saved one?")
    wanted = found[-1] if step is None else root / f"step-{step:08d}"
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
            raise UserError(
                f"{file}: damaged (its checksum differs); remove {checkpoint.path.name} to use an older checkpoint"
            )


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
