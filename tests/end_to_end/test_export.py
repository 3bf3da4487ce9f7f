"""Exports of a small SD3 with everything around it, in each form, judged by stock diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, SD3Transformer2DModel
from open_clip.transformer import TextTransformer
from parity import draw_inputs
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_t5 import write_t5
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from fmscale import digits
from fmscale.cli import main
from fmscale.encoders.clip import random_clip
from fmscale.features import STORAGE
from fmscale.init_from import EXPORT_NOTE, open_source
from fmscale.models import mmdit_names
from fmscale.pictures import Guidance
from fmscale.runs import open_run
from fmscale.sample import open_generator

TOWER = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
MODEL = {"layers": 2, "heads": 2, "head_dim": 16, "latent_channels": 4, "context_dim": 40, "pooled_dim": 36}
MODEL |= {"pos_embed_max_size": 16, "base_size": 4, "qk_norm": True, "dual_attention_layers": [0]}
PROMPT = "a handwritten three"


def write_tower(folder: Path) -> dict[str, str]:
    """An open_clip text tower that open_clip knows by name; how an encode config gives it."""
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": TOWER}
    (folder / "tiny-for-export.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    tower = TextTransformer(**TOWER, output_dim=12, act_layer=nn.GELU)
    save_file(tower.state_dict(), folder / "tower.safetensors")
    return {"open_clip": "tiny-for-export", "checkpoint": str(folder / "tower.safetensors")}


def write_clip_l(folder: Path) -> None:
    """One that pools as SD3's does: without a projection."""
    random_clip(folder, width=24, layers=2, heads=2, projection_dim=24, max_length=16, seed=0)
    model = CLIPTextModelWithProjection.from_pretrained(folder)
    nn.init.eye_(model.text_projection.weight)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 steps, whose weights are far from where they began."""
    out = tmp_path_factory.mktemp("sd3")
    (out / "images").mkdir()
    split = digits.load_split()
    for number, picture in enumerate(digits.enlarge(split.train_images[:8])):
        Image.fromarray(picture).save(out / "images" / f"{number:03d}.png")
        (out / "images" / f"{number:03d}.txt").write_text(digits.caption(split.train_labels[number]))
    write_clip_l(out / "clip_l")
    write_t5(out / "t5", MODEL["context_dim"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    torch.manual_seed(0)
    AutoencoderKL(**blocks, block_out_channels=[8, 8, 16, 16], norm_num_groups=4).save_pretrained(out / "vae")
    text = {"clip_l": {"path": str(out / "clip_l")}, "clip_g": write_tower(out), "t5": {"path": str(out / "t5")}}
    encode = {"images": str(out / "images"), "out": str(out / "latents"), "vae": str(out / "vae"), "dtype": "fp32"}
    encode |= {"text": {**text, "t5_length": 24}, "buckets_px": [[64, 64]], "workers": 0}
    train = {"run_dir": str(out / "run"), "steps": 3, "global_batch": 4, "micro_batch": 4, "model": MODEL}
    train |= {"data": {"path": str(out / "latents"), "workers": 0}, "engine": {"dtype": "fp32"}}
    train |= {"optimizer": {"lr": 0.05, "warmup_steps": 0}, "ema": {"decays": [0.5]}, "flow": {"shift": 2.0}}
    for name, config in (("encode", encode), ("train", train)):
        (out / f"{name}.yaml").write_text(yaml.safe_dump(config))
        assert main([name, str(out / f"{name}.yaml")]) == 0
    return out / "run"


def note(folder: Path) -> dict[str, Any]:
    return json.loads((folder / EXPORT_NOTE).read_text())


@torch.no_grad()
def velocities(run: Path, network: Any) -> tuple[Tensor, Tensor]:
    """Of the run's averaged weights, and of a stock network."""
    torch.manual_seed(1)
    inputs = {name: value.detach() for name, value in draw_inputs(MODEL, (8, 12), 7).items()}
    t = torch.tensor([0.9, 0.2])
    ours = open_run(run).model("ema")(inputs["latents"], t, inputs["context"], inputs["pooled"])
    given = (value.to(network.dtype) for value in inputs.values())
    return ours, network(*given, (1000 * t).to(network.dtype)).sample.float()


def card_lines(folder: Path) -> str:
    """The lines of README.md that run."""
    card = (folder / "README.md").read_text()
    return card.split("```python\n")[1].split("```")[0].replace("PATH OF THIS FOLDER", str(folder))


