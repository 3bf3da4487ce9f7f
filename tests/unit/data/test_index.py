from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from fmscale.batch import BadSample
from fmscale.data.index import Index, verify
from fmscale.data.index_build import build_index, repair_index
from fmscale.errors import UserError

HEAD = b'{"x": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 0]}}'
ENDLESS = len(HEAD).to_bytes(8, "little") + HEAD
WriteTar = Callable[[Path, list[tuple[str, bytes]]], None]


def tensors(**changes: torch.Tensor) -> bytes:
    return safetensors.torch.save({"latents": torch.zeros(4, 8, 8), "clip_l": torch.zeros(3, 5)} | changes)


def test_rows_are_grouped_by_bucket_then_shard_then_place(index: Index) -> None:
    numbers = [int(index.key(row).removeprefix("sample")) for row in range(len(index))]
    assert numbers == [n for n in range(23) if n % 3] + [n for n in range(23) if n % 3 == 0]
    assert [(b.height, b.width, b.start, b.count) for b in index.buckets] == [(4, 8, 0, 15), (8, 8, 15, 8)]
    assert index.made_by == {"vae": "none"}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in index.empty(4, 8, 2).items()} == {
        "latents": ((2, 4, 4, 8), torch.bfloat16),
        "clip_l": ((2, 3, 5), torch.float32),
    }


def test_locations_tile_the_shards(index: Index) -> None:
    for shard, rows in index.rows_by_shard():
        places = [index.location(row) for row in rows]
        assert len(places) == shard.samples
        assert all(place.shard == shard.name for place in places)
        ends = [0] + [place.offset + place.length for place in places]
        assert [place.offset for place in places] == ends[:-1]


def test_mixed_shards_from_other_programs_are_indexed(tmp_path: Path, write_tar: WriteTar) -> None:
    long = "ü" * 150
    members = [
        ("__notes__/a.txt", b"for webdataset itself"),
        (f"d/{long}.safetensors", tensors(latents=torch.zeros(4, 16, 8))),
        (f"d/{long}.json", b"{}"),
        ("d/img_v1.5.safetensors", tensors()),
        ("d/last.txt", b"a caption"),
        ("d/last.safetensors", tensors(latents=torch.zeros(4, 16, 8))),
    ]
    write_tar(tmp_path / "d" / "x.tar", members)
    index = build_index(tmp_path / "d", None)
    assert [index.key(row) for row in range(3)] == ["d/img_v1", f"d/{long}", "d/last"]
    assert [bucket.name for bucket in index.buckets] == ["8x8", "16x8"]
    assert verify(index) == []


def test_the_fingerprint_follows_the_bytes(dataset_path: Path, index: Index) -> None:
    assert build_index(dataset_path, None).fingerprint == index.fingerprint
    (dataset_path / "4x8-00001.tar").unlink()
    assert build_index(dataset_path, None).fingerprint != index.fingerprint
    assert sorted(path.name for path in dataset_path.iterdir()) == ["4x8-00000.tar", "8x8-00000.tar", "index"]


