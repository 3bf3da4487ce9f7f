"""From the place of a sample to its tensors: bytes, checksum, members, values."""

from __future__ import annotations

import io
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from fmscale.data.index import Location
from fmscale.data.tar import DamageError, parse_json, walk
from fmscale.data.tensors import views

GIB = 1 << 30
Room = Callable[[int], memoryview]  # size in bytes -> writable memory of that size


@dataclass(frozen=True)
class Sample:
    """A stored sample.

    Attributes:
        tensors: by name; they share memory with `data`.
        data: its members in the tar.
    """

    tensors: dict[str, Tensor]
    data: memoryview

    def read_meta(self) -> dict[str, Any]:
        """Its json, with `caption` from a .txt member if it has one; images beside them are left alone.

        Raises:
            DamageError: the json is none.
        """
        meta: dict[str, Any] = {}
        for member in walk(io.BytesIO(self.data), whole=False):
            content = bytes(self.data[member.start : member.start + member.size])
            if member.extension == "json":
                meta |= parse_json(member, content)
            elif member.extension == "txt":
                meta.setdefault("caption", content.decode(errors="replace").strip())
        return meta


class Scratch:
    """Memory that is used again and again: the first touch of fresh memory costs more than reading into it."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def room(self, size: int) -> memoryview:
        """`size` writable bytes; what was read into it before is lost."""
        if len(self._memory) < size:
            self._memory = bytearray(size + size // 8)  # tensors may still look into the old memory
        return memoryview(self._memory)[:size]


def fresh(size: int) -> memoryview:
    """`size` writable bytes that are nobody else's."""
    return memoryview(bytearray(size))


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

    def read(self, location: Location, room: Room = fresh) -> memoryview:
        """The bytes of a location, fewer where the shard ends early."""
        descriptor = self._file(location.shard).fileno()
        data, done = room(location.length), 0
        while done < location.length:  # one call reads less than 2 GiB
            count = os.preadv(descriptor, [data[done:]], location.offset + done)
            if not count:
                break
            done += count
        return data[:done]

    def _file(self, shard: Path) -> BinaryIO:
        if shard not in self._files:
            self._files[shard] = shard.open("rb", buffering=0)
            if len(self._files) > self._limit:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        return self._files[shard]


def read_sample(location: Location, shards: OpenShards, room: Room = fresh, max_bytes: int = GIB) -> Sample:
    """Read and check one sample. What its members are was checked when it was indexed, and the checksum says it still
    holds.

    Args:
        location: from the index.
        shards: files kept open between calls.
        room: where its bytes go.
        max_bytes: the largest sample, all its members together, that is read at all.

    Raises:
        DamageError: the sample cannot be read, differs from the index, is too large, or a number in it is not finite.
    """
    if location.length > max_bytes:
        raise DamageError(f"has {location.length} bytes, more than the limit of {max_bytes}")
    try:
        data = shards.read(location, room)
    except OSError as error:
        raise DamageError(f"cannot be read: {error.strerror}") from error
    if len(data) < location.length:
        raise DamageError(f"the shard ends {location.length - len(data)} bytes before the sample does")
    if zlib.crc32(data) != location.crc32:
        raise DamageError("its bytes have changed since it was indexed")
    tensors = views(data[location.tensors_start : location.tensors_start + location.tensors_length])
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise DamageError(f"tensor {name!r} holds NaN or Inf")
    return Sample(tensors, data)


def _is_finite(tensor: Tensor) -> bool:
    """A finite sum, far cheaper than a test of every number, has finite terms; one that overflows decides nothing."""
    return not tensor.is_floating_point() or isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())
