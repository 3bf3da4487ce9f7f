"""Writing latent shards: plain WebDataset tars, one bucket each, that bear their name only when they are whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import webdataset
from torch import Tensor

from fmscale.errors import UserError
from fmscale.files import sync


class ShardWriter:
    """Writes samples to `FOLDER/PREFIX HEIGHTxWIDTH-NUMBER.tar` (without the space), a series of shards per bucket.

    Use it in a `with` block: leaving it finishes the open shards, or removes them if an error is on its way.
    Numbers go on after the shards that are there; no shard is ever overwritten. The same samples in the same order
    make the same bytes.

    Args:
        folder: made if it does not exist.
        prefix: start of every shard's name; ranks that write to one folder take different ones.
        samples_per_shard: a shard that holds so many is closed.

    Raises:
        UserError: the folder cannot be written, or the disk is full; the text names the file.
    """

    def __init__(self, folder: str | Path, prefix: str = "", samples_per_shard: int = 4096):
        self.finished: list[Path] = []
        self._folder = Path(folder)
        self._prefix = prefix
        self._samples_per_shard = samples_per_shard
        self._open: dict[tuple[int, int], _OpenShard] = {}
        with _writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:  # what is still open now is not whole
            for shard in self._open.values():
                shard.remove()

    def write(self, key: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Add a sample to the shard of its bucket.

        Args:
            key: unique in the dataset, printable, without dots or slashes.
            tensors: what the sample stores, among it `latents`, shape (C, H, W).
            meta: what its json says.

        Raises:
            UserError: the shard cannot be written.
        """
        assert re.fullmatch(r"[^./]+", key), key
        assert key.isprintable(), key
        height, width = tensors["latents"].shape[1:]
        content = {"__key__": key, "safetensors": _pack(tensors), "json": json.dumps(meta, sort_keys=True).encode()}
        if (height, width) not in self._open:
            self._open[height, width] = self._start(f"{height}x{width}")
        shard = self._open[height, width]
        shard.write(content)
        if shard.samples == self._samples_per_shard:
            self._finish((height, width))

    def close(self) -> None:
        """Finish every open shard.

        Raises:
            UserError: a shard cannot be written.
        """
        for bucket in list(self._open):
            self._finish(bucket)

    def _start(self, bucket_name: str) -> _OpenShard:
        paths = (self._folder / f"{self._prefix}{bucket_name}-{number:05d}.tar" for number in count())
        return _OpenShard(next(path for path in paths if not path.exists()))

    def _finish(self, bucket: tuple[int, int]) -> None:
        self._open[bucket].publish()
        self.finished.append(self._open.pop(bucket).path)


class _OpenShard:
    """A shard under its temporary name."""

    def __init__(self, path: Path):
        self.path = path
        self.samples = 0
        self._partial = path.with_name(path.name + ".partial")
        with _writing(path):
            self._file = self._partial.open("wb")
        self._tar = webdataset.TarWriter(self._file, encoder=False, user="", group="", mtime=0)

    def write(self, content: dict[str, Any]) -> None:
        with _writing(self.path):
            self._tar.write(content)
        self.samples += 1

    def publish(self) -> None:
        with _writing(self.path):
            self._tar.close()
            self._file.close()
            sync(self._partial)
            self._partial.rename(self.path)
            sync(self.path.parent)

    def remove(self) -> None:
        for close in (self._tar.close, self._file.close):
            with suppress(
                OSError, ValueError
            ):  # they flush, which fails again on a full disk; the first error is on its way
                close()
        self._partial.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room there, or choose another folder") from error


def _pack(tensors: dict[str, Tensor]) -> bytes:
    """Safetensors bytes; copies, since that format refuses tensors that share memory."""
    return safetensors.torch.save(
        {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    )
