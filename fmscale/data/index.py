"""The index of a dataset: where each sample's bytes lie, and what they must sum to.

    DATASET/*.tar                   plain WebDataset shards
    DATASET/index/manifest.json     shards, buckets, stored tensors, fingerprint
    DATASET/index/COLUMN.npy        one memory-mapped column per field; rows are grouped by bucket

Within a bucket rows follow the name of the shard, then the place in it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fmscale.batch import BadSample
from fmscale.data.storage import LocalStorage, Location, Storage, crc32
from fmscale.data.tar import CHUNK_BYTES, find_tars
from fmscale.data.tensors import DTYPES
from fmscale.errors import UserError

VERSION = 3
FOLDER = "index"
UNFINISHED = "unfinished"  # folder of a dataset that is still being made
COLUMNS = {
    "shard": "u4",
    "offset": "i8",
    "length": "i8",
    "tensors_start": "i8",
    "tensors_length": "i8",
    "crc32": "u4",
    "key_start": "i8",
    "keys": "u1",
}
BESIDE = "null.safetensors"  # lies beside the index where the dataset was encoded
BROKEN = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
Progress = Callable[[int, int], None]
Layout = dict[str, tuple[str, tuple[int, ...]]]  # stored tensors: name -> dtype, shape; of latents the channels alone


@dataclass(frozen=True)
class Bucket:
    """The samples of one latent size: rows start .. start + count - 1; height and width in latent pixels."""

    height: int
    width: int
    start: int
    count: int

    @property
    def name(self) -> str:
        """For instance `64x96`: height, then width."""
        return f"{self.height}x{self.width}"


class Shard(NamedTuple):
    """A tar of the dataset as it was when it was indexed; size in bytes, samples counted."""

    name: str
    size: int
    sha256: str
    samples: int


class Index:
    """An open index; its columns stay on disk, and it is sent to a worker as nothing but its path.

    Attributes:
        path: folder of this machine with the index and what lies beside it: the dataset's own, or what was fetched of
            one that lies behind a URL.
        storage: reads the shards.
        buckets: by height, then width.
        shards: by name.
        layout: dtype and shape of each stored tensor, the same in every sample (of latents, the channels alone).
        fingerprint: digest of all shard names and contents, and of how many samples of each are in the index.
        made_by: what the program that wrote the shards said about them, or None.
    """

    def __init__(self, path: Path, folder: Path, storage: Storage):
        manifest = check_manifest(json.loads((folder / "manifest.json").read_text()))
        self.path, self.storage = path, storage
        self.shards = tuple(Shard(**shard) for shard in manifest["shards"])
        self.layout: Layout = {name: (dtype, tuple(shape)) for name, (dtype, shape) in manifest["layout"].items()}
        self.fingerprint: str = manifest["fingerprint"]
        self.made_by: dict[str, Any] | None = manifest["made_by"]
        self.buckets = tuple(_buckets(manifest["buckets"]))
        self._columns = {name: _open_column(folder, name) for name in COLUMNS}
        if any(len(self._columns[name]) != len(self) + (name == "key_start") for name in COLUMNS if name != "keys"):
            raise ValueError("a column has another length than the manifest says")

    @classmethod
    def open(cls, path: str | Path, check_shards: bool = True, storage: Storage | None = None) -> Index:
        """Open the index of a dataset.

        Args:
            path: the dataset's folder.
            check_shards: also compare names and sizes of the tars in that folder with the index.
            storage: holds the shards; None where they lie in that folder.

        Raises:
            UserError: no such folder, no index, an index of another version or damaged, or other tars than it lists.
        """
        path = Path(path).absolute()
        folder = path / FOLDER
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give the folder that holds the dataset's tars")
        if not (folder / "manifest.json").is_file():
            refuse_unfinished(path)
            raise UserError(f"{path} has no index: run `fmscale index {path}`")
        try:
            index = cls(path, folder, storage or LocalStorage(path))
        except BROKEN as error:
            raise UserError(f"{folder} cannot be used ({error}): run `fmscale index {path}`") from error
        if check_shards and storage is None:
            index._check_shards()
        return index

    def __reduce__(self) -> tuple[Callable[..., Index], tuple[Path, bool, Storage]]:
        return Index.open, (self.path, False, self.storage)

    @property
    def place(self) -> str:
        """Folder or URL of the dataset, for people."""
        return self.storage.where("").rstrip("/")

    def __len__(self) -> int:
        return self.buckets[-1].start + self.buckets[-1].count

    def key(self, row: int) -> str:
        """The key of a sample."""
        start, end = self._columns["key_start"][row : row + 2]
        key = self._columns["keys"][start:end].tobytes().decode(errors="replace")
        return key if key.isprintable() else repr(key)

    def location(self, row: int) -> Location:
        """Where a sample's bytes lie."""
        shard, *place = (int(self._columns[name][row]) for name in ("shard", *Location._fields[1:]))
        return Location(self.shards[shard].name, *place)

    def empty(self, height: int, width: int, count: int) -> dict[str, Tensor]:
        """Memory for the tensors of so many samples of this latent size, each (count, ...), with any content."""
        return {
            name: torch.empty((count, *shape, *((height, width) if is_spatial(name) else ())), dtype=DTYPES[dtype])
            for name, (dtype, shape) in self.layout.items()
        }

    def rows_by_shard(self) -> Iterator[tuple[Shard, NDArray[np.int64]]]:
        """Each shard with the rows of its samples, in the order of their bytes."""
        shard, offset = self._columns["shard"], self._columns["offset"]
        order = np.lexsort((offset, shard))
        edges = np.searchsorted(shard[order], np.arange(len(self.shards) + 1))
        for number, entry in enumerate(self.shards):
            yield entry, order[edges[number] : edges[number + 1]]

    def reach(self, bucket: Bucket, names: Container[str]) -> int:
        """Rows of a bucket from its first to the last that lies in one of these shards, both counted."""
        column = self._columns["shard"][bucket.start : bucket.start + bucket.count]
        numbers = np.array([i for i, shard in enumerate(self.shards) if shard.name in names], dtype=column.dtype)
        starts, ends = np.searchsorted(column, numbers, "left"), np.searchsorted(column, numbers, "right")
        return int(max(ends[ends > starts], default=0))

    def _check_shards(self) -> None:
        found = {path.name: path.stat().st_size for path in find_tars(self.path)}
        for shard in self.shards:
            if shard.name not in found:
                raise UserError(f"{self.path / shard.name} is gone: put it back, or run `fmscale index {self.path}`")
            size = found.pop(shard.name)
            if size != shard.size:
                raise UserError(
                    f"{self.path / shard.name} has {size} bytes, {shard.size} when it was indexed: "
                    f"put the old one back, or run `fmscale index {self.path}`"
                )
        if found:
            raise UserError(f"{self.path / min(found)} is not in the index: run `fmscale index {self.path}`")


