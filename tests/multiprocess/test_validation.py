"""The loss on held-out images: one number, whatever the world, the micro-batch and the stage; it disturbs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BUCKETS, text_features

from fmscale.config import TrainConfig
from fmscale.data.index_build import build_index
from fmscale.data.shards import ShardWriter
from fmscale.encoders.null import save_null
from fmscale.engine.optim import ema_name

Make = Callable[..., TrainConfig]
TrainMany = Callable[[int, Sequence[TrainConfig]], None]
IMAGES = 50


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty images in the three buckets, one of them damaged."""
    folder = tmp_path_factory.mktemp("held_out")
    generator = torch.Generator().manual_seed(1)
    with ShardWriter(folder, samples_per_shard=20) as writer:
        for number in range(IMAGES):
            latents = torch.randn(4, *BUCKETS[number % 3], generator=generator)
            if number == 7:
                latents[0, 0, 0] = torch.nan
            writer.write(f"v{number:05d}", {"latents": latents, **text_features(generator)}, {"caption": str(number)})
    save_null(folder, text_features(generator))
    build_index(folder, {"program": "tests", "t5_length": 32})
    return folder


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "validation.jsonl").read_text().splitlines()]


def numbers(record: dict[str, Any]) -> list[float]:
    return [record["loss"], *record["loss_by_t"], *record["loss_by_bucket"].values()]


@pytest.mark.slow
def test_the_same_in_every_world_and_micro_batch(
    held_out: Path, tmp_path: Path, make_config: Make, train_many: TrainMany
) -> None:
    settings = ("steps=3", "checkpoint.every_steps=3", f"validation={{path: {held_out}, every_steps: 2}}")
    alone = make_config(tmp_path / "1", *settings, "engine.zero_stage=1")
    small = make_config(tmp_path / "1-7", *settings, "engine.zero_stage=2", "micro_batch=7")
    none = make_config(tmp_path / "none", "steps=3", "checkpoint.every_steps=3", "engine.zero_stage=1")
    train_many(1, [alone, small, none])
    others = [small]
    for world, stage in ((2, 3), (4, 2)):
        others.append(make_config(tmp_path / str(world), *settings, f"engine.zero_stage={stage}", "micro_batch=5"))
        train_many(world, [others[-1]])
    expected = records(alone.run_dir)
    kinds = ["raw", ema_name(0.99), ema_name(0.9)]
    assert [(record["step"], record["weights"]) for record in expected] == [(s, kind) for s in (2, 3) for kind in kinds]
    assert {record["images"] for record in expected} == {IMAGES - 1}
    assert expected[0]["loss_by_bucket"].keys() == {"8x8", "8x16", "16x8"}
    assert len({record["loss"] for record in expected}) == 4  # both averages begin with the same warm-up
    for config in others:
        for ours, theirs in zip(records(config.run_dir), expected, strict=True):
            assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-6)
    losses = [
        [json.loads(line)["loss"] for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
        for config in (alone, none)
    ]
    assert losses[0] == losses[1]  # to the bit