def test_progress_counts_bytes(dataset_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    index = build_index(dataset_path, None, lambda done, total: seen.append((done, total)))
    verify(index, lambda done, total: seen.append((done, total)))
    total = sum(shard.size for shard in index.shards)
    assert len(seen) == 6
    assert seen[2] == seen[5] == (total, total)


def test_an_index_travels_as_its_path(index: Index) -> None:
    sent = pickle.dumps(index)
    assert len(sent) < 500
    assert pickle.loads(sent).key(3) == index.key(3)  # noqa: S301


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.safetensors", tensors()), ("b.safetensors", tensors()), ("a.json", b"{}")], "key 'a' comes twice"),
        ([("v1.5_a.safetensors", tensors()), ("v1.7_b.safetensors", tensors())], "are one sample, 'v1'"),
        ([("a.json", b"{}"), ("a.jpg", b"")], "sample 'a' has no .safetensors"),
        ([("a.safetensors", tensors()), ("a.pth", b"")], "'a.pth' is a pickle"),
        ([("a.safetensors", b"short")], "'a.safetensors' is no safetensors file"),
        ([("a.safetensors", (9).to_bytes(8, "little") + b"not json!")], "'a.safetensors' is no safetensors file"),
        ([("a.safetensors", (2).to_bytes(8, "little") + b"[]")], "'a.safetensors' is no safetensors file"),
        ([("a.safetensors", ENDLESS)], "'a.safetensors' is no safetensors file"),
        ([("a.safetensors", tensors()[:-1])], "'a.safetensors' holds other data than its head says"),
        ([("a.safetensors", safetensors.torch.save({}))], "no tensor 'latents' of shape"),
        ([("a.safetensors", tensors(latents=torch.zeros(4, 8)))], "no tensor 'latents' of shape"),
        ([("a.safetensors", tensors(latents=torch.zeros(4, 0, 8)))], "no tensor 'latents' of shape"),
        ([("a.safetensors", tensors(ids=torch.zeros(1, dtype=torch.complex64)))], "tensor 'ids'"),
        ([("a\nb.safetensors", tensors())], r"key 'a\\nb' holds unprintable"),
        (
            [("a.safetensors", tensors()), ("b.safetensors", tensors(clip_l=torch.zeros(2, 5)))],
            r"sample 'b' stores tensor 'clip_l' as F32 \(2, 5\), others as F32 \(3, 5\)",
        ),
        ([("a.safetensors", tensors()), ("b.safetensors", tensors(t5=torch.zeros(1)))], "others as absent"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_name(
    tmp_path: Path, members, reason: str, write_tar: WriteTar
) -> None:
    write_tar(tmp_path / "d" / "x.tar", members)
    with pytest.raises(UserError, match=reason) as caught:
        build_index(tmp_path / "d", None)
    assert str(caught.value).startswith(f"{tmp_path}/d/x.tar cannot be indexed: ")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["x.tar"]


def test_shards_must_agree_with_each_other(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "d" / "x.tar", [("a.safetensors", tensors())])
    write_tar(tmp_path / "d" / "y.tar", [("b.safetensors", tensors(latents=torch.zeros(16, 8, 8)))])
    with pytest.raises(UserError, match=r"y.tar cannot be indexed: sample 'b' stores tensor 'latents'"):
        build_index(tmp_path / "d", None)
    write_tar(tmp_path / "d" / "y.tar", [("a.safetensors", tensors())])
    with pytest.raises(UserError, match=r"key 'a' is in .*x.tar and .*y.tar: keys must differ"):
        build_index(tmp_path / "d", None)


def test_folders_without_samples_are_refused(tmp_path: Path, write_tar: WriteTar) -> None:
    with pytest.raises(UserError, match="no such folder"):
        build_index(tmp_path / "none", None)
    with pytest.raises(UserError, match=r"holds no \*.tar"):
        build_index(tmp_path, None)
    write_tar(tmp_path / "d" / "x.tar", [])
    with pytest.raises(UserError, match="hold no samples"):
        build_index(tmp_path / "d", None)


def test_a_failed_build_leaves_the_old_index(dataset_path: Path, index: Index) -> None:
    with (dataset_path / "8x8-00000.tar").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(UserError, match=r"8x8-00000.tar cannot be indexed"):
        build_index(dataset_path, None)
    assert Index.open(dataset_path, check_shards=False).fingerprint == index.fingerprint


def test_open_says_what_is_wrong_with_the_dataset(dataset_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        Index.open(dataset_path / "none")
    with pytest.raises(UserError, match=f"has no index: run `fmscale index {dataset_path}`"):
        Index.open(dataset_path)
    build_index(dataset_path, None)
    (dataset_path / "new.tar").touch()
    with pytest.raises(UserError, match=r"new.tar is not in the index"):
        Index.open(dataset_path)
    (dataset_path / "new.tar").unlink()
    with (dataset_path / "8x8-00000.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"8x8-00000.tar has \d+ bytes, \d+ when it was indexed"):
        Index.open(dataset_path)
    (dataset_path / "8x8-00000.tar").unlink()
    with pytest.raises(UserError, match=r"8x8-00000.tar is gone"):
        Index.open(dataset_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m.pop("shards"),
        lambda m: m["shards"][0].update(name=7),
        lambda m: m["shards"][0].update(size="1"),
        lambda m: m["shards"][0].update(size=-(10**18)),
        lambda m: m["shards"][0].update(sha256="../../x"),
        lambda m: m["shards"][0].update(more=1),
        lambda m: m["buckets"][0].update(rows=2**70),
        lambda m: m["buckets"][0].update(rows=-5),
        lambda m: m["buckets"][0].update(height="8"),
        lambda m: m["buckets"][0].update(height=0),
        lambda m: m["buckets"].append(m["buckets"][0]),
        lambda m: m["buckets"].clear(),
        lambda m: m["layout"].pop("latents"),
        lambda m: m["layout"]["latents"].__setitem__(0, "F8"),
        lambda m: m["layout"]["latents"].__setitem__(1, [-4]),
        lambda m: m["layout"]["latents"].__setitem__(1, [4, 4]),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(index: Index, damage: Callable[[dict[str, Any]], Any]) -> None:
    path = index.path / "index" / "manifest.json"
    manifest = json.loads(path.read_text())
    damage(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"index cannot be used \(.*: run `fmscale index "):
        Index.open(index.path)


def test_open_refuses_other_versions_and_damaged_columns(index: Index) -> None:
    folder = index.path / "index"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(UserError, match="version 99, this program reads 3"):
        Index.open(index.path)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="cannot be used"):
        Index.open(index.path)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for column in (np.zeros(3, dtype="i8"), np.zeros(23, dtype="f4"), np.array([{}] * 23)):
        np.save(folder / "offset.npy", column)
        with pytest.raises(UserError, match=f"run `fmscale index {index.path}`"):
            Index.open(index.path)


def test_verify_names_missing_shards_and_bytes_outside_samples(index: Index) -> None:
    (index.path / "4x8-00001.tar").unlink()
    with (index.path / "8x8-00000.tar").open("r+b") as file:
        file.seek(-1, io.SEEK_END)
        file.write(b"x")
    assert verify(Index.open(index.path, check_shards=False)) == [
        BadSample("", "4x8-00001.tar", "cannot be read: No such file or directory"),
        BadSample("", "8x8-00000.tar", "bytes outside its samples have changed since it was indexed"),
    ]


def test_repair_leaves_out_what_is_damaged_and_nothing_else(index: Index) -> None:
    spoiled, lost = index.location(3), index.shards[-1]
    with (index.path / spoiled.shard).open("r+b") as file:
        file.seek(spoiled.offset + 600)
        file.write(b"other bytes")
    (index.path / lost.name).unlink()
    gone = {index.key(3)} | {index.key(row) for row in range(len(index)) if index.location(row).shard == lost.name}
    kept = {index.key(row): index.location(row) for row in range(len(index)) if index.key(row) not in gone}
    repaired, left_out = repair_index(index.path)
    assert {repaired.key(row): repaired.location(row) for row in range(len(repaired))} == kept
    assert sum(bucket.count for bucket in repaired.buckets) == len(kept)
    assert [(bad.key, bad.shard) for bad in left_out] == [(index.key(3), spoiled.shard), ("", lost.name)]
    assert verify(Index.open(index.path)) == []
    assert repaired.made_by == index.made_by
    assert repaired.fingerprint != index.fingerprint
    assert repair_index(index.path)[1] == []


def test_nothing_is_left_to_repair(index: Index) -> None:
    for shard in index.path.glob("*.tar"):
        shard.unlink()
    with pytest.raises(UserError, match="not one sample is sound"):
        repair_index(index.path)
    assert len(Index.open(index.path, check_shards=False)) == len(index)


def test_a_shard_that_cannot_be_read_is_not_given_up(index: Index, tmp_path: Path) -> None:
    """Its samples may be sound: a folder in its place stands for a disk that fails."""
    lost = index.path / index.shards[0].name
    lost.rename(tmp_path / "kept.tar")
    lost.mkdir()
    with pytest.raises(UserError, match=f"{lost.name} cannot be read: .*; make it readable, or move it away"):
        repair_index(index.path)
    lost.rmdir()
    (tmp_path / "kept.tar").rename(lost)
    assert len(Index.open(index.path)) == len(index)


def test_the_fingerprint_tells_which_samples_are_in_the_index(index: Index) -> None:
    place = index.location(3)
    with (index.path / place.shard).open("r+b") as file:
        file.seek(place.offset + 600)
        file.write(b"other bytes")
    without = repair_index(index.path)[0].fingerprint
    assert build_index(index.path, None).fingerprint != without
