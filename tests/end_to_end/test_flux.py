"""FLUX from images to images through the commands, judged by stock diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import FluxPipeline
from PIL import Image
from tiny_t5 import write_t5
from torch import Tensor

from fmscale import digits
from fmscale.cli import main
from fmscale.data.index import Index
from fmscale.encoders.clip import random_clip
from fmscale.engine.metrics import read_metrics
from fmscale.init_from import EXPORT_NOTE
from fmscale.models import flux_names
from fmscale.models.flux import Flux
from fmscale.pictures import guidance_of, sample_latents
from fmscale.quickstart import bundled_vae
from fmscale.runs import open_run
from fmscale.sample import open_generator

pytestmark = pytest.mark.slow

CLIP_WIDTH, T5_WIDTH, T5_TOKENS = 24, 40, 24
MODEL: dict[str, Any] = {"family": "flux", "layers": 1, "single_layers": 1, "heads": 2, "head_dim": 16}
MODEL |= {"rope_dims": [4, 6, 6], "latent_channels": 4, "context_dim": T5_WIDTH, "pooled_dim": CLIP_WIDTH}
TOLD = "model.guidance_embed=true"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 12 digits whose text was encoded as FLUX takes it, and two runs of 4 steps: `plain` and `told`."""
    out = tmp_path_factory.mktemp("flux")
    split = digits.load_split()
    (out / "images").mkdir()
    for number, picture in enumerate(digits.enlarge(split.train_images[:12])):
        Image.fromarray(picture).save(out / "images" / f"{number:03d}.png")
        (out / "images" / f"{number:03d}.txt").write_text(digits.caption(split.train_labels[number]))
    random_clip(out / "clip_l", width=CLIP_WIDTH, layers=2, heads=2, projection_dim=16, max_length=16, seed=0)
    write_t5(out / "t5", T5_WIDTH)
    text = {"pipeline": "flux", "clip_l": {"path": str(out / "clip_l")}, "t5": {"path": str(out / "t5")}}
    encode = {"images": str(out / "images"), "out": str(out / "latents"), "vae": str(bundled_vae()), "dtype": "fp32"}
    encode |= {"text": {**text, "t5_length": T5_TOKENS}, "buckets_px": [[64, 64]], "workers": 0}
    train = {"steps": 4, "global_batch": 4, "micro_batch": 4, "data": {"path": str(out / "latents"), "workers": 0}}
    train |= {
        "model": {**MODEL, "base_size": 4},
        "engine": {"dtype": "fp32"},
        "optimizer": {"lr": 1e-2, "warmup_steps": 0},
    }
    train |= {"run_dir": str(out / "plain"), "checkpoint": {"every_steps": 2}, "ema": {"decays": [0.5]}}
    for name, config in (("encode", encode), ("train", train)):
        (out / f"{name}.yaml").write_text(yaml.safe_dump(config))
    assert main(["encode", str(out / "encode.yaml")]) == 0
    assert main(["train", str(out / "train.yaml"), "log.images_every_steps=4"]) == 0
    assert main(["train", str(out / "train.yaml"), f"run_dir={out / 'told'}", TOLD, "log.images_every_steps=4"]) == 0
    return out


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize(("name", "settings"), [("plain", []), ("told", [TOLD])])
def test_a_stopped_run_goes_on_as_if_it_had_not(folder: Path, tmp_path: Path, name: str, settings: list[str]) -> None:
    command = ["train", str(folder / "train.yaml"), f"run_dir={tmp_path / name}", *settings]
    assert main([*command, "steps=2"]) == 0
    assert main(command) == 0
    assert losses(tmp_path / name) == losses(folder / name)
    assert len(set(losses(folder / name))) == 4
    assert (folder / name / "samples" / "step-00000004.png").is_file()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """Grows by what each evaluation of a network is told about guidance."""
    calls: list[float | None] = []
    forward = Flux.forward

    def listening(self: Flux, *inputs: Tensor, guidance: Tensor | None = None) -> Tensor:
        calls.append(None if guidance is None else float(guidance[0]))
        return forward(self, *inputs, guidance=guidance)

    monkeypatch.setattr(Flux, "forward", listening)
    return calls


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("plain", ["--guidance-scale", "1"], [None] * 2),
        ("plain", ["--guidance-scale", "3.5"], [None] * 2),
        ("told", ["--guidance-scale", "3.5"], [3.5] * 2),
        ("told", ["--guidance-scale", "1", "--true-cfg-scale", "2"], [1.0] * 2),
    ],
)
def test_who_is_told_guidance_runs_once_a_step(
    folder: Path, tmp_path: Path, told: list[float | None], name: str, options: list[str], expected: list[float | None]
) -> None:
    picture = tmp_path / "samples.png"
    command = ["sample", str(folder / name), "--prompt", "a handwritten three", "--solver-steps", "2"]
    assert main([*command, "--images", "1", "--out", str(picture), *options]) == 0
    assert told == expected
    assert Image.open(picture).size[0] == 64 + 8


