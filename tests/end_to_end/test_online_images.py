"""Images that training encodes itself: the same run as on their stored latents, in every world and after every stop."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
import yaml
from PIL import Image

from fmscale import digits
from fmscale.cli import main
from fmscale.config import EncodeConfig, TrainConfig, load
from fmscale.data.index import Index
from fmscale.encode import encode
from fmscale.engine.metrics import read_metrics
from fmscale.errors import UserError
from fmscale.quickstart import write_encoders, write_train_config
from fmscale.train import train

pytestmark = pytest.mark.slow

SETTINGS = ["steps=4", "global_batch=6", "micro_batch=6", "engine.dtype=fp32", "checkpoint.every_steps=2"]
SETTINGS += ["data.workers=0"]
WANTED = {"workers": 0, "dtype": "fp32", "latents": "posterior", "flip": True, "filters": {"min_side_px": 60}}
CAPTIONS = {"captions": {"txt": 1, "json.synthetic": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars of digits, with some images that are not wanted: indexed as they are, and encoded."""
    out = tmp_path_factory.mktemp("raw")
    split = digits.load_split()
    pictures = zip(digits.enlarge(split.train_images[:20]), split.train_labels[:20], strict=True)
    (out / "images").mkdir()
    for number, (picture, label) in enumerate(pictures):
        if number % 10 == 0:
            tar = webdataset.TarWriter(str(out / "images" / f"{number // 10:05d}.tar"))
        tar.write(sample(number, np.concatenate([picture, picture], axis=1) if number % 2 else picture, label))
        if number % 10 == 9:
            tar.close()
    written = write_encoders(out).model_dump(mode="json")
    config = {**written, **WANTED, **CAPTIONS}
    (out / "encode.yaml").write_text(yaml.safe_dump(config))
    encode(load(EncodeConfig, out / "encode.yaml"))
    assert main(["index", str(out / "images"), "--images", str(out / "encode.yaml")]) == 0
    write_train_config(out)
    return out


def sample(number: int, pixels: np.ndarray, label: int) -> dict[str, object]:
    """A sample as img2dataset writes it; one picture lies on its side, one is too small, one has no caption."""
    file, picture, exif = io.BytesIO(), Image.fromarray(pixels), Image.Exif()
    if number == 3:
        exif[0x0112] = 6
        picture = picture.transpose(Image.Transpose.ROTATE_90)
    if number == 4:
        picture = picture.resize((30, 30))
    picture.save(file, "PNG" if number % 5 == 2 else "JPEG", exif=exif)
    words = {"txt": digits.caption(label).encode(), "json": {"synthetic": f"number {label}"}}
    if number == 15:
        words = {"json": {"url": "x"}}
    return {"__key__": f"{number:09d}", "png" if number % 5 == 2 else "jpg": file.getvalue(), **words}


def losses(folder: Path, run_dir: Path, data: str, *settings: str) -> list[float]:
    overrides = [*SETTINGS, f"run_dir={run_dir}", f"data.path={folder / data}", *settings]
    assert main(["train", str(folder / "train.yaml"), *overrides]) == 0
    return [record["loss"] for record in read_metrics(run_dir / "metrics.jsonl")]


def test_the_index_is_that_of_the_encoded_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, encoded = Index.open(folder / "images"), Index.open(folder / "latents")
    assert raw.buckets == encoded.buckets
    assert [raw.key(row) for row in range(len(raw))] == [encoded.key(row) for row in range(len(encoded))]
    assert raw.layout == {"pixels": ("U8", (3,))}
    assert raw.made_by is not None
    assert encoded.made_by is not None
    same = ("vae", "text", "pipeline", "clip_length", "t5_length", "latents", "flip", "vae_compute")
    assert [raw.made_by[name] for name in same] == [encoded.made_by[name] for name in same]
    failures = [json.loads(line) for line in (folder / "latents" / "failures.jsonl").read_text().splitlines()]
    assert Counter(failure["reason"] for failure in failures) == {"too small": 1, "no caption": 1}
    assert main(["index", str(folder / "images"), "--images", str(folder / "encode.yaml")]) == 0
    said = capsys.readouterr().out
    assert "00000.tar: 00000__000000004: too small: 30 x 30 px" in said
    assert "18 samples in 2 shards, buckets 8x8 (9), 8x16 (9), 2 left out (1 x too small, 1 x no caption)" in said
    assert main(["index", str(folder / "images"), "--verify"]) == 0


@pytest.mark.parametrize("latents", ["posterior", "mean"])
def test_images_train_as_their_latents_do(folder: Path, tmp_path: Path, latents: str) -> None:
    data, raw = folder / "latents", folder / "images"
    if latents == "mean":
        data, raw = tmp_path / "latents", Path(shutil.copytree(raw, tmp_path / "images"))
        written = yaml.safe_load((folder / "encode.yaml").read_text())
        (tmp_path / "encode.yaml").write_text(yaml.safe_dump({**written, "latents": "mean", "flip": False}))
        encode(load(EncodeConfig, tmp_path / "encode.yaml", [f"out={data}"]))
        assert main(["index", str(raw), "--images", str(tmp_path / "encode.yaml")]) == 0
    expected = losses(folder, tmp_path / "stored", str(data))
    assert len(set(expected)) == 4
    assert losses(folder, tmp_path / "raw", str(raw)) == pytest.approx(expected, rel=1e-5)


def test_worlds_workers_and_stops_change_nothing(folder: Path, tmp_path: Path) -> None:
    alone = losses(folder, tmp_path / "alone", "images")
    two = losses(folder, tmp_path / "two", "images", "--nproc=2", "micro_batch=2", "engine.zero_stage=2")
    assert two == pytest.approx(alone, rel=1e-5)
    assert losses(folder, tmp_path / "workers", "images", "data.workers=2") == alone
    losses(folder, tmp_path / "stopped", "images", "steps=2")
    assert losses(folder, tmp_path / "stopped", "images") == alone


