"""Weights on their way into safetensors files, a little at a time: memory does not grow with the model.

A model is written in the files that `ModelMixin.save_pretrained` of diffusers would make:

    diffusion_pytorch_model.safetensors                       one file, up to 10 GB, else
    diffusion_pytorch_model-00001-of-00003.safetensors, …     several, and
    diffusion_pytorch_model.safetensors.index.json            which tensor is in which
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fmscale.engine.fragments import raw, safetensors_head, write_at
from fmscale.files import in_threads

MAX_FILE_BYTES = 10 * 10**9
NAME = "diffusion_pytorch_model{}.safetensors"

Layout = Mapping[str, Mapping[str, Sequence[int]]]
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
        layout: for each parameter the names that it goes by in the files, and their shapes: several names where the
            parameter holds them one below the other.
        parts: gives stretches of a flattened parameter and where each begins, all of it in any order; called by several
            threads.
        dtype: of the weights in the files.
        full: parameters that are float32 all the same.
        max_file_bytes: where another file is begun; a parameter that is larger has a file of its own.

    Raises:
        OSError: they could not be written.
    """
    dtypes = {name: torch.float32 if name in full else dtype for name in layout}
    sizes = {name: dtypes[name].itemsize * sum(map(prod, theirs.values())) for name, theirs in layout.items()}
    files = _split(sizes, max_file_bytes)
    places: dict[str, str] = {}
    for number, members in enumerate(files):
        suffix = f"-{number + 1:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        path = folder / NAME.format(suffix)
        places |= {theirs: path.name for name in members for theirs in layout[name]}
        _write_file(path, {name: layout[name] for name in members}, parts, dtypes)
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


def _write_file(path: Path, layout: Layout, parts: Parts, dtypes: Mapping[str, torch.dtype]) -> None:
    tensors = {name: (dtypes[ours], shape) for ours, theirs in layout.items() for name, shape in theirs.items()}
    head, begins = safetensors_head(tensors, {"format": "pt"})
    with path.open("wb", buffering=0) as file:
        write_at(file.fileno(), head, 0)

        def write(ours: str) -> None:
            dtype, begin = dtypes[ours], begins[next(iter(layout[ours]))]  # the other tensors follow that one
            for at, values in parts(ours):
                write_at(file.fileno(), raw(values.to(dtype)), begin + dtype.itemsize * at)

        in_threads(write, layout)