def refuse_unfinished(path: Path) -> None:
    """Raise a UserError where a dataset is still being made."""
    if (path / UNFINISHED).is_dir():
        raise UserError(f"{path} is not finished: let its `fmscale encode` come to an end, or start it again")


def check_manifest(manifest: Any) -> dict[str, Any]:
    """The content of a manifest.json, if it is one.

    Raises:
        ValueError, LookupError, TypeError: it is not, or of another version.
    """
    if manifest["version"] != VERSION:
        raise ValueError(f"version {manifest['version']}, this program reads {VERSION}")
    for shard in manifest["shards"]:
        if not (str(shard["name"]) == shard["name"] and 0 < shard["size"] < 2**62 and 0 <= shard["samples"] < 2**40):
            raise ValueError(f"shard {shard} makes no sense")
        if not re.fullmatch("[0-9a-f]{64}", shard["sha256"]):
            raise ValueError(f"shard {shard['name']!r} has no digest")
    sizes = [(bucket["height"], bucket["width"]) for bucket in manifest["buckets"]]
    counts = [bucket["rows"] for bucket in manifest["buckets"]]
    if not sizes or len(set(sizes)) < len(sizes) or not all(0 < side < 2**16 for size in sizes for side in size):
        raise ValueError("its buckets make no sense")
    if not all(0 < count < 2**40 for count in counts) or sum(counts) != sum(s["samples"] for s in manifest["shards"]):
        raise ValueError("its counts make no sense")
    for name, (dtype, shape) in manifest["layout"].items():
        if dtype not in DTYPES or not all(0 <= side < 2**32 for side in shape):
            raise ValueError(f"tensor {name!r} makes no sense")
    if any(len(shape) != 1 for name, (_, shape) in manifest["layout"].items() if is_spatial(name)):
        raise ValueError("its latents have no channels")
    if not {"latents", "pixels"} & manifest["layout"].keys():
        raise ValueError("it has neither latents nor pixels")
    return manifest


