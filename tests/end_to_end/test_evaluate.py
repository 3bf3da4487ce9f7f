"""`fmscale evaluate` on a run that was just trained: real networks, real files, small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from random_inception import random_inception
from safetensors.torch import save_file
from tiny_clip import write_clip

from fmscale.cli import main
from fmscale.config import DataConfig, TrainConfig, load
from fmscale.data.index import Index
from fmscale.data.index_build import build_index
from fmscale.dataset import open_mixture
from fmscale.evaluate import read_pictures
from fmscale.files import read_records
from fmscale.judging import Settings, trace
from fmscale.pictures import Guidance
from fmscale.sample import open_generator
from fmscale.train import train

pytestmark = pytest.mark.slow

IMAGES = 8
QUICK = ["--steps", "1", "4", "--trace-steps", "8", "--guidance-scale", "2"]


def part_of(chain: Path, folder: Path, held_out: bool) -> Path:
    """Two of the three buckets of the chain's dataset, which are held out, or the third."""
    for file in chain.glob("latents/*.tar"):
        if ("-8x16-" not in file.name) == held_out:
            shutil.copy(file, folder)
    shutil.copy(chain / "latents" / "null.safetensors", folder)
    build_index(folder, Index.open(chain / "latents").made_by)
    return folder


@pytest.fixture(scope="module")
def held_out(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return part_of(chain, tmp_path_factory.mktemp("held_out"), held_out=True)


@pytest.fixture(scope="module")
def run(chain: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, with the loss on what is held out."""
    run_dir = tmp_path_factory.mktemp("evaluated") / "run"
    data = part_of(chain, tmp_path_factory.mktemp("trained_on"), held_out=False)
    overrides = [
        f"run_dir={run_dir}",
        f"data.path={data}",
        "seed=3",
        "steps=3",
        "global_batch=8",
        "micro_batch=8",
        "engine.dtype=fp32",
    ]
    overrides += ["optimizer.warmup_steps=1", "optimizer.lr=0.01"]  # else the network would hardly move
    overrides.append(f"validation={{path: {held_out}, every_steps: 3, images: {IMAGES}}}")
    train(load(TrainConfig, chain / "train.yaml", overrides))
    return run_dir


def evaluate(source: Path, data: Path, out: Path, *options: str) -> dict[str, Any]:
    command = ["evaluate", source, "--data", data, "--out", out, "--images", IMAGES, *QUICK, *options]
    assert main([str(word) for word in command]) == 0
    return json.loads((out / "evaluation.json").read_text())


def numbers(validation: dict[str, Any]) -> list[float]:
    by_t = [-1 if loss is None else loss for loss in validation["loss_by_t"]]
    return [validation["loss"], *by_t, *validation["loss_by_bucket"].values(), validation["images"]]


def test_all_figures_of_a_run(run: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss is what training has measured, in other batches; the rest is there, in files and in the table."""
    save_file(random_inception(1008), tmp_path / "i.safetensors")
    clip = write_clip(tmp_path / "clip")
    out = tmp_path / "evaluation"
    record = evaluate(run, held_out, out, "--inception", str(tmp_path / "i.safetensors"), "--clip", str(clip))
    trained = {entry["weights"]: entry for entry in read_records(run / "validation.jsonl")}
    images = record["dataset"]["images"]
    assert record["source"] == {"path": str(run), "kind": "run", "step": 3, "weights": "ema_0.99"}
    assert record["dataset"]["fingerprint"] == Index.open(held_out).fingerprint
    assert record["dataset"]["trained_on"] is False
    assert numbers(record["validation"]) == pytest.approx(numbers(trained["ema_0.99"]), rel=1e-6)
    assert [row["evaluations"] for row in record["by_steps"]] == [2, 8]  # with guidance
    few, many = (row["relative_error"] for row in record["by_steps"])
    assert 0 < many < few / 2
    assert 0 < record["trajectories"]["straightness"]["mean"] <= 1
    for row in record["by_steps"]:
        for judge in ("inception", "clip"):
            assert 0 <= row[judge]["precision"] <= 1
            assert row[judge]["kid"] is not None
        assert row["inception"]["fid"] is None
        assert row["clip"]["fid"] > 0
        assert 0 <= row["clip_score"] <= 100
    assert record["left_out"] == [
        f"FID by inception: its 2048 features need more images than the {images} here; KID needs no more"
    ]
    files = {path.name for path in out.iterdir()}
    assert files == {"evaluation.json", "samples.png", "steps.png", "straightness.png", "loss.png"}
    for name in files - {"evaluation.json"}:
        assert min(Image.open(out / name).size) > 200
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"loss {trained['ema_0.99']['loss']:.4f} on {images} images, ema_0.99 weights"
    heads = [line.split()[1:] for line in said if line.split()[0] == "steps"]
    measures = ["FID", "KID", "precision", "recall"]
    judged = [[word for measure in measures for word in (name, measure)] for name in ("Inception", "CLIP")]
    assert heads == [["evaluations", "error", "CLIP", "score"], *judged]
    assert [line.split()[0] for line in said[-2:]] == ["1", "4"]


def test_figures_do_not_depend_on_the_batch(run: Path, held_out: Path, tmp_path: Path) -> None:
    record = evaluate(run, held_out, tmp_path / "out", "--weights", "raw", "--batch", "5")
    (trained,) = (entry for entry in read_records(run / "validation.jsonl") if entry["weights"] == "raw")
    assert record["source"]["weights"] == "raw"
    assert numbers(record["validation"]) == pytest.approx(numbers(trained), rel=1e-6)
    generator, mixture = open_generator(run, weights="raw"), open_mixture(DataConfig(path=str(held_out)))
    pictures, _ = read_pictures(mixture, IMAGES)
    settings = Settings((1, 4), "euler", Guidance(2.0), seed=3, batch=16, trace_steps=8)
    traces, _ = trace(generator, mixture, pictures, settings)
    ours, theirs = (found["straightness"]["by_image"] for found in (record["trajectories"], traces.record()))
    assert ours == pytest.approx(theirs, rel=1e-5)
    for row in record["by_steps"]:
        assert row["relative_error"] == pytest.approx(traces.by_steps()[row["steps"]]["relative_error"], rel=1e-4)


def test_an_export_has_no_loss(chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = evaluate(chain / "export", chain / "latents", tmp_path / "out")
    assert record["source"]["step"] == 6
    assert record["dataset"]["trained_on"] is True
    assert record["validation"] is None
    assert record["left_out"][0].startswith("the loss: an exported folder does not say how it was trained")
    assert not (tmp_path / "out" / "loss.png").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--solver", "dopri5"], "--solver: dopri5 chooses its own steps"),
        (["--guidance-interval", "0.9", "0.1"], "guidance: the interval of t must be two numbers that rise"),
        (["--inception", "weights.pth"], "weights.pth: not a .safetensors file; only safetensors are read"),
        (["--clip", "nowhere"], "nowhere: no open_clip model"),
        (["--step", "77"], "77"),
    ],
)
def test_mistakes_are_told_in_one_line(
    run: Path, held_out: Path, tmp_path: Path, options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["evaluate", str(run), "--data", str(held_out), "--out", str(out), *options]) == 2
    said = capsys.readouterr().err.splitlines()
    assert complaint in said[-1]
    assert not list(tmp_path.iterdir())


def test_what_does_not_belong_together_is_refused(
    run: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(held_out, tmp_path / "other"))
    made_by = Index.open(held_out).made_by or {}
    build_index(other, {**made_by, "vae": {**made_by["vae"], "scale": 3.0}})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "evaluation.json").write_text("{}")
    clip = str(write_clip(tmp_path / "clip"))
    for data, out, options, complaint in (
        (other, "out", [], "were not made by the same VAE and text encoders"),
        (held_out, "full", [], "exists already"),
        (held_out, "out", ["--clip", clip, "--images", "2"], "images are too few to compare; give 6 or more"),
    ):
        assert main(["evaluate", str(run), "--data", str(data), "--out", str(tmp_path / out), *options]) == 2
        assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
