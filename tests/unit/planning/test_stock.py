"""What a manifest tells of a dataset is what training finds in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fmscale.config import TrainConfig
from fmscale.dataset import open_dataset
from fmscale.errors import UserError
from fmscale.planning.stock import stock_of, text_tokens


def test_a_dataset_is_what_training_opens(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    stock, opened = stock_of(config), open_dataset(config)
    assert stock.known
    assert stock.text_tokens == opened.text_tokens
    found = [(bucket.height, bucket.width, bucket.count) for bucket in opened.mixture.buckets]
    assert [tuple(shape) for shape in stock.shapes] == found
    assert stock.shares == tuple(count / len(opened.mixture) for *_, count in found)
    tars = list(Path(str(config.data.path)).glob("*.tar"))
    assert stock.parts[0].shards == len(tars)
    assert stock.sample_bytes * len(opened.mixture) == pytest.approx(sum(tar.stat().st_size for tar in tars))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layout": {"latents": ["float16", [99]]}}, r"model\.latent_channels is 4, and the latents of .* have 99"),
        ({"layout": []}, "makes no sense"),
        ({"shards": None}, "makes no sense"),
        ({"shards": [{"size": -1, "samples": 120}]}, "fewer than none"),
        ({"shards": [{"size": 1, "samples": 3}]}, "buckets have 120 samples, shards 3"),
    ],
)
def test_what_training_could_not_read_is_refused(
    change: dict[str, Any], said: str, make_config: Callable[..., TrainConfig], dataset: Path, tmp_path: Path
) -> None:
    manifest = json.loads((dataset / "index" / "manifest.json").read_text())
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=said):
        stock_of(make_config(tmp_path / "run", f"data.path={tmp_path}"))


def test_a_dataset_may_be_named_twice(make_config: Callable[..., TrainConfig], dataset: Path, tmp_path: Path) -> None:
    parts = f"[{{path: {dataset}, weight: 1}}, {{path: {dataset}, weight: 3}}]"
    stock = stock_of(make_config(tmp_path / "run", "data.path=null", f"data.mixture={parts}"))
    assert [part.name for part in stock.parts] == [str(dataset)] * 2
    assert stock.shares == pytest.approx(stock_of(make_config(tmp_path / "run")).shares, rel=1e-5)


def test_a_mixture_goes_by_its_weights(make_config: Callable[..., TrainConfig], dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "square" / "index").mkdir(parents=True)
    manifest = json.loads((dataset / "index" / "manifest.json").read_text())
    (square,) = (bucket for bucket in manifest["buckets"] if bucket["height"] == bucket["width"])
    shard = {**manifest["shards"][0], "samples": square["rows"]}
    manifest |= {"buckets": [square], "shards": [shard]}
    (tmp_path / "square" / "index" / "manifest.json").write_text(json.dumps(manifest))
    parts = f"[{{path: {dataset}, weight: 1}}, {{path: {tmp_path / 'square'}, weight: 3}}]"
    stock = stock_of(make_config(tmp_path / "run", "data.path=null", f"data.mixture={parts}"))
    alone = stock_of(make_config(tmp_path / "run"))
    shares = dict(zip((shape.name for shape in alone.shapes), alone.shares, strict=True))
    expected = {name: share / 4 + (3 / 4 if name == "8x8" else 0) for name, share in shares.items()}
    assert {
        shape.name: pytest.approx(share) for shape, share in zip(stock.shapes, stock.shares, strict=True)
    } == expected


@pytest.mark.parametrize(
    ("layout", "made_by", "tokens"),
    [
        ({"clip_l": ["BF16", [77, 768]], "clip_g": ["BF16", [77, 1280]], "t5": ["BF16", [256, 4096]]}, {}, 333),
        ({"clip_l": ["BF16", [77, 768]], "clip_g": ["BF16", [77, 1280]]}, {"t5_length": 256}, 78),
        ({"t5": ["BF16", [512, 4096]], "clip_l_pooled": ["BF16", [768]]}, {"pipeline": "flux"}, 512),
        ({}, {"text": {"clip_l": 1, "clip_g": 1, "t5": 1}, "clip_length": 77, "t5_length": 154}, 231),
        ({}, {"text": {"clip_l": 1, "clip_g": 1}, "clip_length": 77, "t5_length": 256}, 78),
        ({}, {"text": {"clip_l": 1, "t5": 1}, "pipeline": "flux", "t5_length": 512}, 512),
    ],
)
def test_tokens_of_a_caption(layout: dict[str, Any], made_by: dict[str, Any], tokens: int) -> None:
    assert text_tokens({"layout": layout, "made_by": made_by}) == tokens


def test_data_that_are_not_there_are_assumed(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    stock = stock_of(make_config(tmp_path / "run", "data.path=nowhere"))
    assert not stock.known
    assert [shape.name for shape in stock.shapes] == ["8x8"]  # 4 patches of 2 latent pixels
    assert stock.text_tokens == 333


def test_a_part_of_a_mixture_that_is_not_there_is_named(
    make_config: Callable[..., TrainConfig], dataset: Path, tmp_path: Path
) -> None:
    parts = f"[{{path: {dataset}, weight: 1}}, {{path: nowhere, weight: 3}}]"
    stock = stock_of(make_config(tmp_path / "run", "data.path=null", f"data.mixture={parts}"))
    assert stock.missing == ("nowhere",)


@pytest.mark.parametrize(
    ("key", "value"), [("height", 0), ("height", 1e400), ("rows", 0), ("rows", -2), ("rows", "many")]
)
def test_a_bucket_that_makes_no_sense_is_refused(
    make_config: Callable[..., TrainConfig], dataset: Path, tmp_path: Path, key: str, value: object
) -> None:
    manifest = json.loads((dataset / "index" / "manifest.json").read_text())
    manifest["buckets"][0][key] = value
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"fmscale index"):
        stock_of(make_config(tmp_path / "run", f"data.path={tmp_path}"))


@pytest.mark.parametrize(
    "text", ["{", "{}", "[" * 200_000, '{"shards": [], "buckets": [], "layout": {}, "made_by": null}', "[1]"]
)
def test_a_manifest_that_makes_no_sense_is_refused(
    make_config: Callable[..., TrainConfig], tmp_path: Path, text: str
) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"fmscale index"):
        stock_of(make_config(tmp_path / "run", f"data.path={tmp_path}"))
