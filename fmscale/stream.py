"""Weights on their way into safetensors files, a little at a time: memory does not grow with the model.

A model is written in the files that `ModelMixin.save_pretrained` of diffusers would make:

    diffusion_pytorch_model.safetensors                       one file, up to 10 GB, else
    diffusion_pytorch_model-00001-of-00003.safetensors, …     several, and
    diffusion_pytorch_model.safetensors.index.json            which tensor is in which

or all in one file, under any names (`write_file`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fmscale.engine.fragments import raw, safetensors_head, write_at
from fmscale.files import in_threads
from fmscale.models.published import Part

MAX_FILE_BYTES = 10 * 10**9
NAME = "diffusion_pytorch_model{}.safetensors"

Layout = Mapping[str, Sequence[Part]]
Parts = Callable[[str], Iterable[tuple[int, Tensor]]]


def stream_weights(
    folder: Path,
    layout: Layout,
    parts: Parts,
    dtype: torch.dtype,
    full: Collection[str] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write a model's weights.

    Args:
        folder: exists, and is empty of weights.
        layout: for each parameter the tensors in the files that hold it: several, where they are its rows, one below
            the other.
        parts: gives stretches of a flattened parameter and where each begins, all of it in any order; called by several
            threads.
        dtype: of the weights in the files.
        full: parameters that are float32 all the same.
        max_file_bytes: where another file is begun; a parameter that is larger has a file of its own.

    Raises:
        OSError: they could not be written.
    """
    dtypes = {name: torch.float32 if name in full else dtype for name in layout}
    sizes = {name: dtypes[name].itemsize * sum(prod(part.shape) for part in held) for name, held in layout.items()}
    files = _split(sizes, max_file_bytes)
    places: dict[str, str] = {}
    for number, members in enumerate(files):
        suffix = f"-{number + 1:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        path = folder / NAME.format(suffix)
        places |= {part.name: path.name for name in members for part in layout[name]}
        write_file(path, {name: layout[name] for name in members}, parts, dtypes)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / f"{NAME.format('')}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _split(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in their order, in groups of at most so many bytes."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def write_file(path: Path, layout: Layout, parts: Parts, dtypes: Mapping[str, torch.dtype]) -> None:
    """Write one file; arguments as of `stream_weights`, with the dtype of each parameter.

    Raises:
        OSError: it could not be written.
    """
    tensors = {part.name: (dtypes[ours], part.shape) for ours, held in layout.items() for part in held}
    head, begins = safetensors_head(tensors, {"format": "pt"})
    with path.open("wb", buffering=0) as file:
        write_at(file.fileno(), head, 0)

        def write(ours: str) -> None:
            dtype, stretches = dtypes[ours], list(_stretches(layout[ours], begins, dtypes[ours].itemsize))
            for at, values in parts(ours):
                stored = values.to(dtype)
                for first, count, place in stretches:
                    low, high = max(at, first), min(at + len(stored), first + count)
                    if low < high:
                        write_at(
                            file.fileno(), raw(stored[low - at : high - at]), place + dtype.itemsize * (low - first)
                        )

        in_threads(write, layout)


def _stretches(held: Sequence[Part], begins: Mapping[str, int], size: int) -> Iterator[tuple[int, int, int]]:
    """Of a parameter that these tensors hold: a value, how many follow it in the file, the byte where they begin."""
    before = 0
    for part in held:
        for ours, theirs, count in part.stretches():
            yield before + ours, count, begins[part.name] + size * theirs
        before += prod(part.shape)
