from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest
import safetensors.torch
import torch
import webdataset

from fmscale.data.shards import ShardWriter
from fmscale.errors import UserError

LATENTS = {"latents": torch.zeros(4, 8, 8)}


def test_each_bucket_has_its_own_shards_and_rolls_over(dataset_path: Path, index) -> None:
    names = ["4x8-00000.tar", "4x8-00001.tar", "8x8-00000.tar"]
    assert sorted(path.name for path in dataset_path.glob("*")) == [*names, "index"]
    assert [shard.samples for shard in index.shards] == [10, 5, 8]
    assert [(bucket.name, bucket.count) for bucket in index.buckets] == [("4x8", 15), ("8x8", 8)]


def test_stock_webdataset_reads_the_same_tensors(dataset_path: Path, samples) -> None:
    urls = sorted(str(path) for path in dataset_path.glob("*.tar"))
    stock = {item["__key__"]: item for item in webdataset.WebDataset(urls, shardshuffle=False)}
    assert sorted(stock) == [key for key, _, _ in samples]
    for key, tensors, meta in samples:
        stored = safetensors.torch.load(stock[key]["safetensors"])
        assert stored.keys() == tensors.keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
        assert json.loads(stock[key]["json"]) == meta


def test_numbers_go_on_after_shards_that_are_there(tmp_path: Path) -> None:
    for key in ("a", "b"):
        with ShardWriter(tmp_path, prefix="rank0-") as writer:
            writer.write(key, LATENTS, {})
        assert writer.finished == [tmp_path / f"rank0-8x8-0000{'ab'.index(key)}.tar"]


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        with ShardWriter(tmp_path / folder) as writer:
            writer.write("key", LATENTS, {"caption": "é", "b": 1, "a": 2})
    assert (tmp_path / "a/8x8-00000.tar").read_bytes() == (tmp_path / "b/8x8-00000.tar").read_bytes()


def test_tensors_may_share_memory_and_be_views(tmp_path: Path) -> None:
    packed = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {"latents": packed.transpose(0, 2), "pooled": packed[0, 0], "tokens": packed[0]}
    with ShardWriter(tmp_path) as writer:
        writer.write("key", tensors, {})
    (sample,) = webdataset.WebDataset(str(writer.finished[0]), shardshuffle=False)
    stored = safetensors.torch.load(sample["safetensors"])
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())


def write_many(folder: Path, samples: int, last: Exception | None = None) -> None:
    with ShardWriter(folder, samples_per_shard=4) as writer:
        for number in range(samples):
            writer.write(f"key{number}", LATENTS, {})
        if last:
            raise last


def test_an_error_leaves_whole_shards_and_no_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        write_many(tmp_path, 5, RuntimeError("stop"))
    assert [path.name for path in tmp_path.iterdir()] == ["8x8-00000.tar"]


@pytest.mark.parametrize("samples", [1, 3])
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path, samples: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # the kernel refuses longer files, as a full disk does
    try:
        with pytest.raises(UserError) as caught:
            write_many(tmp_path, samples)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    reason = os.strerror(errno.EFBIG)
    assert str(caught.value) == (
        f"cannot write {tmp_path}/8x8-00000.tar: {reason}; make room there, or choose another folder"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file/out: Not a directory"):
        ShardWriter(tmp_path / "file" / "out")


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a\n"])
def test_keys_that_webdataset_would_cut_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(AssertionError), ShardWriter(tmp_path) as writer:
        writer.write(key, LATENTS, {})