def test_a_single_file_with_everything_draws_the_same_latents(run: Path, tmp_path: Path) -> None:
    """By the lines of its README.md, which read VAE and all three text encoders from the file."""
    out = tmp_path / "everything"
    command = ["export", str(run), str(out), "--form", "single", "--with", "vae", "text", "--dtype", "fp32"]
    assert main([*command, "--license", "apache-2.0"]) == 0
    assert note(out)["check"]["read_by"] == "SD3Transformer2DModel.from_single_file"
    prefixes = {".".join(name.split(".")[:2]) for name in load_file(out / "everything.safetensors")}
    assert prefixes >= {"model.diffusion_model", "first_stage_model.decoder", "text_encoders.t5xxl"}
    lines = card_lines(out)
    assert "from_single_file" in lines
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = {"latents": noise, "num_inference_steps": 3, "output_type": "latent", "sigmas": [1.0, 2 / 3, 1 / 3]}
    known: dict[str, Any] = {"ask": lambda *prompts, **options: known["pipe"](*prompts, **options, **asked)}
    lines = lines.replace("what the image shows", PROMPT).replace("image = pipe(", "image = ask(")
    exec(lines, known)  # noqa: S102
    generator = open_generator(run)
    ours = generator.draw(noise, [PROMPT], [""], Guidance(4.0), steps=3)[0]
    assert (ours - known["image"]).abs().max().item() <= 1e-4
    assert (ours - noise[0]).abs().max().item() > 0.1
    pixels = known["pipe"].vae.decode(ours[None] / known["pipe"].vae.config.scaling_factor).sample.clamp(-1, 1)
    assert (generator.vae.decode(ours[None]) - pixels).abs().max().item() <= 1e-5
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card.split("---")[1]
    assert "| training loss | " in card