def is_spatial(name: str) -> bool:
    """Whether a stored tensor has the height and width of its bucket: `latents`, and what else begins so."""
    return name.startswith("latents")


def _buckets(entries: Iterable[dict[str, int]]) -> Iterator[Bucket]:
    start = 0
    for entry in entries:
        yield Bucket(entry["height"], entry["width"], start, entry["rows"])
        start += entry["rows"]


def _open_column(folder: Path, name: str) -> NDArray[Any]:
    column = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    if column.dtype != np.dtype(COLUMNS[name]) or column.ndim != 1:
        raise ValueError(f"column {name} has another type than version {VERSION} says")
    return np.asarray(column)  # a plain view: numpy's own class for mapped files is slow to index


class ShardCheck(NamedTuple):
    """A shard compared with the index.

    Attributes:
        shard: as the index has it.
        rows: of its samples, in the order of their bytes.
        bad: reason by row, for the samples that differ.
        now: the shard as it is, or None where it cannot be read.
        reason: what is wrong with the shard besides its samples; empty where nothing is.
    """

    shard: Shard
    rows: NDArray[np.int64]
    bad: dict[int, str]
    now: Shard | None
    reason: str


def check_shards(index: Index, progress: Progress | None = None) -> Iterator[ShardCheck]:
    """Read every byte of the dataset and compare it with the index.

    Args:
        index: opened with `check_shards=False` to have missing and cut shards listed too.
        progress: told (bytes done, bytes in all) after each shard.
    """
    total_bytes, done_bytes = sum(shard.size for shard in index.shards), 0
    for shard, rows in index.rows_by_shard():
        yield _check_shard(index, shard, rows)
        done_bytes += shard.size
        if progress:
            progress(done_bytes, total_bytes)


def _check_shard(index: Index, shard: Shard, rows: NDArray[np.int64]) -> ShardCheck:
    places = [index.location(row) for row in rows]
    try:
        with index.storage.open(shard.name) as file:
            crcs, sha256 = checksums(file, [(place.offset, place.length) for place in places])
            size = file.tell()
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        return ShardCheck(shard, rows, dict.fromkeys(rows.tolist(), f"its shard {reason}"), None, reason)
    bad = {}
    for row, place, crc in zip(rows.tolist(), places, crcs, strict=True):
        if place.offset + place.length > size:
            bad[row] = f"the shard ends at byte {size}, before the sample does"
        elif crc != place.crc32:
            bad[row] = "its bytes have changed since it was indexed"
    outside = not bad and sha256 != shard.sha256
    reason = "bytes outside its samples have changed since it was indexed" if outside else ""
    return ShardCheck(shard, rows, bad, Shard(shard.name, size, sha256, len(rows) - len(bad)), reason)


def verify(index: Index, progress: Progress | None = None) -> list[BadSample]:
    """List what differs from the index, having read every byte.

    Args:
        index, progress: as for `check_shards`.

    Returns:
        One entry per damaged sample; an entry with an empty key stands for a shard that is missing, or that differs
        outside its samples.
    """
    return [bad for check in check_shards(index, progress) for bad in bad_samples(index, check)]


def bad_samples(index: Index, check: ShardCheck) -> list[BadSample]:
    """What is wrong with a shard, as `verify` lists it."""
    if check.reason:
        return [BadSample("", check.shard.name, check.reason)]
    return [BadSample(index.key(row), check.shard.name, reason) for row, reason in check.bad.items()]


def checksums(file: BinaryIO, ranges: Sequence[tuple[int, int]]) -> tuple[list[int], str]:
    """CRC-32 of each byte range and SHA-256 of the whole file, in one pass.

    Args:
        file: seekable; read from its start to its end.
        ranges: (offset, length) of each, ascending, not overlapping.
    """
    file.seek(0)
    digest = hashlib.sha256()

    def consume(count: int) -> int:
        crc = 0
        while count > 0 and (chunk := file.read(min(count, CHUNK_BYTES))):
            digest.update(chunk)
            crc = crc32([chunk], crc)
            count -= len(chunk)
        return crc

    crcs = []
    for offset, length in ranges:
        consume(offset - file.tell())
        crcs.append(consume(length))
    consume(2**63)
    return crcs, digest.hexdigest()
