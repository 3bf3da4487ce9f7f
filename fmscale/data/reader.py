"""From the place of a sample to its tensors: bytes, checksum, members, values."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmscale.data.storage import Location, Storage, crc32
from fmscale.data.tar import MAX_MEMBER_BYTES, DamageError, parse_json, walk
from fmscale.data.tensors import parse_file, views, widen


@dataclass(frozen=True)
class Sample:
    """A stored sample.

    Attributes:
        tensors: by name, 8-bit ones widened; the others share memory with `data`.
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


def read_sample(storage: Storage, location: Location, max_bytes: int = MAX_MEMBER_BYTES) -> Sample:
    """Read and check one sample. What its members are was checked when it was indexed, and the checksum says it still
    holds.

    Args:
        storage, location: from the index.
        max_bytes: the largest sample, all its members together, that is read at all.

    Raises:
        DamageError: the sample cannot be read, differs from the index, is too large, or a number in it is not finite.
    """
    data = read_bytes(storage, location, max_bytes)
    tensors = views(_tensor_file(location, data))
    _check_finite(tensors)
    return Sample(widen(tensors), data)


def read_bytes(storage: Storage, location: Location, max_bytes: int = MAX_MEMBER_BYTES) -> memoryview:
    """The bytes of one sample, its members in the tar, checked.

    Args:
        storage, location, max_bytes: as for `read_sample`.

    Raises:
        DamageError: they cannot be read, differ from the index, or are too many.
    """
    _check_size(location, max_bytes)
    data = memoryview(bytearray(location.length))
    _read(storage, location, [data])
    return data


class Head(NamedTuple):
    """How a safetensors file begins.

    Attributes:
        data: its bytes up to the tensors.
        names: of the tensors, in the order of their bytes.
    """

    data: bytes
    names: tuple[str, ...]


class RowReader:
    """Reads samples into the rows of batches.

    Samples of one shape begin alike, so where each tensor lies is known before the next one is read: its bytes go from
    the shard to their places in the batch in one move. Should a sample begin otherwise, it is taken apart by its head.
    """

    def __init__(self) -> None:
        self._heads: dict[tuple[int, tuple[int, ...]], Head] = {}
        self._scratch = bytearray()  # used again and again: the first touch of fresh memory is slow

    def read(self, storage: Storage, location: Location, tensors: Mapping[str, Tensor], row: int) -> None:
        """Read and check one sample, as `read_sample` does.

        Args:
            storage, location: from the index.
            tensors: those of a batch, (B, ...) each; its names and shapes are those that the index says.
            row: which of the B is filled; after damage it holds anything.

        Raises:
            DamageError: as for `read_sample`.
        """
        _check_size(location, MAX_MEMBER_BYTES)
        rows = {name: tensor[row] for name, tensor in tensors.items()}
        kind = location.tensors_length, tuple(rows["latents"].shape)
        head = self._heads.get(kind)
        buffers = self._buffers(location, rows, head)
        _read(storage, location, buffers)
        if head is None or buffers[0][location.tensors_start :] != head.data:
            self._heads[kind] = _take_apart(_tensor_file(location, memoryview(bytearray().join(buffers))), rows)
        _check_finite(rows)

    def _buffers(self, location: Location, rows: Mapping[str, Tensor], head: Head | None) -> list[memoryview]:
        if head is None:
            return [self._room(location.length)]
        before = location.tensors_start + len(head.data)
        after = location.length - location.tensors_start - location.tensors_length
        room = self._room(before + after)
        return [room[:before], *(_bytes_of(rows[name]) for name in head.names), room[before:]]

    def _room(self, size: int) -> memoryview:
        if len(self._scratch) < size:
            self._scratch = bytearray(size)
        return memoryview(self._scratch)[:size]


def _check_size(location: Location, max_bytes: int) -> None:
    if location.length > max_bytes:
        raise DamageError(f"has {location.length} bytes, more than the limit of {max_bytes}")


def _read(storage: Storage, location: Location, buffers: Sequence[memoryview]) -> None:
    try:
        count = storage.read(location, buffers)
    except OSError as error:
        raise DamageError(f"cannot be read: {error.strerror or error}") from error
    if count < location.length:
        raise DamageError(f"the shard ends {location.length - count} bytes before the sample does")
    if crc32(buffers) != location.crc32:
        raise DamageError("its bytes have changed since it was indexed")


def _tensor_file(location: Location, data: memoryview) -> memoryview:
    return data[location.tensors_start : location.tensors_start + location.tensors_length]


def _take_apart(data: memoryview, rows: Mapping[str, Tensor]) -> Head:
    """Copy the tensors of a safetensors file to `rows`."""
    begin, entries = parse_file(data)
    tensors = views(data)
    for name in sorted({*tensors, *rows}):
        if name not in tensors or name not in rows or not _alike(tensors[name], rows[name]):
            raise DamageError(f"tensor {name!r} is not what the index says")
        rows[name].copy_(tensors[name])
    return Head(bytes(data[:begin]), tuple(sorted(rows, key=lambda name: (entries[name].start, entries[name].end))))


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise DamageError(f"tensor {name!r} holds NaN or Inf")


def _is_finite(tensor: Tensor) -> bool:
    """Read as integers, the numbers of each sign rise with their size: Inf lies above all finite ones, NaN above it."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    integer, infinity, minus_infinity = _infinities(tensor.dtype)
    bits = tensor.reshape(-1).view(integer).numpy()
    return bool(bits.max() < infinity and bits.view(f"u{tensor.itemsize}").max() < minus_infinity)


@functools.cache
def _infinities(dtype: torch.dtype) -> tuple[torch.dtype, int, int]:
    """The integer type of a floating-point type's size, the bits of Inf in it, and those of -Inf, unsigned."""
    if dtype.itemsize == 1:  # E4M3 has no Inf: with all bits set but the sign, it is NaN
        return torch.int8, 0x7F, 0xFF
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    infinity, minus_infinity = torch.tensor([torch.inf, -torch.inf], dtype=dtype).view(integer).tolist()
    return integer, infinity, minus_infinity + (1 << 8 * dtype.itemsize)
