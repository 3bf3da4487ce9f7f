"""Where the bytes of a dataset lie, and how a range of them is read: a folder here; `remote` has those behind URLs."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from zlib_ng import zlib_ng


class Location(NamedTuple):
    """The bytes of one sample.

    Attributes:
        shard: name of a tar in the dataset's storage.
        offset, length: of its members in the tar, headers included.
        tensors_start, tensors_length: of its safetensors file within those bytes; 0 where it is an image.
        crc32: zlib's, over all of those bytes.
    """

    shard: str
    offset: int
    length: int
    tensors_start: int
    tensors_length: int
    crc32: int


class Storage(Protocol):
    """Files of one dataset, by name."""

    def where(self, name: str) -> str:
        """Path or URL of a file, for people."""

    def expect(self, locations: Sequence[Location]) -> None:
        """Take note of what is read next; what is slow to fetch is fetched now, all of it at once."""

    def read(self, location: Location, buffers: Sequence[memoryview]) -> int:
        """Fill buffers, one after another, with the bytes of a sample.

        Returns:
            How many bytes were read: fewer than `location.length` where the shard ends early.

        Raises:
            OSError: the shard cannot be read.
            OutageError: the service that holds it cannot be reached.
        """

    def open(self, name: str) -> BinaryIO:
        """A whole file, to be read from its start to its end.

        Raises:
            OSError, OutageError: as for `read`.
        """


def crc32(buffers: Iterable[memoryview | bytes], crc: int = 0) -> int:
    """Checksum of the bytes in buffers, one after another, after others whose checksum is `crc`."""
    for buffer in buffers:
        crc = zlib_ng.crc32(buffer, crc)
    return crc


class LocalStorage:
    """A folder of this machine. The shards that were read last stay open: opening is slow on a cluster's file system.

    Args:
        folder: holds the tars.
        limit: the most files open at once, > 0.
    """

    def __init__(self, folder: Path, limit: int = 64):
        self.folder = folder
        self._limit = limit
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()

    def where(self, name: str) -> str:
        """See `Storage`."""
        return str(self.folder / name)

    def __reduce__(self) -> tuple[type[LocalStorage], tuple[Path, int]]:
        return LocalStorage, (self.folder, self._limit)

    def expect(self, locations: Sequence[Location]) -> None:
        """See `Storage`; the operating system reads ahead well enough."""

    def read(self, location: Location, buffers: Sequence[memoryview]) -> int:
        """See `Storage`."""
        descriptor, done = self._file(location.shard).fileno(), 0
        while left := _without(buffers, done):  # one call reads less than 2 GiB
            count = os.preadv(descriptor, left, location.offset + done)
            if not count:
                break
            done += count
        return done

    def open(self, name: str) -> BinaryIO:
        """See `Storage`."""
        return (self.folder / name).open("rb")

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            self._files[name] = (self.folder / name).open("rb", buffering=0)
            if len(self._files) > self._limit:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(name)
        return self._files[name]


def _without(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of buffers when their first bytes are done."""
    left = []
    for buffer in buffers:
        if done < len(buffer):
            left.append(buffer[done:])
        done = max(0, done - len(buffer))
    return left
