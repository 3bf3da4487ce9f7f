from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fmscale.data.index import Index, Location, verify
from fmscale.data.reader import OpenShards, Scratch, read_sample
from fmscale.data.tar import DamageError, walk


def is_damaged(location: Location) -> bool:
    try:
        with OpenShards() as shards:
            read_sample(location, shards)
    except DamageError:
        return True
    return False


def stored(path: Path, **members: bytes) -> Location:
    """A file with one sample in it, which begins with its tensors."""
    members = {"safetensors": safetensors.torch.save({"latents": torch.zeros(1, 2, 2)}), **members}
    with tarfile.open(path, "w") as archive:
        for extension, data in members.items():
            info = tarfile.TarInfo(f"key.{extension}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    data = path.read_bytes()
    start = next(member.start for member in walk(io.BytesIO(data)) if member.extension == "safetensors")
    return Location(path, 0, len(data), start, len(members["safetensors"]), zlib.crc32(data))


def test_samples_come_back_as_they_were_written(index: Index, samples) -> None:
    with OpenShards(limit=1) as shards:
        for row in range(len(index)):
            sample = read_sample(index.location(row), shards)
            _, tensors, meta = samples[int(index.key(row).removeprefix("sample"))]
            assert sample.read_meta() == meta
            assert sample.tensors.keys() == tensors.keys()
            assert all(torch.equal(sample.tensors[name], tensor) for name, tensor in tensors.items())


def overwrite(offset: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda old: old[:offset] + data + old[offset + len(data) :]


@pytest.mark.parametrize("fault", ["header", "payload", "hole", "end of a sample", "end of a shard", "gone"])
def test_reader_and_verify_name_exactly_the_damaged_samples(index: Index, fault: str) -> None:
    shard, rows = list(index.rows_by_shard())[2]
    places = [index.location(row) for row in rows]
    keys = [index.key(row) for row in rows]
    data = places[0].shard.read_bytes()
    at = places[3].offset
    damaged, expected = {
        "header": (overwrite(at + 7, bytes([data[at + 7] ^ 1])), keys[3:4]),
        "payload": (overwrite(at + 1900, bytes([data[at + 1900] ^ 1])), keys[3:4]),
        "hole": (
            overwrite(at, bytes(4096)),
            [key for key, p in zip(keys, places, strict=True) if at - p.length < p.offset < at + 4096],
        ),
        "end of a sample": (lambda old: old[:at], keys[3:]),
        "end of a shard": (lambda old: old[: at + 1000], keys[3:]),
        "gone": (lambda old: b"", keys),
    }[fault]
    assert data != damaged(data)
    (index.path / shard.name).write_bytes(damaged(data))
    opened = Index.open(index.path, check_shards=False)
    assert [opened.key(row) for row in range(len(opened)) if is_damaged(opened.location(row))] == expected
    assert [bad.key for bad in verify(opened)] == expected
    assert {bad.shard for bad in verify(opened)} == {shard.name}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_numbers_that_are_not_finite_are_damage(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    latents = torch.zeros(4, 8, 8, dtype=dtype)
    latents[2, 3, 4] = value
    location = stored(tmp_path / "x.tar", safetensors=safetensors.torch.save({"latents": latents}))
    with OpenShards() as shards, pytest.raises(DamageError, match="'latents' holds NaN or Inf"):
        read_sample(location, shards)


def test_finite_numbers_whose_sum_overflows_are_sound(tmp_path: Path) -> None:
    latents = torch.full((4, 8, 8), 60000.0, dtype=torch.float16)
    content = safetensors.torch.save({"latents": latents, "none": torch.zeros(0), "ids": torch.arange(3)})
    with OpenShards() as shards:
        sample = read_sample(stored(tmp_path / "x.tar", safetensors=content), shards)
    assert torch.equal(sample.tensors["latents"], latents)
    assert sample.tensors["none"].numel() == 0


def test_txt_gives_the_caption_and_images_are_left_alone(tmp_path: Path) -> None:
    with OpenShards() as shards:
        sample = read_sample(stored(tmp_path / "x.tar", jpg=b"no image", txt=b" a cat\n", json=b'{"a": 1}'), shards)
        assert sample.read_meta() == {"caption": "a cat", "a": 1}
        sample = read_sample(stored(tmp_path / "y.tar", json=b'{"caption": "a dog"}', txt=b"a cat"), shards)
        assert sample.read_meta() == {"caption": "a dog"}


@pytest.mark.parametrize("content", [b"x", b"\x10" + bytes(7) + b"{" + bytes(20), b"\xff" * 40])
def test_tensors_that_are_none_are_damage(tmp_path: Path, content: bytes) -> None:
    with OpenShards() as shards, pytest.raises(DamageError, match="no safetensors file"):
        read_sample(stored(tmp_path / "x.tar", safetensors=content), shards)


@pytest.mark.parametrize("padding", range(4))
def test_tensors_are_read_wherever_they_lie(tmp_path: Path, padding: int) -> None:
    """Other writers may put numbers at odd addresses."""
    values = torch.arange(24, dtype=torch.float32).reshape(1, 4, 6)
    whole = safetensors.torch.save({"latents": values})
    length = int.from_bytes(whole[:8], "little")
    head = whole[8 : 8 + length].rstrip() + b" " * padding
    content = len(head).to_bytes(8, "little") + head + whole[8 + length :]
    assert torch.equal(safetensors.torch.load(content)["latents"], values)
    with OpenShards() as shards:
        sample = read_sample(stored(tmp_path / "x.tar", safetensors=content), shards)
    assert torch.equal(sample.tensors["latents"], values)


def test_memory_that_is_used_again_does_not_change_what_was_copied(index: Index) -> None:
    scratch = Scratch()
    with OpenShards() as shards:
        first = read_sample(index.location(0), shards, scratch.room)
        kept, seen = first.tensors["latents"].clone(), first.tensors["latents"]
        other = read_sample(index.location(5), shards, scratch.room)
    assert not torch.equal(kept, other.tensors["latents"])
    assert torch.equal(seen, other.tensors["latents"])  # the same memory, which is why the loader copies


def test_large_samples_are_not_even_read(tmp_path: Path) -> None:
    location = Location(tmp_path / "none.tar", 0, 1001, 0, 0, 0)
    with OpenShards() as shards:
        with pytest.raises(DamageError, match="1001 bytes, more than the limit of 1000"):
            read_sample(location, shards, max_bytes=1000)
        with pytest.raises(DamageError, match="No such file"):
            read_sample(location, shards)


def test_no_more_shards_stay_open_than_the_limit(index: Index) -> None:
    with OpenShards(limit=2) as shards:
        for row in (0, 14, 22):  # one in each shard
            read_sample(index.location(row), shards)
        files = list(shards._files.values())
        assert [path.name for path in shards._files] == ["4x8-00001.tar", "8x8-00000.tar"]
    assert all(file.closed for file in files)