def test_a_run_on_images_shows_samples_and_exports(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    losses(folder, run, "images", "steps=1", "log.images_every_steps=1")
    assert [path.name for path in (run / "samples").iterdir()] == ["step-00000001.png"]
    drawn = ["--prompt", "a handwritten three", "--images", "1", "--solver-steps", "1"]
    assert main(["sample", str(run), *drawn, "--out", str(tmp_path / "a.png")]) == 0
    assert main(["export", str(run), str(tmp_path / "export")]) == 0
    assert main(["sample", str(tmp_path / "export"), *drawn, "--out", str(tmp_path / "b.png")]) == 0


def test_a_broken_image_costs_itself(folder: Path, tmp_path: Path) -> None:
    """It cannot be decoded, which its head does not tell."""
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    with webdataset.TarWriter(str(tmp_path / "images" / "00000.tar")) as tar:
        for number, picture in enumerate(noise):
            member = sample(number * 5, picture, number)
            tar.write({**member, "jpg": member["jpg"][:-900]} if number == 4 else member)  # type: ignore[index]
    index = ["index", str(tmp_path / "images"), "--images", str(folder / "encode.yaml")]
    assert main(index) == 0
    found = losses(folder, tmp_path / "run", str(tmp_path / "images"))
    assert all(0 < loss < 10 for loss in found)
    bad = read_metrics(tmp_path / "run" / "bad_samples.jsonl")
    assert {(sample["key"], sample["shard"]) for sample in bad} == {("00000__000000020", "00000.tar")}
    assert bad[0]["reason"].startswith("truncated image")


def test_what_cannot_work_says_so(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(command: list[str], why: str) -> None:
        capsys.readouterr()
        assert main(command) == 2
        (said,) = capsys.readouterr().err.splitlines()[-1:]
        assert why in said

    start = ["train", str(folder / "train.yaml"), *SETTINGS, f"run_dir={tmp_path / 'run'}"]
    raw, run = f"data.path={folder / 'images'}", tmp_path / "run"
    refused([*start, raw, "flow.coupling=paired"], "`paired` needs a dataset made by `fmscale reflow`")
    mixture = [{"path": str(folder / name), "weight": 1} for name in ("images", "latents")]
    mixed = [f"data.mixture={json.dumps(mixture)}", "data.path=null"]
    refused([*start, *mixed], "encode both with one config")
    assert main([*start, raw, "steps=1"]) == 0
    pairs = {"teacher": str(run), "data": {"path": str(folder / "images")}, "pairs": 2, "out": str(tmp_path / "pairs")}
    (tmp_path / "reflow.yaml").write_text(yaml.safe_dump(pairs))
    refused(["reflow", str(tmp_path / "reflow.yaml")], "holds images, pairs need captions")
    page = ["--html", str(tmp_path / "page.html")]
    refused(["inspect", str(folder / "images"), *page], "holds images that training encodes")
    refused(["index", str(tmp_path), "--images", str(folder / "encode.yaml")], "holds no *.tar")
    other = tmp_path / "other"
    shutil.copytree(folder / "images", other)
    written = yaml.safe_load((folder / "encode.yaml").read_text())
    for settings, why in (
        ({"buckets_px": None, "resolutions_px": [64, 128]}, "at one resolution; give one"),
        ({"latents": "sample"}, "give `posterior`, of which each step draws a sample, or `mean`"),
        ({"buckets_px": [[60, 60]]}, "bucket 60x60 px: the VAE needs multiples of 8 px"),
    ):
        (tmp_path / "encode.yaml").write_text(yaml.safe_dump({**written, **settings}))
        refused(["index", str(other), "--images", str(tmp_path / "encode.yaml")], why)
    (tmp_path / "encode.yaml").write_text(yaml.safe_dump({**written, "captions": {}}))
    assert main(["index", str(other), "--images", str(tmp_path / "encode.yaml")]) == 0
    refused([*start, f"data.path={other}"], "00000.tar has other content, or is indexed otherwise")
    mixture = [{"path": str(path), "weight": 1} for path in (folder / "images", other)]
    mixed = [f"data.mixture={json.dumps(mixture)}", "data.path=null", f"run_dir={tmp_path / 'mixed'}"]
    refused([*start, *mixed], "prepare images in different ways")


def test_a_vae_that_has_moved_is_asked_for(folder: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(folder / "images", tmp_path / "images"))
    manifest = data / "index" / "manifest.json"
    said = json.loads(manifest.read_text())
    vae = Path(said["made_by"]["vae"]["path"])
    said["made_by"]["vae"]["path"] = "/gone/vae"
    manifest.write_text(json.dumps(said))
    settings = [*SETTINGS, f"run_dir={tmp_path / 'run'}", f"data.path={data}"]
    with pytest.raises(UserError, match=r"/gone/vae: the VAE of the dataset is no longer there; .*: data\.vae=DIR"):
        train(load(TrainConfig, folder / "train.yaml", settings))
    assert not (tmp_path / "run").exists()
    found = [f"data.vae={vae}", "log.images_every_steps=1"]
    assert len(losses(folder, tmp_path / "run", str(data), "steps=1", *found)) == 1
    other = Path(shutil.copytree(vae, tmp_path / "vae"))
    weights = next(other.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="the weights are not those of the dataset's VAE"):
        train(load(TrainConfig, folder / "train.yaml", [*settings, f"data.vae={other}"]))
