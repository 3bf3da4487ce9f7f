"""From the place of a sample to its tensors: bytes, checksum, members, values."""

from __future__ import annotations

import io
import json
import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
from torch import Tensor

from fmscale.data.index import Location
from fmscale.data.tar import PICKLES, DamageError, Member, walk

GIB = 1 << 30


@dataclass(frozen=True)
class Sample:
    """A stored sample: `tensors` by name, and `meta`, its json (with `caption` from a .txt member, if it has one)."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class OpenShards:
    """The shards that were read last, kept open: opening a file is slow on a cluster's file system.

    Args:
        limit: the most files open at once, > 0.
    """

    def __init__(self, limit: int = 64):
        self._limit = limit
        self._files: OrderedDict[Path, BinaryIO] = OrderedDict()

    def __enter__(self) -> OpenShards:
        return self

    def __exit__(self, *error: object) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def read(self, location: Location) -> bytes:
        """The bytes of a location, fewer where the shard ends early."""
        descriptor = self._file(location.shard).fileno()
        parts, position, left = [], location.offset, location.length
        while left and (part := os.pread(descriptor, left, position)):  # one call reads less than 2 GiB
            parts.append(part)
            position, left = position + len(part), left - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _file(self, shard: Path) -> BinaryIO:
        if shard not in self._files:
            self._files[shard] = shard.open("rb", buffering=0)
            if len(self._files) > self._limit:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        return self._files[shard]


def read_sample(location: Location, shards: OpenShards, max_bytes: int = GIB) -> Sample:
    """Read, check and decode one sample.

    Args:
        location: from the index.
        shards: files kept open between calls.
        max_bytes: the largest sample, all its members together, that is read at all.

    Raises:
        DamageError: the sample cannot be read, differs from the index, cannot be decoded, is too large, holds a pickle,
            or a number in it is not finite.
    """
    if location.length > max_bytes:
        raise DamageError(f"has {location.length} bytes, more than the limit of {max_bytes}")
    try:
        data = shards.read(location)
    except OSError as error:
        raise DamageError(f"cannot be read: {error.strerror}") from error
    if len(data) < location.length:
        raise DamageError(f"the shard ends {location.length - len(data)} bytes before the sample does")
    if zlib.crc32(data) != location.crc32:
        raise DamageError("its bytes have changed since it was indexed")
    return decode(data)


def decode(data: bytes) -> Sample:
    """The sample in a run of whole tar members; members that are no safetensors, json or txt are left alone.

    Raises:
        DamageError: as for `read_sample`.
    """
    tensors: dict[str, Tensor] = {}
    meta: dict[str, Any] = {}
    for member in walk(io.BytesIO(data), whole=False):
        content = data[member.start : member.start + member.size]
        if member.extension in PICKLES:
            raise DamageError(f"member {member.name!r} is a pickle, which is never read")
        if member.extension == "safetensors":
            tensors = _tensors(member, content)
        elif member.extension == "json":
            meta |= _json(member, content)
        elif member.extension == "txt":
            meta.setdefault("caption", content.decode(errors="replace").strip())
    return Sample(tensors, meta)


def _tensors(member: Member, content: bytes) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise DamageError(f"member {member.name!r} is no safetensors file ({error})") from error
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise DamageError(f"tensor {name!r} holds NaN or Inf")
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    """A finite sum, far cheaper than a test of every number, has finite terms; one that overflows decides nothing."""
    return not tensor.is_floating_point() or bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _json(member: Member, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"member {member.name!r} is no json ({error})") from error
    if not isinstance(value, dict):
        raise DamageError(f"member {member.name!r} is no json object")
    return value
