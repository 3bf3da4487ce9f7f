"""A disk without room: one line, exit code 2, nothing half-written, nothing lost.

The test limits the size of files, at which the system refuses to write as on a full disk.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fmscale.config import TrainConfig, dump
from fmscale.quickstart import write_encoders


def fmscale(*argv: object, room_bytes: int = 10**12) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, room_bytes))

    command = [sys.executable, "-m", "fmscale", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit, check=False)


def complaint(result: subprocess.CompletedProcess[str]) -> str:
    """The last line of a run that was refused for want of room."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("fmscale ")
    assert "File too large" in last
    return last


def test_encode_leaves_no_dataset(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(40):
        Image.fromarray(np.full((64, 64, 3), 5 * number, np.uint8)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text("gray")
    write_encoders(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    complaint(fmscale("encode", tmp_path / "encode.yaml", room_bytes=50_000))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_train_leaves_no_checkpoint(tmp_path: Path, make_config: Callable[..., TrainConfig]) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(dump(make_config(tmp_path / "run")))
    said = complaint(fmscale("train", path, room_bytes=50_000))
    assert "step-00000004: the checkpoint could not be written" in said
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
