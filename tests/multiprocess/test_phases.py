"""A run in three phases: one job, which may stop on either side of each switch and go on to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from fmscale import digits
from fmscale.config import EncodeConfig, TrainConfig, load
from fmscale.encode import encode
from fmscale.engine.checkpoint import Fragments, open_checkpoint
from fmscale.quickstart import write_encoders, write_train_config
from fmscale.runs import open_run

pytestmark = pytest.mark.slow

Make = Callable[..., TrainConfig]
TrainMany = Callable[[int, Sequence[TrainConfig]], None]
Losses = Callable[[Path], dict[int, float]]
STEPS, SWITCHES, SIDES_PX = 12, (4, 8), (32, 48, 64)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The quickstart's digits at three resolutions; each has a batch, a rate, a shift, positions and an average."""
    folder = tmp_path_factory.mktemp("data")
    images = digits.load_split()
    (folder / "images").mkdir()
    for number, picture in enumerate(digits.enlarge(images.train_images[:40])):
        Image.fromarray(picture).save(folder / "images" / f"{number:02d}.png")
        (folder / "images" / f"{number:02d}.txt").write_text(digits.caption(images.train_labels[number]))
    write_encoders(folder)
    coarse, middle, fine = (str(folder / str(px)) for px in SIDES_PX)
    for px, out in zip(SIDES_PX, (coarse, middle, fine), strict=True):
        encode(load(EncodeConfig, folder / "encode.yaml", [f"out={out}", f"buckets_px=[[{px}, {px}]]"]))
    model = load(TrainConfig, write_train_config(folder)).model
    second = {"data": {"path": middle}, "global_batch": 24, "micro_batch": 5, "flow": {"shift": 1.5}}
    third = {"data": {"path": fine}, "global_batch": 8, "flow": {"shift": 2.0}, "conditioning": {"dropout": 0.3}}
    second |= {"optimizer": {"lr": 5e-4, "warmup_steps": 2, "weight_decay": 0.0}, "model": {"base_size": 6}}
    second |= {"engine": {"recompute_every": 1, "attention": "math"}}
    third |= {"ema": {"decays": [0.9, 0.8]}, "optimizer": {"clip_norm": 0.1, "betas": [0.8, 0.9]}}
    phases = [{"until_step": SWITCHES[0]}, {"until_step": SWITCHES[1], **second}, third]
    widths = ("latent_channels", "context_dim", "pooled_dim")
    return (
        f"steps={STEPS}",
        "checkpoint.every_steps=1",
        "checkpoint.keep=100",
        "engine.zero_stage=2",
        f"data.path={coarse}",
        f"phases={json.dumps(phases)}",
        *(f"model.{key}={getattr(model, key)}" for key in widths),
    )


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, make_config: Make, train_many: TrainMany, settings: tuple[str, ...]
) -> Path:
    """The run on two ranks, never stopped."""
    config = make_config(tmp_path_factory.mktemp("whole") / "run", *settings)
    train_many(2, [config])
    return config.run_dir


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def test_each_phase_does_what_it_says(whole: Path) -> None:
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [record["phase"] for record in records] == [0] * 4 + [1] * 4 + [2] * 4
    assert [record["images_seen"] for record in records][3::4] == [4 * 32, 4 * 32 + 4 * 24, 4 * 32 + 4 * 24 + 4 * 8]
    assert {record["bucket"] for record in records[4:8]} == {"6x6"}
    assert {record["bucket"] for record in records[8:]} == {"8x8"}
    assert [record["lr"] for record in records[4:9]] == pytest.approx([2.5e-4, 5e-4, 5e-4, 5e-4, 2.5e-4])
    saved = open_run(whole)
    assert saved.config.flow.shift == 2.0
    assert saved.config.model.base_size == 6
    assert saved.description["images_seen"] == records[-1]["images_seen"]
    assert {"ema_0.9", "ema_0.8"} <= set(saved.checkpoint.index["kinds"])
    assert {"ema_0.99", "ema_0.9"} <= set(open_checkpoint(checkpoint(whole, SWITCHES[1])).index["kinds"])


def test_stopped_on_either_side_of_a_switch_it_goes_on_to_the_bit(
    whole: Path, tmp_path: Path, make_config: Make, train_many: TrainMany, losses: Losses, settings: tuple[str, ...]
) -> None:
    configs = []
    for stop in (SWITCHES[0] - 1, SWITCHES[0], SWITCHES[0] + 1, SWITCHES[1] - 1, SWITCHES[1], SWITCHES[1] + 1):
        shutil.copytree(whole, tmp_path / str(stop))
        for step in range(stop + 1, STEPS + 1):
            shutil.rmtree(checkpoint(tmp_path / str(stop), step))
        configs.append(make_config(tmp_path / str(stop), *settings))
    train_many(2, configs)
    expected = Fragments(open_checkpoint(checkpoint(whole, STEPS)))
    for config in configs:
        assert losses(config.run_dir) == losses(whole)
        ours = Fragments(open_checkpoint(checkpoint(config.run_dir, STEPS)))
        for kind in expected.checkpoint.index["kinds"]:
            for (name, one), (_, other) in zip(ours.full(kind), expected.full(kind), strict=True):
                assert torch.equal(one, other), (config.run_dir, kind, name)


def test_one_process_trains_the_same_run(
    whole: Path, tmp_path: Path, make_config: Make, train_many: TrainMany, losses: Losses, settings: tuple[str, ...]
) -> None:
    config = make_config(tmp_path / "run", *settings, "engine.zero_stage=3")
    train_many(1, [config])
    assert losses(config.run_dir) == pytest.approx(losses(whole), rel=1e-5)