@pytest.mark.parametrize(("name", "scale", "true_cfg"), [("plain", 1.0, 1.0), ("told", 3.5, 1.0), ("told", 2.0, 3.0)])
def test_the_stock_pipeline_draws_the_same_latents(folder: Path, name: str, scale: float, true_cfg: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    run, generator = open_run(folder / name), open_generator(folder / name)
    torch.manual_seed(0)
    for parameter in generator.model.parameters():  # four steps have hardly opened a gate
        torch.nn.init.normal_(parameter, std=0.2)
    transformer = FluxTransformer2DModel(**flux_names.diffusers_config(_arguments(run.config.model.model_dump())))
    transformer.load_state_dict(flux_names.to_diffusers(generator.model.state_dict(), generator.model))
    clip, t5 = generator.text.by_role["clip_l"], generator.text.by_role["t5"]
    pipeline = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(),
        generator.vae.model,
        text_encoder=clip.model,
        tokenizer=clip.tokenizer,
        text_encoder_2=t5.model,
        tokenizer_2=t5.tokenizer,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    shape = generator.latent_shape(64, 128)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    prompts, sigmas = ["a handwritten seven", "a handwritten two"], [1.0, 0.8, 0.5, 0.2]
    theirs = pipeline(
        prompts,
        negative_prompt=["", ""] if true_cfg > 1 else None,
        true_cfg_scale=true_cfg,
        height=64,
        width=128,
        sigmas=sigmas,
        num_inference_steps=len(sigmas),
        guidance_scale=scale,
        latents=FluxPipeline._pack_latents(noise, 2, *shape),
        max_sequence_length=T5_TOKENS,
        output_type="latent",
    ).images
    theirs = FluxPipeline._unpack_latents(theirs, 64, 128, pipeline.vae_scale_factor)
    given, nothing = generator.condition(prompts), generator.unconditional(["", ""])
    guidance = guidance_of(scale, generator.takes_guidance, true_cfg)
    ours = sample_latents(generator.model, noise, [*sigmas, 0.0], given, nothing, guidance)
    assert (ours - theirs).abs().max().item() <= 1e-4
    assert (ours - noise).abs().max().item() > 0.1


def _arguments(model: dict[str, Any]) -> dict[str, Any]:
    return {name: model[name] for name in (*MODEL, "guidance_embed", "patch_size") if name != "family"}


@pytest.mark.parametrize(("name", "expected"), [("plain", [None] * 2), ("told", [2.5] * 2)])
def test_a_teacher_generates_pairs_that_train(
    folder: Path, tmp_path: Path, told: list[float | None], name: str, expected: list[float | None]
) -> None:
    config = {"teacher": str(folder / name), "data": {"path": str(folder / "latents")}, "out": str(tmp_path / "pairs")}
    config |= {"pairs": 4, "batch": 4, "solver_steps": 2, "guidance_scale": 2.5}
    (tmp_path / "reflow.yaml").write_text(yaml.safe_dump(config))
    assert main(["reflow", str(tmp_path / "reflow.yaml")]) == 0
    assert told == expected
    assert len(Index.open(tmp_path / "pairs")) == 4
    settings = [f"run_dir={tmp_path / 'student'}", f"data.path={tmp_path / 'pairs'}", "flow.coupling=paired", "steps=1"]
    assert main(["train", str(folder / "train.yaml"), *settings]) == 0


def test_what_cannot_be_done_is_said_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", str(folder / "plain"), "--prompt", "a", "--true-cfg-scale", "2"]
    assert main([*command, "--out", str(tmp_path / "out.png")]) == 2
    assert "--true-cfg-scale: the network of " in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("plain", []),
        ("told", []),
        ("zeros", ["conditioning.null=zeros", "flow.shift=flux"]),
        ("masked", ["conditioning.text=masked", "flow.shift=3.0"]),
    ],
)
def test_an_export_draws_the_same_latents_by_the_lines_of_its_card(
    folder: Path, tmp_path: Path, name: str, settings: list[str]
) -> None:
    """From the run, its export, what was imported of that, and by the stock pipeline with the exported scheduler."""
    run, out, prompt = folder / name, tmp_path / "out", "a handwritten three"
    if settings:
        assert main(["train", str(folder / "train.yaml"), f"run_dir={run}", "steps=2", *settings]) == 0
    assert main(["export", str(run), str(out), "--dtype", "fp32"]) == 0
    assert main(["import", str(out), str(tmp_path / "imported")]) == 0
    lines = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    asked: dict[str, Any] = {"latents": FluxPipeline._pack_latents(noise, *noise.shape), "output_type": "latent"}
    asked |= {"sigmas": [1.0, 2 / 3, 1 / 3], "num_inference_steps": 3}
    known: dict[str, Any] = {"ask": lambda *prompts, **options: known["pipe"](*prompts, **options, **asked)}
    lines = lines.replace("PATH OF THIS FOLDER", str(out)).replace("what the image shows", prompt)
    exec(lines.replace("image = pipe(", "image = ask("), known)  # noqa: S102
    theirs = FluxPipeline._unpack_latents(known["image"][None], 64, 64, 8)
    for source in (run, out, tmp_path / "imported"):
        generator = open_generator(source)
        guidance = guidance_of(1.0, generator.takes_guidance, 4.0) if name == "told" else guidance_of(4.0, False)
        ours = generator.draw(noise, [prompt], [""], guidance, steps=3)
        assert (ours - theirs).abs().max().item() <= 1e-4
    assert (theirs - noise).abs().max().item() > 0.05


