"""Building an index: every byte of every shard is read once, and what could not be trained on is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fmscale.batch import BadSample
from fmscale.data.index import (
    BESIDE,
    COLUMNS,
    FOLDER,
    VERSION,
    Index,
    Layout,
    Progress,
    Shard,
    ShardCheck,
    bad_samples,
    check_shards,
    checksums,
    is_spatial,
    refuse_unfinished,
)
from fmscale.data.sequence import stable_hash
from fmscale.data.storage import LocalStorage
from fmscale.data.tar import MAX_MEMBER_BYTES, PICKLES, DamageError, Member, find_tars, parse_json, walk
from fmscale.data.tensors import head_bytes, parse_head
from fmscale.errors import UserError
from fmscale.files import sha256, sync


class Row(NamedTuple):
    """A sample as a shard has it: key, place (see `Location`), and size in latent pixels."""

    key: str
    offset: int
    length: int
    tensors_start: int
    tensors_length: int
    height: int
    width: int


class _Scan(NamedTuple):
    """What one shard adds to the index: parallel columns, and the layout of its samples (None: it holds none)."""

    shard: Shard
    layout: Layout | None
    columns: dict[str, NDArray[Any]]
    keys: bytes


Scanner = Callable[[Path], tuple[list[Row], Layout | None]]


def scan_latents(path: Path) -> tuple[list[Row], Layout | None]:
    """The samples of a shard of latents, in the order of their bytes, and what each stores; None where it holds none.

    Raises:
        DamageError, OSError: it cannot be indexed.
    """
    with path.open("rb") as file:
        return _scan_samples(file)


def build_index(
    path: str | Path,
    made_by: dict[str, Any] | None,
    progress: Progress | None = None,
    scan: Scanner = scan_latents,
) -> Index:
    """Read every byte of a folder of tars and write its index; an old index is replaced once the new one is whole.

    Args:
        path: the dataset's folder; its tars are those directly in it.
        made_by: anything JSON can hold about how the shards came to be; the index keeps it.
        progress: told (bytes done, bytes in all) after each shard.
        scan: finds the samples of a tar; called by several threads at a time.

    Returns:
        The index, open.

    Raises:
        UserError: no tars, no samples, or a shard that cannot be indexed; the text names the shard and the sample.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder that holds the dataset's tars")
    refuse_unfinished(path)
    tars = find_tars(path)
    if not tars:
        raise UserError(f"{path} holds no *.tar: give the folder that holds the dataset's tars")
    scans = _scan_all(tars, scan, progress)
    return _replace_index(path, scans, _common_layout(path, scans), made_by)


def index_shard(tar: Path) -> Path:
    """Read every byte of a shard, and write beside it what an index says of it.

    Returns:
        The file, `NAME.tar.npz`, for `join_index`.

    Raises:
        UserError: the shard cannot be indexed.
        OSError: the file cannot be written.
    """
    scan = _scan_shard(scan_latents, tar)
    about = json.dumps({"shard": scan.shard, "layout": scan.layout}).encode()
    bytes_ = {"about": np.frombuffer(about, "u1"), "keys": np.frombuffer(scan.keys, "u1")}
    file = tar.with_name(f"{tar.name}.npz")
    np.savez(file, allow_pickle=False, **scan.columns, **bytes_)
    sync(file)
    return file


def join_index(path: Path, scans: Sequence[Path], made_by: dict[str, Any] | None) -> Index:
    """Write the index of a dataset of which each shard has been indexed where it was made: no shard is read again.

    Args:
        path: the dataset's folder, which holds the shards.
        scans: of all of them, as `index_shard` wrote them, by name of the shard.
        made_by: as for `build_index`.

    Raises:
        UserError: shards that do not go together, or keys that come twice.
    """
    loaded = [_load_scan(file) for file in scans]
    return _replace_index(path, loaded, _common_layout(path, loaded), made_by)


def _load_scan(file: Path) -> _Scan:
    with np.load(file, allow_pickle=False) as arrays:
        columns = dict(arrays)
    about = json.loads(columns.pop("about").tobytes())
    layout = {name: (dtype, tuple(shape)) for name, (dtype, shape) in about["layout"].items()}
    return _Scan(Shard(*about["shard"]), layout, columns, columns.pop("keys").tobytes())


def repair_index(path: str | Path, progress: Progress | None = None) -> tuple[Index, list[BadSample]]:
    """Read every byte of an indexed dataset, and write an index that leaves out what is damaged.

    Args:
        path: the dataset's folder; its tars stay as they are.
        progress: told (bytes done, bytes in all) after each shard.

    Returns:
        The new index, and what it leaves out.

    Raises:
        UserError: there is no index, a shard is there but cannot be read, or nothing sound would be left.
    """
    index = Index.open(path, check_shards=False)
    checks = list(check_shards(index, progress))
    for check in checks:
        if check.now is None and (index.path / check.shard.name).exists():
            raise UserError(f"{index.path / check.shard.name} {check.reason}; make it readable, or move it away")
    scans = [_sound_part(index, check) for check in checks if check.now]
    if not any(scan.shard.samples for scan in scans):
        raise UserError(f"{path}: not one sample is sound; make the dataset again")
    left_out = [bad for check in checks for bad in bad_samples(index, check)]
    return _replace_index(index.path, scans, index.layout, index.made_by), left_out


