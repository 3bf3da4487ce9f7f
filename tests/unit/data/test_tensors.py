"""data/tensors.py: numbers in eight bits and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fmscale.data.index_build import build_index
from fmscale.data.loader import build_loader
from fmscale.data.mixture import Mixture
from fmscale.data.order import split
from fmscale.data.reader import read_sample
from fmscale.data.shards import ShardWriter
from fmscale.data.tensors import FP8, narrow, widen


def test_eight_bits_keep_four_digits_of_every_row_whatever_its_size() -> None:
    values = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    values *= torch.logspace(-30, 30, 15, base=10).reshape(3, 5, 1)
    numbers, scales = narrow(values)
    assert (numbers.dtype, scales.dtype, scales.shape) == (FP8, torch.float32, (3, 5))
    restored = widen({"t5": numbers, "t5_scale": scales, "other": scales})
    assert set(restored) == {"t5", "other"}
    assert restored["t5"].dtype == torch.bfloat16
    largest = values.abs().amax(dim=-1, keepdim=True)
    bound = (values.abs() * (2**-4 + 2**-8)).maximum(largest * 2**-10 / 448)  # half a step of E4M3; its least numbers
    assert ((restored["t5"].float() - values).abs() <= bound).all()
    assert torch.equal(numbers.float().abs().amax(dim=-1), torch.full((3, 5), 448.0))


def test_zeros_stay_zeros_and_what_is_not_finite_shows_in_the_scale() -> None:
    values = torch.zeros(3, 4)
    values[1, 2], values[2, 3] = torch.nan, torch.inf
    numbers, scales = narrow(values)
    assert not widen({"t5": numbers, "t5_scale": scales})["t5"][0].any()
    assert scales.isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize("broken", ["t5", "t5_scale"])
def test_eight_bits_are_read_and_checked(tmp_path: Path, broken: str) -> None:
    values = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1))
    with ShardWriter(tmp_path) as writer:
        for number, value in enumerate(values):
            tensors = dict(zip(("t5", "t5_scale"), narrow(value), strict=True))
            if number == 3:
                tensors[broken].view(torch.uint8)[-1] = 0xFF
                tensors[broken] = tensors[broken] * torch.nan if broken == "t5_scale" else tensors[broken]
            writer.write(f"s{number}", {"latents": torch.zeros(1, 2, 2), **tensors}, {})
    index = build_index(tmp_path, None)
    assert index.layout["t5"] == ("F8_E4M3", (3, 8))
    sample = read_sample(index.storage, index.location(0))
    torch.testing.assert_close(sample.tensors["t5"].float(), values[0], rtol=0.07, atol=1e-3)
    mixture = Mixture([index])
    loader = build_loader(
        mixture,
        mixture.order(4, seed=0),
        split(4, 1, 4),
        rank=0,
        start_step=0,
        stop_step=1,
        noise=lambda *_: torch.zeros(()),
    )
    batch = next(loader)
    assert [(bad.key, bad.reason) for bad in batch.bad] == [("s3", f"tensor {broken!r} holds NaN or Inf")]
    assert batch.tensors["t5"].dtype == FP8
    restored = widen(batch.tensors)["t5"].float()
    for key, row in zip(batch.keys, restored, strict=True):
        expected = values[int(key[1])] if key != "s3" else torch.zeros(3, 8)
        torch.testing.assert_close(row, expected, rtol=0.07, atol=1e-3)
