"""What a fault in one of two shards costs: stock webdataset the rest of the shard, in silence; here a sample, named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import webdataset
from safetensors.torch import save

from fmscale.batch import BadSample
from fmscale.data.index import Index, verify
from fmscale.data.index_build import build_index
from fmscale.data.loader import build_loader
from fmscale.data.mixture import Mixture
from fmscale.data.order import split
from fmscale.data.shards import ShardWriter
from fmscale.errors import UserError

PER_SHARD = 100
STRUCK = 30  # the sample of the first shard that is hit, or at which it is cut


class Fault(NamedTuple):
    """A way in which a shard is spoiled.

    Attributes:
        spoil: the shard's bytes, and the offset of the sample that is hit -> the bytes that are left.
        lost: how many samples this program loses, the one that is hit first.
        stock: how many of 200 stock webdataset delivers.
        reason: as this program says it.
    """

    spoil: Callable[[bytes, int], bytes]
    lost: int
    stock: int
    reason: str


def flip(at: int) -> Callable[[bytes, int], bytes]:
    """Flips one bit, so many bytes behind the beginning of the sample."""
    return lambda data, offset: data[: offset + at] + bytes([data[offset + at] ^ 1]) + data[offset + at + 1 :]


FAULTS = {
    "one byte flipped in a tar header": Fault(flip(100), 1, 130, "its bytes have changed"),
    "one byte flipped in a name": Fault(flip(3), 1, 130, "its bytes have changed"),
    "one payload byte flipped": Fault(flip(6000), 1, 200, "its bytes have changed"),
    "4 KiB of zeros": Fault(
        lambda data, offset: data[:offset] + bytes(4096) + data[offset + 4096 :], 1, 130, "its bytes have changed"
    ),
    "cut at a member": Fault(lambda data, offset: data[:offset], 70, 130, "bytes before the sample does"),
    "cut within a member": Fault(lambda data, offset: data[: offset + 5000], 70, 130, "bytes before the sample does"),
}


def write(folder: Path) -> Index:
    with ShardWriter(folder, samples_per_shard=PER_SHARD) as writer:
        for number in range(2 * PER_SHARD):
            generator = torch.Generator().manual_seed(number)
            writer.write(f"{number:03d}", {"latents": torch.randn(4, 16, 32, generator=generator)}, {"number": number})
    return build_index(folder, None)


def one_epoch(index: Index, workers: int) -> tuple[dict[str, torch.Tensor], list[BadSample]]:
    """Latents by key of all samples that counted, and those that did not."""
    mixture, found, bad = Mixture([index]), {}, []

    def noise(shape: tuple[int, ...], *_: Any) -> torch.Tensor:
        return torch.zeros(shape)

    order, parts = mixture.order(8, seed=0), split(8, 1, 8)
    options: dict[str, Any] = {"rank": 0, "start_step": 0, "stop_step": 25, "noise": noise, "workers": workers}
    for batch in build_loader(mixture, order, parts, **options):
        bad += batch.bad
        sound = batch.weight.bool().tolist()
        found |= {key: batch.tensors["latents"][i] for i, key in enumerate(batch.keys) if sound[i]}
    return found, bad


def stock_count(folder: Path) -> int:
    """How many samples stock webdataset delivers when its handler goes on after every error."""
    urls = sorted(map(str, folder.glob("*.tar")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = webdataset.WebDataset(urls, shardshuffle=False, handler=webdataset.ignore_and_continue)
        return sum("safetensors" in sample for sample in dataset)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_loses_what_it_hits_and_says_so(tmp_path: Path, fault: Fault, workers: int) -> None:
    index = write(tmp_path / "data")
    sound, none = one_epoch(index, workers)
    assert (len(sound), none) == (2 * PER_SHARD, [])
    shard = index.path / index.shards[0].name
    struck = index.location(STRUCK)
    assert struck.length > 8192
    shard.write_bytes(fault.spoil(shard.read_bytes(), struck.offset))
    expected = [f"{number:03d}" for number in range(STRUCK, STRUCK + fault.lost)]

    found, bad = one_epoch(index, workers)
    assert sorted(sample.key for sample in bad) == expected
    assert {sample.shard for sample in bad} == {shard.name}
    assert all(fault.reason in sample.reason for sample in bad)
    assert sorted([*found, *expected]) == sorted(sound)
    assert all(torch.equal(latents, sound[key]) for key, latents in found.items())
    assert [sample.key for sample in verify(Index.open(index.path, check_shards=False))] == expected
    assert stock_count(index.path) == fault.stock


def test_no_sample_is_ever_mixed_from_two_shards(
    tmp_path: Path, write_tar: Callable[[Path, list[tuple[str, bytes]]], None]
) -> None:
    """A shard that was cut between a sample's members, and one that goes on with the same key."""
    data = save({"latents": torch.zeros(1, 2, 2)})
    write_tar(tmp_path / "data" / "0.tar", [("a.safetensors", data), ("a.json", b"{}"), ("b.safetensors", data)])
    write_tar(tmp_path / "data" / "1.tar", [("b.json", b"{}"), ("c.safetensors", data)])
    with pytest.raises(UserError, match=r"1\.tar cannot be indexed: sample 'b' has no \.safetensors member"):
        build_index(tmp_path / "data", None)
    write_tar(tmp_path / "data" / "1.tar", [("b.safetensors", data), ("b.json", b"{}"), ("c.safetensors", data)])
    with pytest.raises(UserError, match=r"key 'b' is in .*0\.tar and .*1\.tar: keys must differ"):
        build_index(tmp_path / "data", None)
