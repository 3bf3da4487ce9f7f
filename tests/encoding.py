"""A small source of images, and datasets that are made of it in different ways and must be the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from fmscale import digits
from fmscale.data.index import Index, verify
from fmscale.quickstart import write_encoders

IMAGES, UNIT = 180, 6


def make_source(out: Path) -> None:
    """A folder with images of three shapes, some of them broken, and `encode.yaml`, which makes 30 units of them."""
    split = digits.load_split()
    pictures, labels = digits.enlarge(split.train_images[:IMAGES]), split.train_labels
    (out / "images").mkdir()
    for number, picture in enumerate(pictures):
        shown = picture if number % 3 else np.concatenate([picture, picture], axis=number % 2)
        Image.fromarray(shown).save(out / "images" / f"{number:03d}.png")
        (out / "images" / f"{number:03d}.txt").write_text(digits.caption(labels[number]))
    for number in range(0, IMAGES, 40):
        (out / "images" / f"{number:03d}.png").write_bytes(b"this is no picture")
    write_encoders(out)


def settings(source: Path, out: Path, *more: str) -> list[str]:
    return [str(source / "encode.yaml"), f"out={out}", f"shard_samples={UNIT}", "batch=4", "latents=sample", *more]


def done(out: Path) -> int:
    """Units that are done, or all of them."""
    with suppress(FileNotFoundError):
        return len(os.listdir(out / "unfinished" / "done"))
    return IMAGES // UNIT if (out / "manifest.json").exists() else 0


def contents(index: Index) -> Iterator[tuple[str, bytes]]:
    for row in range(len(index)):
        place = index.location(row)
        with index.storage.open(place.shard) as file:
            file.seek(place.offset)
            yield index.key(row), file.read(place.length)


def assert_same(out: Path, whole: Index) -> None:
    index = Index.open(out)
    assert dict(contents(index)) == dict(contents(whole))
    assert len(index) == len(whole) == IMAGES - len(range(0, IMAGES, 40))
    assert index.fingerprint == whole.fingerprint
    assert verify(index) == []
    assert not (out / "unfinished").exists()
    for name in ("failures.jsonl", "null.safetensors"):
        assert (out / name).read_bytes() == (whole.path / name).read_bytes()
    ours, theirs = (json.loads((path / "manifest.json").read_text()) for path in (out, whole.path))
    assert ours == theirs
