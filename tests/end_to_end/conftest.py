"""What several tests of the whole chain share: images, encoded, learned a little and exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmscale import digits
from fmscale.config import TrainConfig, load
from fmscale.encode import encode
from fmscale.export import export
from fmscale.quickstart import write_encoders, write_train_config
from fmscale.runs import open_run
from fmscale.train import train


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as quickstart leaves it, made of 24 digits in three buckets, one of them broken, and 6 steps."""
    out = tmp_path_factory.mktemp("chain")
    split = digits.load_split()
    pictures, labels = digits.enlarge(split.train_images[:24]), split.train_labels[:24]
    (out / "images").mkdir()
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        shown = picture if number % 2 else np.concatenate([picture, picture], axis=number // 2 % 2)
        Image.fromarray(shown).save(out / "images" / f"{number:03d}.png")
        (out / "images" / f"{number:03d}.txt").write_text(digits.caption(label))
    (out / "images" / "broken.png").write_bytes(b"this is no picture")
    (out / "images" / "broken.txt").write_text("nothing")
    encode(write_encoders(out))
    config_path = write_train_config(out)
    overrides = ["steps=6", "global_batch=8", "micro_batch=8", "engine.dtype=fp32", "checkpoint.every_steps=3"]
    overrides += ["ema.sigma_rels=[0.05, 0.1]", "ema.snapshot_every_steps=2"]
    train(load(TrainConfig, config_path, overrides))
    export(open_run(out / "run"), out / "export", dtype="fp32")
    return out
