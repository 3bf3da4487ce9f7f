"""A small real dataset: two buckets over three shards, written and indexed by our own code."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fmscale.data.index import Index
from fmscale.data.index_build import build_index
from fmscale.data.shards import ShardWriter

SIZES = ((4, 8), (8, 8))


StoredSample = tuple[str, dict[str, torch.Tensor], dict[str, object]]


def make_sample(number: int) -> StoredSample:
    """Key, tensors and json of the number-th sample; its latents hold its number."""
    height, width = SIZES[number % 3 == 0]
    tensors = {
        "latents": torch.full((4, height, width), float(number), dtype=torch.bfloat16),
        "clip_l": torch.randn(3, 5, generator=torch.Generator().manual_seed(number)),
    }
    return f"sample{number:03d}", tensors, {"caption": f"number {number}", "number": number}


@pytest.fixture(scope="session")
def samples() -> list[StoredSample]:
    """What the dataset holds, by key."""
    return [make_sample(number) for number in range(23)]


@pytest.fixture
def dataset_path(tmp_path: Path, samples: list[StoredSample]) -> Path:
    path = tmp_path / "dataset"
    with ShardWriter(path, samples_per_shard=10) as writer:
        for sample in samples:
            writer.write(*sample)
    return path


@pytest.fixture
def index(dataset_path: Path) -> Index:
    return build_index(dataset_path, {"vae": "none"})


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, list[tuple[str, bytes]]], None]:
    """Writes a tar of (name, content) members, as any other program might."""

    def write(path: Path, members: list[tuple[str, bytes]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))

    return write
