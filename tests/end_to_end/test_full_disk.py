"""A disk without room: one line, exit code 2, nothing half-written, nothing lost.

The tests limit the size of files, at which the system refuses to write as on a full disk.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmscale.cli import main
from fmscale.config import TrainConfig, dump
from fmscale.data.index import Index
from fmscale.data.index_build import build_index
from fmscale.errors import UserError
from fmscale.quickstart import write_encoders

ROOM_BYTES = 50_000


@contextmanager
def little_room() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def complaint(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The last line of a command that was refused for want of room."""
    capsys.readouterr()
    with little_room():
        assert main([str(part) for part in argv]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"fmscale {argv[0]}: ")
    assert "File too large" in last
    return last


def test_encode_leaves_no_dataset_and_goes_on_when_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(40):
        Image.fromarray(np.full((64, 64, 3), 5 * number, np.uint8)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text("gray")
    write_encoders(tmp_path)
    complaint(capsys, "encode", tmp_path / "encode.yaml")
    assert [path.name for path in (tmp_path / "latents").iterdir()] == ["unfinished"]
    assert not list(tmp_path.glob("latents/unfinished/*/*"))
    with pytest.raises(UserError, match=r"latents is not finished: let its `fmscale encode` come to an end, or start"):
        Index.open(tmp_path / "latents")
    with pytest.raises(UserError, match="latents is not finished"):
        build_index(tmp_path / "latents", None)
    assert main(["encode", str(tmp_path / "encode.yaml")]) == 0
    assert len(Index.open(tmp_path / "latents")) == 40


def test_train_keeps_its_older_checkpoints(
    tmp_path: Path, make_config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(dump(make_config(tmp_path / "run")))
    assert main(["train", str(path), "steps=4"]) == 0
    said = complaint(capsys, "train", path, "steps=8")
    assert "step-00000008: the checkpoint could not be written" in said
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    assert main(["train", str(path), "steps=8"]) == 0
