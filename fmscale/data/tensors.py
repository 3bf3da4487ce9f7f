"""Safetensors in memory: the table at their head, tensors that point into the bytes instead of copying them.

Tensors of 8-bit floats have scales beside them; see `narrow`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fmscale.data.tar import DamageError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FP8 = torch.float8_e4m3fn
SCALE = "_scale"  # after the name of a tensor of 8-bit floats: what its rows are multiplied by
MAX_HEAD_BYTES = 100_000_000  # the format's own limit


class Entry(NamedTuple):
    """A tensor in a file: dtype as the format spells it, shape, and its bytes behind the head."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def head_bytes(prefix: bytes | memoryview, size: int) -> int:
    """Length of the head that follows the first eight bytes.

    Args:
        prefix: the first eight bytes of the file.
        size: of the whole file, in bytes.

    Raises:
        DamageError: it is no such file.
    """
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, MAX_HEAD_BYTES):
        raise DamageError("is no safetensors file")
    return length


def parse_head(head: bytes | memoryview, stored_bytes: int) -> dict[str, Entry]:
    """The table of a file's tensors, in the order of their names.

    Args:
        head: the json behind the first eight bytes.
        stored_bytes: how many bytes follow it.

    Raises:
        DamageError: it is no such table, a type is not among `DTYPES`, or the tensors do not fill those bytes exactly.
    """
    try:
        table = json.loads(bytes(head))
        table.pop("__metadata__", None)
        entries = {
            name: Entry(str(entry["dtype"]), tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"]))
            for name, entry in sorted(table.items())
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DamageError("is no safetensors file") from error
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.dtype not in DTYPES:
            raise DamageError(f"holds tensor {name!r} as {entry.dtype}; one of {', '.join(DTYPES)} can be read")
        size = prod(entry.shape) * DTYPES[entry.dtype].itemsize
        if min(entry.shape, default=0) < 0 or (entry.start, entry.end) != (at, at + size):
            raise DamageError("holds other data than its head says")
        at = entry.end
    if at != stored_bytes:
        raise DamageError("holds other data than its head says")
    return entries


def parse_file(data: memoryview) -> tuple[int, dict[str, Entry]]:
    """Where the tensors of a file in memory begin, and their table.

    Raises:
        DamageError: as for `parse_head`.
    """
    begin = 8 + head_bytes(data[:8], len(data))
    return begin, parse_head(data[8:begin], len(data) - begin)


def views(data: memoryview) -> dict[str, Tensor]:
    """The tensors of a file in memory; they share its bytes, which must be writable, and be left alone while they live.

    Raises:
        DamageError: as for `parse_head`.
    """
    begin, entries = parse_file(data)
    tensors = {}
    for name, entry in entries.items():
        dtype, count = DTYPES[entry.dtype], prod(entry.shape)
        if not count:
            tensors[name] = torch.empty(entry.shape, dtype=dtype)
            continue
        flat = torch.frombuffer(data, dtype=torch.uint8, count=entry.end - entry.start, offset=begin + entry.start)
        if flat.data_ptr() % dtype.itemsize:  # a writer that does not align
            flat = flat.clone()
        tensors[name] = flat.view(dtype).reshape(entry.shape)
    return tensors


def narrow(values: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers as 8-bit floats of 4 significant bits (E4M3), each row with a scale that uses their whole range.

    Args:
        values: shape (..., L, D); a row is the last dimension.

    Returns:
        The numbers, shape (..., L, D), and their scales, shape (..., L), float32: NaN where a row is not finite.
    """
    values = values.float()
    scales = values.abs().amax(dim=-1) / torch.finfo(FP8).max
    return (values / scales.where(scales != 0, 1)[..., None]).to(FP8), scales


def widen(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of 8-bit floats as bf16, multiplied by their scales, which are left out; the others as they are."""
    narrowed = {name for name, value in tensors.items() if value.dtype == FP8 and name + SCALE in tensors}
    scales = {name + SCALE for name in narrowed}
    return {
        name: (value.float() * tensors[name + SCALE][..., None]).bfloat16() if name in narrowed else value
        for name, value in tensors.items()
        if name not in scales
    }
