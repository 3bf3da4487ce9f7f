"""Captions that training encodes itself: the same run as on stored features, in every world and after every stop."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fmscale import digits
from fmscale.cli import main
from fmscale.config import EncodeConfig, TrainConfig, load
from fmscale.data.index import Index
from fmscale.data.mixture import Address, Mixture
from fmscale.encode import encode
from fmscale.engine.metrics import read_metrics
from fmscale.errors import UserError
from fmscale.quickstart import write_encoders, write_train_config
from fmscale.train import train

pytestmark = pytest.mark.slow

SETTINGS = ["steps=4", "global_batch=6", "micro_batch=6", "engine.dtype=fp32", "checkpoint.every_steps=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits with captions, encoders, and two datasets of one making: with text features, and with captions alone."""
    out = tmp_path_factory.mktemp("online")
    split = digits.load_split()
    (out / "images").mkdir()
    pictures = zip(digits.enlarge(split.train_images[:12]), split.train_labels[:12], strict=True)
    for number, (picture, label) in enumerate(pictures):
        shown = np.concatenate([picture, picture], axis=1) if number % 2 else picture
        Image.fromarray(shown).save(out / "images" / f"{number:03d}.png")
        (out / "images" / f"{number:03d}.txt").write_text(digits.caption(label))
    write_encoders(out)
    common = ["dtype=fp32", "latents=posterior", "flip=true"]
    encode(load(EncodeConfig, out / "encode.yaml", common))
    encode(load(EncodeConfig, out / "encode.yaml", [*common, f"out={out / 'captions'}", "text.online=true"]))
    write_train_config(out)
    return out


def losses(folder: Path, run_dir: Path, data: str, *settings: str) -> list[float]:
    overrides = [*SETTINGS, f"run_dir={run_dir}", f"data.path={folder / data}", *settings]
    assert main(["train", str(folder / "train.yaml"), *overrides]) == 0
    return [record["loss"] for record in read_metrics(run_dir / "metrics.jsonl")]


def test_only_captions_are_stored(folder: Path) -> None:
    stored, online = Index.open(folder / "latents"), Index.open(folder / "captions")
    latents = {"latents", "latents_log_variance", "latents_flipped", "latents_flipped_log_variance"}
    assert set(online.layout) == latents
    assert set(stored.layout) == latents | {"clip_l", "clip_l_pooled", "clip_g", "clip_g_pooled"}
    assert online.made_by is not None
    assert stored.made_by is not None
    assert {**online.made_by, "text_online": False} == stored.made_by


def test_captions_train_as_stored_features_do(folder: Path, tmp_path: Path) -> None:
    """In one process, in two, and stopped on the way."""
    expected = losses(folder, tmp_path / "stored", "latents")
    online = losses(folder, tmp_path / "online", "captions")
    assert len(set(online)) == 4
    assert online == pytest.approx(expected, rel=1e-5)
    two = losses(folder, tmp_path / "two", "captions", "--nproc=2", "micro_batch=2", "engine.zero_stage=2")
    assert two == pytest.approx(online, rel=1e-5)
    losses(folder, tmp_path / "stopped", "captions", "steps=2")
    assert losses(folder, tmp_path / "stopped", "captions") == online


def test_a_run_on_captions_shows_what_it_draws(folder: Path, tmp_path: Path) -> None:
    losses(folder, tmp_path / "run", "captions", "steps=1", "log.images_every_steps=1")
    assert [path.name for path in (tmp_path / "run" / "samples").iterdir()] == ["step-00000001.png"]


def test_encoders_that_have_moved_are_asked_for(folder: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(folder / "captions", tmp_path / "captions"))
    manifest = data / "index" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(folder / "encoders"), "/gone"))
    settings = [*SETTINGS, f"run_dir={tmp_path / 'run'}", f"data.path={data}"]
    asked = r"/gone/clip_l: clip_l of the dataset is no longer there; give its folder: data\.text_encoders\.clip_l=DIR"
    with pytest.raises(UserError, match=asked):
        train(load(TrainConfig, folder / "train.yaml", settings))
    assert not (tmp_path / "run").exists()
    found = [f"data.text_encoders.{role}={folder / 'encoders' / role}" for role in ("clip_l", "clip_g")]
    assert len(losses(folder, tmp_path / "run", "captions", "steps=1", f"data.path={data}", *found)) == 1
    swapped = [f"data.text_encoders.{role}={folder / 'encoders' / 'clip_l'}" for role in ("clip_l", "clip_g")]
    with pytest.raises(UserError, match="clip_g: the weights are not those that made the dataset"):
        train(load(TrainConfig, folder / "train.yaml", [*settings, *swapped]))
    with pytest.raises(UserError, match=r"data\.text_encoders: .* stores text features; leave that key out"):
        train(load(TrainConfig, folder / "train.yaml", [*settings, f"data.path={folder / 'latents'}", *found]))


def test_pairs_are_made_from_captions_as_from_their_features(folder: Path, tmp_path: Path) -> None:
    losses(folder, tmp_path / "run", "captions", "steps=1")
    config = {"teacher": str(tmp_path / "run"), "pairs": 2, "solver_steps": 1}
    (tmp_path / "reflow.yaml").write_text(yaml.safe_dump(config))
    found = []
    for name in ("captions", "latents"):
        paths = [f"data.path={folder / name}", f"out={tmp_path / name}"]
        assert main(["reflow", str(tmp_path / "reflow.yaml"), *paths]) == 0
        found.append([Mixture([Index.open(tmp_path / name)]).sample(Address(0, row)).tensors for row in range(2)])
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(value.float(), other[key].float(), rtol=1e-4, atol=1e-4)