def test_a_single_file_says_what_the_run_says(folder: Path, tmp_path: Path) -> None:
    """The names are judged by diffusers at its own width, in `test_single_file`; here with VAE and text beside them."""
    command = ["export", str(folder / "told"), str(tmp_path / "out"), "--form", "single"]
    assert main([*command, "--with", "vae", "text"]) == 0
    note = json.loads((tmp_path / "out" / EXPORT_NOTE).read_text())
    assert note["check"]["text"]["difference"] <= 1e-5
    lines = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(lines.replace("PATH OF THIS FOLDER", str(tmp_path / "out")), {})  # noqa: S102
    assert {"velocity", "latents", "image_levels", "text", "rounding"} < note["check"].keys()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda made: made["text"].pop("t5"), "was trained without t5, which FluxPipeline needs"),
        (lambda made: made["text"].pop("clip_l"), "was trained without clip_l, which FluxPipeline needs"),
        (lambda made: made.pop("pipeline"), "its text was encoded as for text.pipeline sd3"),
    ],
)
def test_text_that_the_pipeline_would_encode_otherwise_is_refused(
    folder: Path, tmp_path: Path, change: Any, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(folder / "plain", tmp_path / "run"))
    index = run / "checkpoints" / "step-00000004" / "index.json"
    found = json.loads(index.read_text())
    change(found["description"]["dataset"]["made_by"])
    index.write_text(json.dumps(found))
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_commands_that_look_at_runs_and_datasets_take_flux(folder: Path, tmp_path: Path) -> None:
    assert main(["checkpoints", str(folder / "told"), "--verify"]) == 0
    assert main(["inspect", str(folder / "latents"), "--html", str(tmp_path / "page.html")]) == 0
    assert main(["status", str(folder / "told")]) == 0
