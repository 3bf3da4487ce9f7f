from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fmscale.data.index import Index, verify
from fmscale.data.reader import RowReader, Sample, read_sample
from fmscale.data.storage import LocalStorage, Location
from fmscale.data.tar import DamageError, walk


def is_damaged(index: Index, row: int) -> bool:
    try:
        read_sample(index.storage, index.location(row))
    except DamageError:
        return True
    return False


def read_stored(path: Path, **members: bytes) -> Sample:
    """What is read of a new file with one sample in it, which begins with its tensors."""
    members = {"safetensors": safetensors.torch.save({"latents": torch.zeros(1, 2, 2)}), **members}
    with tarfile.open(path, "w") as archive:
        for extension, data in members.items():
            info = tarfile.TarInfo(f"key.{extension}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    data = path.read_bytes()
    start = next(member.start for member in walk(io.BytesIO(data)) if member.extension == "safetensors")
    location = Location(path.name, 0, len(data), start, len(members["safetensors"]), zlib.crc32(data))
    return read_sample(LocalStorage(path.parent), location)


def test_samples_come_back_as_they_were_written(index: Index, samples) -> None:
    for row in range(len(index)):
        sample = read_sample(index.storage, index.location(row))
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
    data = (index.path / shard.name).read_bytes()
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
    assert [opened.key(row) for row in range(len(opened)) if is_damaged(opened, row)] == expected
    assert [bad.key for bad in verify(opened)] == expected
    assert {bad.shard for bad in verify(opened)} == {shard.name}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_numbers_that_are_not_finite_are_damage(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    latents = torch.zeros(4, 8, 8, dtype=dtype)
    latents[2, 3, 4] = value
    with pytest.raises(DamageError, match="'latents' holds NaN or Inf"):
        read_stored(tmp_path / "x.tar", safetensors=safetensors.torch.save({"latents": latents}))


def test_finite_numbers_whose_sum_overflows_are_sound(tmp_path: Path) -> None:
    latents = torch.full((4, 8, 8), 60000.0, dtype=torch.float16)
    content = safetensors.torch.save({"latents": latents, "none": torch.zeros(0), "ids": torch.arange(3)})
    sample = read_stored(tmp_path / "x.tar", safetensors=content)
    assert torch.equal(sample.tensors["latents"], latents)
    assert sample.tensors["none"].numel() == 0


def test_txt_gives_the_caption_and_images_are_left_alone(tmp_path: Path) -> None:
    sample = read_stored(tmp_path / "x.tar", jpg=b"no image", txt=b" a cat\n", json=b'{"a": 1}')
    assert sample.read_meta() == {"caption": "a cat", "a": 1}
    sample = read_stored(tmp_path / "y.tar", json=b'{"caption": "a dog"}', txt=b"a cat")
    assert sample.read_meta() == {"caption": "a dog"}


@pytest.mark.parametrize("content", [b"x", b"\x10" + bytes(7) + b"{" + bytes(20), b"\xff" * 40])
def test_tensors_that_are_none_are_damage(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DamageError, match="no safetensors file"):
        read_stored(tmp_path / "x.tar", safetensors=content)


@pytest.mark.parametrize("padding", range(4))
def test_tensors_are_read_wherever_they_lie(tmp_path: Path, padding: int) -> None:
    """Other writers may put numbers at odd addresses."""
    values = torch.arange(24, dtype=torch.float32).reshape(1, 4, 6)
    whole = safetensors.torch.save({"latents": values})
    length = int.from_bytes(whole[:8], "little")
    head = whole[8 : 8 + length].rstrip() + b" " * padding
    content = len(head).to_bytes(8, "little") + head + whole[8 + length :]
    assert torch.equal(safetensors.torch.load(content)["latents"], values)
    sample = read_stored(tmp_path / "x.tar", safetensors=content)
    assert torch.equal(sample.tensors["latents"], values)


def write_samples(folder: Path, samples: list[dict[str, torch.Tensor]], heads: list[dict[str, str]]) -> list[Location]:
    """A shard of samples whose safetensors files begin with different metadata; where they lie."""
    with tarfile.open(folder / "x.tar", "w") as archive:
        for number, (tensors, head) in enumerate(zip(samples, heads, strict=True)):
            for extension, data in (("json", b"{}"), ("safetensors", safetensors.torch.save(tensors, head))):
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    data = (folder / "x.tar").read_bytes()
    members = list(walk(io.BytesIO(data)))
    return [
        Location("x.tar", a.offset, b.end - a.offset, b.start - a.offset, b.size, zlib.crc32(data[a.offset : b.end]))
        for a, b in zip(members[::2], members[1::2], strict=True)
    ]


def test_rows_are_filled_whatever_the_files_begin_with(tmp_path: Path) -> None:
    """Heads of one length that differ in their text or in the order of the tensors, and heads of other lengths."""
    generator = torch.Generator().manual_seed(0)
    samples = [
        {
            "latents": torch.randn(2, 4, 6, generator=generator),
            "words": torch.randn(3, 5, generator=generator).bfloat16(),
            "ids": torch.arange(number, number + 4),
            "none": torch.zeros(0),
            "flag": torch.tensor([number % 2 == 0]),
        }
        for number in range(8)
    ]
    heads = [{"by": by} for by in ("aa", "aa", "bb", "aa", "longer", "longer", "aa", "bb")]
    locations = write_samples(tmp_path, samples, heads)
    reader, storage = RowReader(), LocalStorage(tmp_path)
    batch = {name: torch.full((8, *tensor.shape), 7).to(tensor.dtype) for name, tensor in samples[0].items()}
    for row, location in enumerate(locations):
        reader.read(storage, location, batch, row)
    for name, tensor in batch.items():
        assert torch.equal(tensor, torch.stack([sample[name] for sample in samples])), name
    for location in locations[:2]:
        with pytest.raises(DamageError, match="its bytes have changed"):
            reader.read(storage, location._replace(crc32=location.crc32 ^ 1), batch, 0)
    reader.read(storage, locations[5], batch, 2)
    assert torch.equal(batch["latents"][2], samples[5]["latents"])
    assert torch.equal(batch["latents"][3], samples[3]["latents"])


def test_rows_with_numbers_that_are_not_finite_are_damage(tmp_path: Path) -> None:
    samples = [{"latents": torch.zeros(1, 2, 2)} for _ in range(3)]
    samples[2]["latents"][0, 1, 1] = float("nan")
    locations = write_samples(tmp_path, samples, [{}, {}, {}])
    reader, batch = RowReader(), {"latents": torch.ones(3, 1, 2, 2)}
    reader.read(LocalStorage(tmp_path), locations[0], batch, 0)
    reader.read(LocalStorage(tmp_path), locations[1], batch, 1)
    with pytest.raises(DamageError, match="'latents' holds NaN or Inf"):
        reader.read(LocalStorage(tmp_path), locations[2], batch, 2)


def test_large_samples_are_not_even_read(tmp_path: Path) -> None:
    location = Location("none.tar", 0, 1001, 0, 0, 0)
    with pytest.raises(DamageError, match="1001 bytes, more than the limit of 1000"):
        read_sample(LocalStorage(tmp_path), location, max_bytes=1000)
    with pytest.raises(DamageError, match="No such file"):
        read_sample(LocalStorage(tmp_path), location)
    with pytest.raises(DamageError, match="more than the limit"):
        RowReader().read(LocalStorage(tmp_path), location._replace(length=2**31), {"latents": torch.zeros(1)}, 0)


def test_no_more_shards_stay_open_than_the_limit(index: Index) -> None:
    storage = LocalStorage(index.path, limit=2)
    for row in (0, 14, 22):  # one in each shard
        read_sample(storage, index.location(row))
    files = list(storage._files.values())
    assert list(storage._files) == ["4x8-00001.tar", "8x8-00000.tar"]
    read_sample(storage, index.location(0))
    assert [file.closed for file in files] == [True, False]
