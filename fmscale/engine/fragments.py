"""A partition file: the pieces of parameters that one rank owns, as safetensors; and parameters read from many of them.

    head      json: each tensor's place; metadata: where each piece starts in its parameter, each tensor's CRC-32
    tensors   `weight/NAME`, `exp_avg/NAME`, …: 1-D fp32, one after another

The index holds the SHA-256 of the head, and the head vouches for the tensors: what is needed can be checked without
reading the rest. Files are read, not mapped: a disk that fails then raises OSError, where a mapping would kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zlib_ng import zlib_ng

from fmscale.errors import UserError

CHUNK = 1 << 18  # values read at once: 1 MB, which stays in the cache of a core
SYNC_BYTES = 1 << 28  # after which a file is synced: nobody could tell one long sync from a disk that hangs
FLOAT32 = torch.float32.itemsize
TAGS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as the format spells them


class DamagedError(UserError):
    """A checkpoint is not what was written, or cannot be read; the text names the file."""


def safetensors_head(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file whose tensors follow one after another.

    Args:
        tensors: dtype and shape of each.
        metadata: texts to keep with them.

    Returns:
        The bytes before the first tensor, and where in the file each tensor begins.

    Source: the format, as the safetensors library documents it.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    begins: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begins[name], end = end, end + dtype.itemsize * prod(shape)
        table[name] = {"dtype": TAGS[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + begin for name, begin in begins.items()}


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, which are not copied."""
    return tensor.detach().flatten().view(torch.uint8).numpy().data


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write bytes to a place in a file; one call to the system writes less than 2 GiB, and may write less than that."""
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def write_partition(
    descriptor: int, tensors: Mapping[str, Tensor], starts: Mapping[str, int], on_disk: Callable[[], None]
) -> bytes:
    """Write a partition file, and wait until it is on disk.

    Args:
        descriptor: of a new file.
        tensors: `KIND/NAME` -> 1-D float32, contiguous; each is asked for twice.
        starts: where each NAME's piece begins in the flattened parameter.
        on_disk: is called whenever another `SYNC_BYTES` have got there.

    Returns:
        Its head, for the index to vouch for.
    """
    sums: dict[str, int] = {}
    layout: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    for name, tensor in tensors.items():
        sums[name], layout[name] = zlib_ng.crc32(raw(tensor)), (tensor.dtype, tensor.shape)
    head, begins = safetensors_head(layout, {"starts": json.dumps(dict(starts)), "crc32": json.dumps(sums)})
    write_at(descriptor, head, 0)
    waiting = 0
    for name, tensor in tensors.items():
        write_at(descriptor, raw(tensor), begins[name])
        waiting += tensor.nbytes
        if waiting >= SYNC_BYTES:
            os.fsync(descriptor)
            on_disk()
            waiting = 0
    os.fsync(descriptor)
    return head


class Partition:
    """A partition file, open for reading.

    Args:
        path: of the file.
        head_bytes, head_sha256: of its head, from the index.

    Raises:
        DamagedError: its head is not what was written, or cannot be read.
    """

    def __init__(self, path: Path, head_bytes: int, head_sha256: str) -> None:
        self.path = path
        with self._readable():
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            head = os.pread(self._descriptor, head_bytes, 0)
        if hashlib.sha256(head).hexdigest() != head_sha256:
            raise DamagedError(f"{path}: damaged: the checksum of its head differs")
        table = json.loads(head[8:])
        metadata = table.pop("__metadata__")
        self.starts: dict[str, int] = json.loads(metadata["starts"])
        self._sums: dict[str, int] = json.loads(metadata["crc32"])
        self._places = {
            key: (head_bytes + entry["data_offsets"][0], prod(entry["shape"])) for key, entry in table.items()
        }

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DamagedError(f"{self.path}: cannot be read: {error.strerror}") from error

    def keys(self, kinds: Iterable[str] | None = None) -> list[str]:
        """Names of its tensors, `KIND/NAME`; of some kinds only where these are given."""
        wanted = None if kinds is None else set(kinds)
        return [key for key in self._places if wanted is None or key.split("/")[0] in wanted]

    def length(self, key: str) -> int:
        """How many values a tensor has."""
        return self._places[key][1]

    def chunks(self, key: str, low: int, high: int) -> Iterator[tuple[int, Tensor]]:
        """Values low … high of a tensor, `CHUNK` at most at a time, each time with the place of the first.

        Raises:
            DamagedError: it cannot be read, or is too short; or the whole tensor was read, and its checksum differs.
        """
        begin, length = self._places[key]
        crc = 0
        for at in range(low, high, CHUNK):
            values = torch.empty(min(CHUNK, high - at))
            left, offset = raw(values), begin + FLOAT32 * at
            while left:
                with self._readable():
                    count = os.preadv(self._descriptor, [left], offset)
                if not count:
                    raise DamagedError(f"{self.path}: missing or cut short")
                left, offset = left[count:], offset + count
            crc = zlib_ng.crc32(raw(values), crc)
            yield at, values
        if (low, high) == (0, length) and crc != self._sums[key]:
            raise DamagedError(f"{self.path}: damaged: the checksum of {key} differs")

    def check(self, key: str) -> None:
        """Compare a tensor with its checksum.

        Raises:
            DamagedError: as for `chunks`.
        """
        for _ in self.chunks(key, 0, self.length(key)):
            pass