def _sound_part(index: Index, check: ShardCheck) -> _Scan:
    """What the index says of a shard, without its damaged samples."""
    assert check.now is not None
    starts = [bucket.start for bucket in index.buckets]
    rows, crcs = [], []
    for number in check.rows.tolist():
        if number not in check.bad:
            place, bucket = index.location(number), index.buckets[bisect_right(starts, number) - 1]
            within = (place.offset, place.length, place.tensors_start, place.tensors_length)
            rows.append(Row(index.key(number), *within, bucket.height, bucket.width))
            crcs.append(place.crc32)
    return _scan(check.now, index.layout, rows, crcs)


def _replace_index(path: Path, scans: Sequence[_Scan], layout: Layout, made_by: dict[str, Any] | None) -> Index:
    temporary = path / f"{FOLDER}.tmp-{os.getpid()}"
    try:
        _write(temporary, scans, layout, made_by)
        _refuse_duplicates(Index(path, temporary, LocalStorage(path)))
        _publish(temporary, path / FOLDER)
    except OSError as error:
        raise UserError(f"cannot write the index in {path}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Index.open(path)


def _scan_all(tars: Sequence[Path], scan: Scanner, progress: Progress | None) -> list[_Scan]:
    total_bytes, done_bytes = sum(tar.stat().st_size for tar in tars), 0
    scans = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # the checksums run outside Python's lock
        for scanned in pool.map(partial(_scan_shard, scan), tars):
            scans.append(scanned)
            done_bytes += scanned.shard.size
            if progress:
                progress(done_bytes, total_bytes)
    return scans


def _scan_shard(scan: Scanner, path: Path) -> _Scan:
    try:
        rows, layout = scan(path)
        with path.open("rb") as file:
            crcs, sha256 = checksums(file, [(row.offset, row.length) for row in rows])
    except (DamageError, OSError) as error:
        raise UserError(f"{path} cannot be indexed: {error}") from error
    return _scan(Shard(path.name, path.stat().st_size, sha256, len(rows)), layout, rows, crcs)


def _scan(shard: Shard, layout: Layout | None, rows: Sequence[Row], crcs: Sequence[int]) -> _Scan:
    keys = [row.key.encode() for row in rows]
    columns = {
        name: np.array([getattr(row, name) for row in rows], dtype="i8") for name in Row._fields if name != "key"
    }
    columns |= {"crc32": np.array(crcs, dtype="u4"), "key_bytes": np.array([len(key) for key in keys], dtype="i8")}
    return _Scan(shard, layout, columns, b"".join(keys))


def _scan_samples(file: BinaryIO) -> tuple[list[Row], Layout | None]:
    rows: list[Row] = []
    seen: set[str] = set()
    common: Layout | None = None
    for key, run in groupby(walk(file), key=lambda member: member.key):
        members = list(run)
        if key in seen:
            raise DamageError(
                f"key {key!r} comes twice: keys must differ, and the members of a sample lie side by side"
            )
        seen.add(key)
        stored = _tensor_member(key, members)
        for member in members:
            if member.size > MAX_MEMBER_BYTES:
                raise DamageError(f"{member.name!r} has {member.size} bytes, more than the limit of {MAX_MEMBER_BYTES}")
            if member.extension == "json":
                file.seek(member.start)
                parse_json(member, file.read(member.size))
        layout, height, width = _read_layout(file, stored)
        common = layout if common is None else common
        if layout != common:
            raise DamageError(_layout_differs(key, layout, common))
        offset = members[0].offset
        rows.append(Row(key, offset, members[-1].end - offset, stored.start - offset, stored.size, height, width))
    return rows, common


def _tensor_member(key: str, members: Sequence[Member]) -> Member:
    """The safetensors member of a sample whose members make sense together."""
    if not key.isprintable():
        raise DamageError(f"key {key!r} holds unprintable characters")
    by_extension: dict[str, Member] = {}
    for member in members:
        other = by_extension.setdefault(member.extension, member)
        if other is not member:
            raise DamageError(
                f"{other.name!r} and {member.name!r} are one sample, {key!r} (a key ends at the first dot)"
            )
        if member.extension in PICKLES:
            raise DamageError(f"{member.name!r} is a pickle, which is never read: store tensors as safetensors")
    if "safetensors" not in by_extension:
        raise DamageError(
            f"sample {key!r} has no .safetensors member, where latents are; tars of images are indexed by "
            "`fmscale index DATASET --images ENCODE.yaml`"
        )
    return by_extension["safetensors"]


def _read_layout(file: BinaryIO, member: Member) -> tuple[Layout, int, int]:
    """Layout and latent height and width of a sample, from the head of its safetensors member."""
    try:
        file.seek(member.start)
        length = head_bytes(file.read(8), member.size)
        entries = parse_head(file.read(length), member.size - 8 - length)
    except DamageError as error:
        raise DamageError(f"{member.name!r} {error}") from error
    layout: Layout = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    _, shape = layout.get("latents", ("", ()))
    if len(shape) != 3 or not prod(shape):
        raise DamageError(f"{member.name!r} has no tensor 'latents' of shape (channels, height, width)")
    for name, (dtype, other) in layout.items():
        if is_spatial(name):
            if len(other) != 3 or other[1:] != shape[1:]:
                raise DamageError(f"{member.name!r} has a tensor {name!r} of another height and width than its latents")
            layout[name] = (dtype, other[:1])
    return layout, shape[1], shape[2]


def _layout_differs(key: str, layout: Layout, common: Layout) -> str:
    name = next(name for name in sorted(layout | common) if layout.get(name) != common.get(name))
    this, others = ("{} {}".format(*entries[name]) if name in entries else "absent" for entries in (layout, common))
    return f"sample {key!r} stores tensor {name!r} as {this}, others as {others}"


def _common_layout(path: Path, scans: Sequence[_Scan]) -> Layout:
    common: Layout | None = None
    for scan in scans:
        common = scan.layout if common is None else common
        if common is not None and scan.layout not in (None, common):
            key = scan.keys[: scan.columns["key_bytes"][0]].decode()
            raise UserError(f"{path / scan.shard.name} cannot be indexed: {_layout_differs(key, scan.layout, common)}")
    if common is None:
        raise UserError(f"the tars in {path} hold no samples that training could use: give another folder")
    return common


def _merge(scans: Sequence[_Scan]) -> dict[str, NDArray[Any]]:
    """The columns of all shards as one, rows grouped by bucket; `height` and `width` besides those of the index."""
    columns = {name: np.concatenate([scan.columns[name] for scan in scans]) for name in scans[0].columns}
    columns["shard"] = np.repeat(np.arange(len(scans)), [scan.shard.samples for scan in scans])
    columns["key_end"] = np.cumsum(columns["key_bytes"])
    order = np.lexsort((columns["width"], columns["height"]))  # stable: shard and place decide within a bucket
    columns = {name: column[order] for name, column in columns.items()}
    unordered = b"".join(scan.keys for scan in scans)
    places = zip(columns.pop("key_end"), columns["key_bytes"], strict=True)
    columns["keys"] = np.frombuffer(b"".join(unordered[end - size : end] for end, size in places), dtype="u1")
    columns["key_start"] = np.concatenate([[0], np.cumsum(columns.pop("key_bytes"))])
    return columns


def _write(folder: Path, scans: Sequence[_Scan], layout: Layout, made_by: dict[str, Any] | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir()
    columns = _merge(scans)
    for name, dtype in COLUMNS.items():
        np.save(folder / f"{name}.npy", columns[name].astype(dtype, copy=False), allow_pickle=False)
        sync(folder / f"{name}.npy")
    files = {f"{FOLDER}/{name}.npy": folder / f"{name}.npy" for name in COLUMNS}
    if (beside := folder.parent / BESIDE).is_file():
        files[BESIDE] = beside
    sizes, counts = np.unique(np.stack([columns["height"], columns["width"]]), axis=1, return_counts=True)
    buckets = [{"height": int(h), "width": int(w), "rows": int(n)} for h, w, n in zip(*sizes, counts, strict=True)]
    described = {name: {"size": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()}
    _write_manifest(folder, [scan.shard for scan in scans], buckets, layout, made_by, described)


def _write_manifest(
    folder: Path,
    shards: list[Shard],
    buckets: list[dict[str, int]],
    layout: Layout,
    made_by: dict[str, Any] | None,
    files: dict[str, dict[str, Any]],
) -> None:
    names_and_sums = "".join(f"{shard.name} {shard.sha256} {shard.samples}\n" for shard in shards)
    manifest = {
        "version": VERSION,
        "fingerprint": hashlib.sha256(names_and_sums.encode()).hexdigest(),
        "made_by": made_by,
        "layout": layout,
        "buckets": buckets,
        "files": files,
        "shards": [shard._asdict() for shard in shards],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    sync(folder / "manifest.json")
    sync(folder)


def _refuse_duplicates(index: Index) -> None:
    """Compare 8-byte digests of the keys, and the keys themselves where digests agree: small even for 10**8 keys."""
    digests = np.fromiter((stable_hash(index.key(row)) for row in range(len(index))), dtype="u8", count=len(index))
    order = np.argsort(digests, kind="stable")
    for at in np.flatnonzero(digests[order[1:]] == digests[order[:-1]]):
        first, second = order[at], order[at + 1]
        if index.key(first) == index.key(second):
            shards = " and ".join(index.storage.where(index.location(row).shard) for row in (first, second))
            raise UserError(f"key {index.key(first)!r} is in {shards}: keys must differ over the whole dataset")


def _publish(temporary: Path, final: Path) -> None:
    """Put a whole index in place. A folder cannot be replaced in one move: a crash in between leaves no index."""
    old = final.with_name(f"{FOLDER}.old-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