@pytest.mark.parametrize(
    ("form", "dtype", "bound", "options"),
    [
        ("pipeline", "bf16", 0.05, ["--shard-gb", "0.0001"]),
        ("transformer", "fp16", 0.01, ["--weights", "ema"]),
        ("transformer", "fp32", 0.0, ["--shard-gb", "0.0001"]),
        ("single", "bf16", 0.05, []),
        ("single", "fp32", 0.0, ["--with", "vae"]),
    ],
)
def test_stock_networks_say_what_the_run_says(
    run: Path, tmp_path: Path, form: str, dtype: str, bound: float, options: list[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--form", form, "--dtype", dtype, *options]) == 0
    if form == "single":
        read = SD3Transformer2DModel.from_single_file(
            str(out / "out.safetensors"), config=str(out), subfolder="transformer", local_files_only=True
        )
    else:
        place = out / "transformer" if form == "pipeline" else out
        read = SD3Transformer2DModel.from_pretrained(place)
        assert (len(list(place.glob("*.safetensors"))) > 1) == ("--shard-gb" in options)
    ours, theirs = velocities(run, read.float())
    assert (ours - theirs).abs().max().item() <= 1e-5 + bound * ours.abs().max().item()
    assert ours.abs().max().item() > 0.1
    found = note(out)["check"]
    assert found["velocity"]["difference"] <= found["velocity"]["bound"] == 1e-5
    assert ("rounding" in found) == (dtype != "fp32")
    opened, stored = open_run(run), STORAGE[dtype]
    source = open_source(out / "out.safetensors" if form == "single" else out, opened.config.model.model_dump())
    for name, value in opened.state("ema").items():  # a run that starts from it has the weights as they were stored
        assert torch.equal(source.read(name, 0, value.numel()), value.flatten().to(stored).float()), name
    if form != "pipeline":
        exec(card_lines(out), {})  # noqa: S102
        assert main(["sample", str(out), "--prompt", PROMPT, "--out", str(tmp_path / "a.png")]) == 2


def test_an_open_clip_tower_becomes_a_folder_that_says_the_same(run: Path, tmp_path: Path) -> None:
    """So does every other encoder: an export draws by itself, without what made the data."""
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--dtype", "fp32"]) == 0
    assert CLIPTextModelWithProjection.from_pretrained(out / "text_encoder_2").config.hidden_size == TOWER["width"]
    assert main(["import", str(out), str(tmp_path / "imported")]) == 0
    captions = [PROMPT, "", "many words " * 30]
    places = (run, out, tmp_path / "imported")
    of_run, of_export, of_import = (open_generator(place).text.encode(captions) for place in places)
    assert of_run.keys() == of_export.keys() == of_import.keys() >= {"clip_g", "clip_g_pooled", "t5"}
    for name, value in of_run.items():
        assert (of_export[name] - value).abs().max().item() <= 1e-5, name
        assert torch.equal(of_export[name], of_import[name])
    assert note(out)["check"]["text"]["difference"] <= 1e-5


def test_the_card_tells_the_newest_validation_of_these_weights(run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    kinds = [(1, "ema_0.5", 0.9), (3, "raw", 0.3), (3, "ema_0.5", 0.25), (4, "ema_0.5", 0.1)]
    records = [{"step": step, "weights": kind, "loss": loss, "images": 1200} for step, kind, loss in kinds]
    (copied / "validation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for weights, loss in (("ema", 0.25), ("raw", 0.3)):
        out = tmp_path / weights
        assert main(["export", str(copied), str(out), "--form", "transformer", "--weights", weights]) == 0
        assert f"| validation loss | {loss:.4f} of 1,200 images at step 3 |" in (out / "README.md").read_text()


def test_weights_under_wrong_names_leave_no_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Queries and keys have one shape; only what the network says tells that they were exchanged."""
    monkeypatch.setitem(mmdit_names.DIFFUSERS_BLOCK, "image.qkv.linear", ("attn.to_k", "attn.to_q", "attn.to_v"))
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--form", "transformer"]) == 1
    assert "does not say what the run says" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_cannot_hold_the_weights_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first step of AdamW moves every weight by the rate: beyond what fp16 can say, and bf16 can."""
    large, command = tmp_path / "large", ["train", str(run.parent / "train.yaml"), "steps=1", "ema.decays=[]"]
    assert main([*command, f"run_dir={large}", "optimizer.lr=1e5"]) == 0
    export = ["export", str(large), str(tmp_path / "out"), "--form", "transformer", "--weights", "raw"]
    assert main([*export, "--dtype", "fp16"]) == 2
    assert "float16 is too coarse for these weights" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def damage(run: Path, what: str) -> None:
    """What may be wrong with a run directory."""
    checkpoint = run / "checkpoints" / "step-00000003"
    partition = next(checkpoint.glob("*.safetensors"))
    if what == "a flipped byte":
        content = bytearray(partition.read_bytes())
        head = 8 + int.from_bytes(content[:8], "little")
        content[head + json.loads(content[8:head])["ema_0.5/proj_out.bias"]["data_offsets"][0]] ^= 1
        partition.write_bytes(content)
    elif what == "a missing partition":
        partition.unlink()
    elif what == "the config of another model":
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["model"]["heads"] = 4
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    else:
        index = json.loads((checkpoint / "index.json").read_text())
        index["description"]["config"]["model"]["layers"] = 3
        (checkpoint / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ("a flipped byte", "damaged: the checksum of ema_0.5/proj_out.bias differs"),
        ("a missing partition", "missing or cut short"),
        ("the config of another model", "config.yaml: is of another model than"),
        ("another config in the checkpoint", "index.json: is of another model than"),
    ],
)
def test_what_is_damaged_is_refused(
    run: Path, tmp_path: Path, what: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    damage(copied, what)
    assert main(["export", str(copied), str(tmp_path / "out"), "--form", "transformer", "--step", "3"]) == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--with", "vae"], "--with: says what goes into a single file, and --form is pipeline"),
        (["--form", "single", "--shard-gb", "1"], "--shard-gb: a single file is one file"),
        (["--form", "transformer", "--vae", "vae"], "--vae: this export holds no such network"),
        (["--push", "nobody"], "'nobody' is no repository on the hub"),
        (["--push", "some/model"], "--push: set HF_TOKEN"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    run: Path,
    tmp_path: Path,
    options: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["export", str(run), str(tmp_path / "out"), *options]) == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_export_is_uploaded_only_when_asked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Offline, the hub's client itself refuses, in one line without the token, and the folder stays."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    command = ["export", str(run), "OUT", "--form", "transformer"]
    assert main([*command[:2], str(tmp_path / "offline"), *command[3:], "--push", "some/model"]) == 1
    said = capsys.readouterr().err
    assert "is whole, but it did not get to some/model" in said.splitlines()[-1]
    assert "hf_secret" not in said
    assert (tmp_path / "offline" / EXPORT_NOTE).is_file()
    calls: list[tuple[str, Any]] = []
    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "create_repo", lambda self, name, **rest: calls.append((name, rest["private"])))
    monkeypatch.setattr(api, "upload_folder", lambda self, **rest: calls.append((rest["repo_id"], rest["folder_path"])))
    assert main([*command[:2], str(tmp_path / "kept"), *command[3:]]) == 0
    assert not calls
    assert main([*command[:2], str(tmp_path / "sent"), *command[3:], "--push", "some/model"]) == 0
    assert calls == [("some/model", True), ("some/model", tmp_path / "sent")]
