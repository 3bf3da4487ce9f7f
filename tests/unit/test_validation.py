"""Which images are held out, and when they are not; what each of them gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import text_features

from fmscale.building import check_setup
from fmscale.config import TrainConfig
from fmscale.data.index_build import build_index
from fmscale.data.shards import ShardWriter
from fmscale.encoders.null import save_null
from fmscale.errors import UserError
from fmscale.validation import spread, times

Make = Callable[..., TrainConfig]


def write(folder: Path, **made_by: Any) -> Path:
    """Three square images."""
    generator = torch.Generator().manual_seed(2)
    with ShardWriter(folder, samples_per_shard=3) as writer:
        for number in range(3):
            tensors = {"latents": torch.randn(4, 8, 8, generator=generator), **text_features(generator)}
            writer.write(f"w{number}", tensors, {"caption": ""})
    save_null(folder, text_features(generator))
    build_index(folder, {"program": "tests", "t5_length": 32, **made_by})
    return folder


def test_what_is_not_held_out_is_refused(make_config: Make, tmp_path: Path, dataset: Path) -> None:
    held_out, other = write(tmp_path / "held_out"), write(tmp_path / "other", text={"clip_l": {"sha256": "1"}})

    def said(validation: Path, data: dict[str, Any], *phases: dict[str, Any]) -> str:
        places = (f"validation={{path: {validation}}}", f"data={json.dumps(data)}")
        settings = (*places, f"phases={json.dumps(phases)}")
        with pytest.raises(UserError) as error:
            check_setup(make_config(tmp_path / "run", *settings), 1)
        return str(error.value)

    both = {"path": None, "mixture": [{"path": str(place), "weight": 1} for place in (dataset, held_out)]}
    shared = said(dataset, {"path": str(dataset)})
    assert ".tar, which the run trains on; hold some shards out" in shared
    assert f"{held_out} holds" in said(held_out, both)
    before = {"until_step": 4}, {"data": {"path": str(held_out)}}
    assert said(held_out, {"path": str(dataset)}, *before).startswith(f"phases.0: validation.path: {held_out} holds")
    assert "was not made by the VAE and text encoders of" in said(other, {"path": str(dataset)})
    assert "no such folder" in said(tmp_path / "gone", {"path": str(dataset)})
    check_setup(make_config(tmp_path / "run", f"validation={{path: {held_out}}}"), 1)


def test_images_are_spread_and_there_is_always_one() -> None:
    assert spread(10, 0.3) == [0, 3, 6]
    assert spread(10, 1.0) == list(range(10))
    assert spread(10, 1e-9) == [0]
    assert spread(0, 0.5) == []


def test_times_fill_the_path_evenly_however_many_there_are() -> None:
    whole = times(torch.arange(1000))
    assert torch.equal(times(torch.arange(37, 90)), whole[37:90])
    for count in (10, 100, 1000):
        gaps = whole[:count].sort().values.diff()
        assert gaps.max() < 2.7 / count  # of random ones, some log(count) / count
