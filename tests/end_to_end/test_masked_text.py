"""Training without sight of the text's padding: the same run however it is cut, drawn alike by stock diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from fmscale import digits
from fmscale.cli import main
from fmscale.config import EncodeConfig, ReflowConfig, check, load
from fmscale.data.index import Index
from fmscale.data.mixture import Address, Mixture
from fmscale.encode import encode
from fmscale.encoders.text import TRIM_TOKENS
from fmscale.engine.metrics import read_metrics
from fmscale.export import export
from fmscale.init_from import EXPORT_NOTE
from fmscale.pictures import Guidance, sample_latents
from fmscale.quickstart import write_encoders, write_train_config
from fmscale.reflow import reflow
from fmscale.runs import open_run
from fmscale.sample import open_generator

pytestmark = pytest.mark.slow

IMAGES, T5_TOKENS = 32, 80
SETTINGS = ["steps=4", "global_batch=32", "micro_batch=32", "engine.dtype=fp32", "ema.warmup=true"]
SETTINGS += ["optimizer.lr=0.02", "optimizer.warmup_steps=0", "conditioning.dropout=0.3", "data.workers=0"]
MASKED = "conditioning.text=masked"


def write_t5(folder: Path) -> Path:
    """A small T5 with random weights, which counts letters."""
    torch.manual_seed(0)
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((chr(97 + n), -1.0) for n in range(26))]
    T5Tokenizer(vocab=words, extra_ids=0).save_pretrained(folder)
    shape = {"d_model": 160, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    T5EncoderModel(T5Config(**shape, vocab_size=64, initializer_factor=4.0)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits under short and long captions, and three datasets of them: with T5, without, and with captions alone."""
    out = tmp_path_factory.mktemp("masked")
    split = digits.load_split()
    (out / "images").mkdir()
    pictures = zip(digits.enlarge(split.train_images[:IMAGES]), split.train_labels[:IMAGES], strict=True)
    for number, (picture, label) in enumerate(pictures):
        caption = digits.side_by_side_caption(label, label) if number % 3 else digits.caption(label)
        Image.fromarray(picture).save(out / "images" / f"{number:03d}.png")
        (out / "images" / f"{number:03d}.txt").write_text(caption)
    write_encoders(out)
    t5 = [f"text.t5={json.dumps({'path': str(write_t5(out / 'encoders' / 't5'))})}", f"text.t5_length={T5_TOKENS}"]
    encode(load(EncodeConfig, out / "encode.yaml", t5))
    encode(load(EncodeConfig, out / "encode.yaml", [f"out={out / 'clips'}"]))
    encode(load(EncodeConfig, out / "encode.yaml", [*t5, f"out={out / 'captions'}", "text.online=true"]))
    write_train_config(out)
    return out


def losses(folder: Path, run_dir: Path, data: str, *settings: str) -> list[float]:
    overrides = [*SETTINGS, f"run_dir={run_dir}", f"data.path={folder / data}", *settings]
    assert main(["train", str(folder / "train.yaml"), *overrides]) == 0
    return [record["loss"] for record in read_metrics(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize("data", ["latents", "clips"])
def test_one_run_however_it_is_cut(folder: Path, tmp_path: Path, data: str) -> None:
    """In micro-batches of 4 and of 32, and while it shows what it draws."""
    whole = losses(folder, tmp_path / "whole", data, MASKED)
    assert losses(folder, tmp_path / "cut", data, MASKED, "micro_batch=4") == pytest.approx(whole, rel=1e-5)
    assert losses(folder, tmp_path / "shown", data, MASKED, "log.images_every_steps=4") == whole
    assert (tmp_path / "shown" / "samples" / "step-00000004.png").is_file()
    padded = losses(folder, tmp_path / "padded", data)
    assert padded[-1] != pytest.approx(whole[-1], rel=1e-4)


def test_captions_train_as_stored_features_do(folder: Path, tmp_path: Path) -> None:
    for null in ("empty", "zeros"):
        stored, online = (
            losses(folder, tmp_path / null / data, data, MASKED, f"conditioning.null={null}")
            for data in ("latents", "captions")
        )
        assert online == pytest.approx(stored, rel=1e-5)


@pytest.mark.parametrize(("data", "null"), [("latents", "empty"), ("latents", "zeros"), ("clips", "empty")])
def test_the_model_card_s_lines_draw_the_same_latents(folder: Path, tmp_path: Path, data: str, null: str) -> None:
    """fmscale from the run, fmscale from the export, and the stock pipeline under what README.md says."""
    losses(folder, tmp_path / "run", data, MASKED, f"conditioning.null={null}", "ema.decays=[0.1]")
    export(open_run(tmp_path / "run"), tmp_path / "export", dtype="fp32")
    assert json.loads((tmp_path / "export" / EXPORT_NOTE).read_text())["text"] == "masked"
    card = (tmp_path / "export" / "README.md").read_text()
    assert "| text padding | never seen by the model" in card
    lines = card.split("```python\n")[1].split("```")[0].replace("PATH OF THIS FOLDER", str(tmp_path / "export"))
    known: dict[str, Any] = {}
    before, call = lines.replace("what the image shows", "a handwritten two").split("image = pipe(")
    exec(before, known)  # noqa: S102
    shape = open_generator(tmp_path / "run").latent_shape(64, 64)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    sigmas = [1.0, 0.7, 0.3]
    known |= {"asked": {"latents": noise, "sigmas": sigmas, "num_inference_steps": 3, "output_type": "latent"}}
    known["pipe"].set_progress_bar_config(disable=True)
    exec("image = pipe(**asked, " + call, known)  # noqa: S102
    times = known["pipe"].scheduler.sigmas.tolist()
    for source in (tmp_path / "run", tmp_path / "export"):
        generator = open_generator(source)
        assert generator.masked
        # With another prompt beside it, which may not make a difference.
        given = generator.condition(["a handwritten two", "a handwritten two above a handwritten three"])
        assert given.context.shape[1] % TRIM_TOKENS == 0 or data == "clips"
        nothing = generator.unconditional(["", ""])
        ours = sample_latents(generator.model, noise.expand(2, -1, -1, -1), times, given, nothing, Guidance(4.0))[0]
        assert (ours - known["image"]).abs().max().item() <= 1e-4
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "export")
    pipe.set_progress_bar_config(disable=True)
    padded = pipe("a handwritten two", height=64, width=64, guidance_scale=4.0, **known["asked"]).images[0]
    assert (padded - known["image"]).abs().max().item() > 1e-3


def test_pairs_keep_the_counts(folder: Path, tmp_path: Path) -> None:
    losses(folder, tmp_path / "run", "latents", MASKED)
    data = {"teacher": str(tmp_path / "run"), "data": {"path": str(folder / "latents")}, "out": str(tmp_path / "pairs")}
    reflow(check(ReflowConfig, {**data, "pairs": 6, "solver_steps": 2, "batch": 4, "guidance_scale": 2}, "test"))
    index = Index.open(tmp_path / "pairs")
    counts = [Mixture([index]).sample(Address(0, row)).read_meta()["tokens"] for row in range(6)]
    assert all(count.keys() == {"clip_l", "clip_g", "t5"} for count in counts)
    assert len({count["t5"] for count in counts}) > 1
    paired = [f"data.path={tmp_path / 'pairs'}", "flow.coupling=paired", "steps=1", "global_batch=4", "micro_batch=4"]
    assert len(losses(folder, tmp_path / "student", "pairs", MASKED, *paired)) == 1
