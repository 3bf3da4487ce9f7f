from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fmscale.batch import Batch
from fmscale.data.captions import Captions
from fmscale.data.index import Index, verify
from fmscale.data.index_build import build_index, repair_index
from fmscale.data.loader import build_loader
from fmscale.data.mixture import Mixture
from fmscale.data.order import split
from fmscale.data.prepare import Filters, Preparation
from fmscale.data.raw import LAYOUT, RawImages
from fmscale.data.sources import open_source
from fmscale.errors import UserError

WriteTar = Callable[[Path, list[tuple[str, bytes]]], None]
VAE = {"channels": 4, "factor": 8, "scale": 1.5, "shift": 0.1, "sha256": "0" * 64}
FILTERS = Filters(20, 3.0, {"aesthetic": (5, None)})
RAW = RawImages(
    Preparation({"": [(32, 32), (32, 64), (64, 32)]}, 10**6, 1.25, FILTERS),
    Captions({"txt": 1, "json.synthetic": 1}, seed=5),
    VAE,
    "posterior",
    True,
)


def picture(number: int, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def members(number: int, data: bytes, aesthetic: float = 6) -> list[tuple[str, bytes]]:
    meta = {"aesthetic": aesthetic, "synthetic": f"a picture of {number}"}
    return [
        (f"{number:03d}.jpg", data),
        (f"{number:03d}.json", json.dumps(meta).encode()),
        (f"{number:03d}.txt", str(number).encode()),
    ]


def index_of(folder: Path) -> tuple[Index, dict[str, Any]]:
    left_out = {}

    def scan(tar: Path):
        rows, bad = RAW.scan(tar)
        left_out.update({sample.key: sample.reason for sample in bad})
        return rows, LAYOUT if rows else None

    made_by = {"vae": {"path": "/vae", **VAE}, "latents": "posterior", "flip": True, "images": RAW.described()}
    return build_index(folder, made_by, scan=scan), left_out


@pytest.fixture
def folder(tmp_path: Path, write_tar: WriteTar) -> Path:
    sizes = [(40, 50), (40, 90), (70, 30)]
    sound = [members(number, picture(number, sizes[number % 3])) for number in range(12)]
    small, ugly = members(90, picture(90, (10, 10))), members(91, picture(91, (40, 40)), aesthetic=1)
    write_tar(tmp_path / "images" / "a.tar", [*chain(*sound[:6]), *small])
    write_tar(tmp_path / "images" / "b.tar", [*ugly, *chain(*sound[6:])])
    return tmp_path / "images"


def load(folder: Path, **options: Any) -> list[Batch]:
    mixture = Mixture([Index.open(folder)])

    def noise(shape: tuple[int, ...], step: int, slot: int, read_meta: object) -> torch.Tensor:
        return torch.full(shape, 100.0 * step + slot)

    order, cut = mixture.order(4, seed=1), split(4, 1, 2)
    given: dict[str, Any] = {"rank": 0, "start_step": 0, "stop_step": 8, "noise": noise, "captions": True}
    return list(build_loader(mixture, order, cut, **given, **options))


def test_the_manifest_says_how_images_are_prepared(folder: Path) -> None:
    index, left_out = index_of(folder)
    assert left_out == {"a__090": "too small", "b__091": "aesthetic out of range"}
    assert {(bucket.height, bucket.width): bucket.count for bucket in index.buckets} == {
        (4, 4): 4,
        (4, 8): 4,
        (8, 4): 4,
    }
    raw = Mixture([index]).raw
    assert raw is not None
    assert raw.digest == RAW.digest
    again = Mixture([index]).fingerprint
    assert again == Mixture([index_of(folder)[0]]).fingerprint
    made_by = {**(index.made_by or {}), "flip": False}
    other = build_index(folder, made_by, scan=lambda tar: (RAW.scan(tar)[0], LAYOUT))
    assert other.fingerprint == index.fingerprint
    assert Mixture([other]).fingerprint != again


def test_batches_hold_what_encode_would_encode(folder: Path) -> None:
    index_of(folder)
    expected = {}
    for unit in open_source(folder, RAW.captions):
        for source in unit.read():
            if source.key not in ("a__090", "b__091"):
                (image,) = RAW.preparation.prepare(source)
                expected[image.key] = (image.pixels.tolist(), image.caption)
    batches = load(folder)
    assert all((batch.weight == 1).all() and not batch.bad for batch in batches)
    assert {key for batch in batches for key in batch.keys} == expected.keys()
    assert len({caption.startswith("a ") for _, caption in expected.values()}) == 2
    for batch in batches:
        assert batch.noise.shape == (2, 4, *batch.bucket)
        for row, key in enumerate(batch.keys):
            assert (batch.tensors["pixels"][row].tolist(), batch.captions[row]) == expected[key]
    for batch, other in zip(batches, load(folder, workers=2), strict=True):
        assert (batch.keys, batch.captions) == (other.keys, other.captions)
        assert torch.equal(batch.tensors["pixels"], other.tensors["pixels"])


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_image_costs_itself(folder: Path, tmp_path: Path, write_tar: WriteTar, damage: str) -> None:
    """One that was cut before it was indexed; one whose bytes changed since."""
    sound = [members(number, picture(number, (40, 50))) for number in range(4)]
    write_tar(tmp_path / "sound" / "a.tar", list(chain(*sound)))
    spoiled = members(2, picture(2, (40, 50))[: -500 if damage == "cut" else None])
    write_tar(tmp_path / "spoiled" / "a.tar", list(chain(*sound[:2], spoiled, sound[3])))
    for name in ("sound", "spoiled"):
        assert not index_of(tmp_path / name)[1]
    if damage == "flipped":
        tar = tmp_path / "spoiled" / "a.tar"
        data = bytearray(tar.read_bytes())
        data[data.index(picture(2, (40, 50))) + 700] ^= 1
        tar.write_bytes(data)
    reason = "truncated image" if damage == "cut" else "its bytes have changed since it was indexed"
    hit = 0
    for whole, batch in zip(load(tmp_path / "sound"), load(tmp_path / "spoiled"), strict=True):
        bad = torch.tensor([key == "a__002" for key in batch.keys])
        assert whole.keys == batch.keys
        assert torch.equal(batch.weight, (~bad).float())
        assert torch.equal(batch.tensors["pixels"][~bad], whole.tensors["pixels"][~bad])
        assert not batch.tensors["pixels"][bad].any()
        assert [sample.key for sample in batch.bad] == ["a__002"] * int(bad.sum())
        assert all(sample.shard == "a.tar" and sample.reason.startswith(reason) for sample in batch.bad)
        hit += len(batch.bad)
    assert hit
    if damage == "flipped":
        assert [bad.key for bad in verify(Index.open(tmp_path / "spoiled"))] == ["a__002"]
        assert len(repair_index(tmp_path / "spoiled")[0]) == 3
        assert all((batch.weight == 1).all() for batch in load(tmp_path / "spoiled"))


def test_what_follows_damage_in_a_tar_is_left_out(folder: Path) -> None:
    tar = folder / "b.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) // 2])
    index, left_out = index_of(folder)
    assert left_out == {"a__090": "too small", "b__091": "aesthetic out of range", "": "damaged tar"}
    assert 6 < len(index) < 12
    assert all((batch.weight == 1).all() for batch in load(folder))


def test_an_index_that_does_not_say_how_is_refused(folder: Path) -> None:
    index_of(folder)
    manifest = folder / "index" / "manifest.json"
    said = json.loads(manifest.read_text())
    del said["made_by"]["images"]
    manifest.write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"does not say how images are prepared .* --images ENCODE"):
        Mixture([Index.open(folder)])
