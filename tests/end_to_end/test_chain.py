"""Images -> encode -> train -> export, small, through the real functions, judged by stock diffusers."""

from __future__ import annotations

import itertools
import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fmscale.cli import main
from fmscale.config import EncodeConfig, ReflowConfig, TrainConfig, check, load, merge, parse_overrides
from fmscale.data.index import Index
from fmscale.data.index_build import build_index
from fmscale.data.shards import ShardWriter
from fmscale.dataset import making, open_mixture
from fmscale.encode import encode
from fmscale.encoders.text import expand
from fmscale.engine.metrics import read_metrics
from fmscale.errors import UserError
from fmscale.export import export
from fmscale.gallery import sound_samples
from fmscale.init_from import EXPORT_NOTE
from fmscale.pictures import Guidance, sample_latents
from fmscale.reflow import reflow
from fmscale.runs import open_run
from fmscale.sample import open_generator
from fmscale.train import train


def test_a_broken_image_is_named_and_skipped(chain: Path) -> None:
    failures = [json.loads(line) for line in (chain / "latents" / "failures.jsonl").read_text().splitlines()]
    assert [(failure["key"], failure["reason"]) for failure in failures] == [("broken", "not an image")]


def test_the_pipeline_draws_the_same_latents(chain: Path) -> None:
    """Same prompt embeddings, noise and sigmas: fmscale from the run, fmscale from the export, diffusers."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(chain / "export")
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a handwritten seven", "a handwritten two above a handwritten one"]
    noise = torch.randn(2, pipeline.vae.config.latent_channels, 16, 8, generator=torch.Generator().manual_seed(0))
    sigmas = [1.0, 0.8, 0.5, 0.2]
    theirs = pipeline(
        prompts,
        height=128,
        width=64,
        sigmas=sigmas,
        num_inference_steps=len(sigmas),
        guidance_scale=3.0,
        latents=noise,
        output_type="latent",
    ).images
    visited = [*pipeline.scheduler.sigmas.tolist()]
    for source in (chain / "run", chain / "export"):
        generator = open_generator(source)
        given, nothing = generator.condition(prompts), generator.unconditional(["", ""])
        embeddings = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        assert torch.allclose(expand(given).context, embeddings[0], atol=1e-5)
        assert torch.allclose(given.pooled, embeddings[2], atol=1e-5)
        ours = sample_latents(generator.model, noise, visited, given, nothing, Guidance(3.0))
        assert (ours - theirs).abs().max().item() <= 1e-4


@pytest.mark.slow
def test_a_run_shows_what_it_draws(chain: Path, tmp_path: Path) -> None:
    """One rank or two, under any stage, of captions or prompts, the same images; and the training is none the wiser."""
    mixture = open_mixture(load(TrainConfig, chain / "train.yaml").data)
    largest = max(mixture.buckets, key=lambda bucket: bucket.count)
    captions = [sample.read_meta()["caption"] for sample in islice(sound_samples(mixture, largest), 4)]
    prompts = f"log.prompts={json.dumps(captions)}"
    shows = {
        "one": ["engine.zero_stage=1", "log.images_every_steps=2"],
        "two": ["engine.zero_stage=3", "log.images_every_steps=4", prompts, "--nproc=2"],
        "none": ["engine.zero_stage=1"],
    }
    losses = {}
    for name, settings in shows.items():
        common = [f"run_dir={tmp_path / name}", "steps=4", "micro_batch=4", "log.tensorboard=true"]
        assert main(["train", str(chain / "run" / "config.yaml"), *common, *settings]) == 0
        losses[name] = [record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl")]
    assert losses["one"] == losses["none"]
    assert losses["two"] == pytest.approx(losses["none"], rel=1e-6)
    sheets = {name: sorted((tmp_path / name / "samples").glob("*.png")) for name in ("one", "two")}
    assert [path.name for path in sheets["one"]] == ["step-00000002.png", "step-00000004.png"]
    first, last = (np.asarray(Image.open(path)).astype(int) for path in sheets["one"])
    assert first.shape[1] == 4 * (64 + 8)
    assert (first != last).any()
    averaged, raw = np.split(last, 2)
    assert (averaged[20:] != raw[20:]).any()  # below the titles
    halves = np.split(np.asarray(Image.open(sheets["two"][0])).astype(int), 2)
    for ours, theirs in zip(halves, (averaged, raw), strict=True):  # the first row of each
        assert np.abs(ours - theirs[: len(ours)]).max() <= 1
    assert not (tmp_path / "none" / "samples").exists()
    events = EventAccumulator(str(tmp_path / "one" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [2, 4]


def test_images_without_the_vae_are_refused(chain: Path, tmp_path: Path) -> None:
    latents = Path(shutil.copytree(chain / "latents", tmp_path / "latents"))
    made_by = Index.open(latents).made_by
    assert made_by is not None
    build_index(latents, {**made_by, "vae": {**made_by["vae"], "path": "/moved/vae"}})
    overrides = [f"run_dir={tmp_path / 'run'}", f"data.path={latents}", "log.images_every_steps=1"]
    with pytest.raises(UserError, match=r"log\.images_every_steps: the VAE that made .* is no longer at /moved/vae"):
        train(load(TrainConfig, chain / "train.yaml", overrides))
    shutil.rmtree(latents / "index")
    text = {role: {**made, "source": {"path": f"/moved/{role}"}} for role, made in made_by["text"].items()}
    build_index(latents, {**made_by, "text": text})
    asked = r"/moved/clip_l: clip_l of the dataset is no longer there; give its folder: data\.text_encoders\.clip_l=DIR"
    with pytest.raises(UserError, match=asked):
        train(load(TrainConfig, chain / "train.yaml", [*overrides, "log.prompts=[a handwritten two]"]))
    assert not (tmp_path / "run").exists()


def test_an_average_of_any_width_is_exported(chain: Path, tmp_path: Path) -> None:
    """Of the newest step, and of one that has a snapshot and no checkpoint."""
    for options, step in (([], 6), (["--step", "4"], 4)):
        out = tmp_path / str(step)
        assert main(["export", str(chain / "run"), str(out), "--ema-std", "0.08", "--dtype", "fp32", *options]) == 0
        exported, made = open_generator(out).model.state_dict(), open_run(chain / "run", step, 0.08).state(0.08)
        assert all(torch.equal(exported[name], value) for name, value in made.items())
        assert f"ema_sigma_0.08 of step {step}" in (out / "README.md").read_text()


@pytest.mark.parametrize("width", ["0", "0.28", "wide"])
def test_a_width_that_cannot_be_is_refused(chain: Path, width: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["export", str(chain / "run"), "out", "--ema-std", width])
    assert left.value.code == 2
    assert "--ema-std: must be" in capsys.readouterr().err


def test_another_vae_is_refused(chain: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    other = AutoencoderKL(**blocks, block_out_channels=[8] * 4, norm_num_groups=4, latent_channels=8)
    other.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="not the VAE that made the dataset: channels 8 instead of 4"):
        export(open_run(chain / "run"), tmp_path / "export", vae=str(tmp_path / "vae"))
    assert not (tmp_path / "export").exists()


def test_what_exists_is_not_overwritten(chain: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        export(open_run(chain / "run"), chain / "export")
    with pytest.raises(UserError, match="images exists already"):
        encode(load(EncodeConfig, chain / "encode.yaml", [f"out={chain / 'images'}"]))


def test_a_dataset_that_is_finished_is_left_alone(chain: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in (chain / "latents").rglob("*")}
    (chain / "latents" / "unfinished" / "done").mkdir(parents=True)  # by a worker that was killed as it cleared up
    assert len(encode(load(EncodeConfig, chain / "encode.yaml"))) == 24
    assert {path: path.stat().st_mtime_ns for path in (chain / "latents").rglob("*")} == files


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("dtype=bf16", r'config\.dtype was "fp32", and is "bf16"'),
        ("buckets_px=[[64, 64]]", r"config\.buckets_px was \[\[64, 64\], \[64, 128\], \[128, 64\]\], and is"),
        ("shard_samples=9", r"config\.shard_samples was 1000, and is 9"),
        ("vae=vae", r'config\.vae was ".*digits_vae", and is "vae"'),
        ("text.t5_length=77", r"config\.text\.t5_length was 256, and is 77"),
    ],
)
def test_a_dataset_is_not_gone_on_with_otherwise(chain: Path, override: str, complaint: str) -> None:
    with pytest.raises(UserError, match=f"latents was begun otherwise: {complaint}"):
        encode(load(EncodeConfig, chain / "encode.yaml", [override]))


def test_the_manifest_tells_what_became_of_the_images(chain: Path) -> None:
    manifest = json.loads((chain / "latents" / "manifest.json").read_text())
    index = Index.open(chain / "latents")
    assert manifest["fingerprint"] == index.fingerprint
    assert manifest["buckets"] == {"8x8": 12, "8x16": 6, "16x8": 6}
    assert list(manifest["failures"].values()) == [1]
    assert manifest["job"]["made_by"] == making(index.made_by)
    assert not (chain / "latents" / "unfinished").exists()


def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless it was asked for by its step; then nothing is written."""
    run = open_run(chain / "run")
    file = next(run.checkpoint.path.glob("*.safetensors"))
    content = file.read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    place = head + json.loads(content[8:head])[f"{run.weight_kind('ema')}/proj_out.bias"]["data_offsets"][0]
    command = ["export", str(chain / "run"), str(tmp_path / "export")]
    try:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match=r"partition-00000-of-00001\.safetensors: damaged"):
            export(run, tmp_path / "export")
        assert main([*command, "--step", "6"]) == 2
        assert not (tmp_path / "export").exists()
        capsys.readouterr()
        assert open_run(chain / "run").checkpoint.step == 3
        assert main(command) == 0
    finally:
        file.write_bytes(content)
    said = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert len(said) == 2  # by `open_run`, and by the command
    assert all(str(file) in line for line in said)
    assert json.loads((tmp_path / "export" / EXPORT_NOTE).read_text())["step"] == 3


def test_pairs_train(chain: Path, tmp_path: Path) -> None:
    data: dict[str, Any] = {
        "teacher": str(chain / "run"),
        "data": {"path": str(chain / "latents")},
        "out": str(tmp_path / "pairs"),
        "pairs": 9,
        "solver_steps": 2,
        "batch": 4,
    }
    index = reflow(check(ReflowConfig, data, "test"))
    assert len(index) == 9
    source = load(TrainConfig, chain / "train.yaml").model_dump(mode="json")
    overrides = [
        f"run_dir={tmp_path / 'student'}",
        f"data.path={tmp_path / 'pairs'}",
        "flow.coupling=paired",
        "steps=1",
    ]
    train(check(TrainConfig, merge(source, parse_overrides([*overrides, "global_batch=4"])), "test"))
    assert (tmp_path / "student" / "checkpoints" / "step-00000001").is_dir()


def test_every_command_that_succeeds_exits_with_zero(chain: Path, tmp_path: Path) -> None:
    """Through the command line, as a user calls them."""
    pairs = ["data.path=" + str(chain / "latents"), "pairs=2", "solver_steps=2"]
    commands = [
        ["encode", chain / "encode.yaml", f"out={tmp_path / 'latents'}"],
        ["index", tmp_path / "latents"],
        ["index", tmp_path / "latents", "--verify"],
        ["index", tmp_path / "latents", "--repair"],
        ["inspect", tmp_path / "latents", "--html", tmp_path / "page.html"],
        ["train", chain / "train.yaml", f"run_dir={tmp_path / 'run'}", "steps=1", "global_batch=2", "micro_batch=2"],
        ["sample", chain / "run", "--prompt", "a handwritten one", "--images", "1", "--out", tmp_path / "run.png"],
        [
            "sample",
            chain / "export",
            "--prompt",
            "a handwritten one",
            "--images",
            "1",
            "--out",
            tmp_path / "export.png",
        ],
        ["export", chain / "run", tmp_path / "export"],
        ["reflow", "configs/reflow.yaml", f"teacher={chain / 'run'}", f"out={tmp_path / 'pairs'}", *pairs],
    ]
    for command in commands:
        assert main([str(part) for part in command]) == 0, command
    sizes = {Image.open(tmp_path / name).size for name in ("run.png", "export.png")}
    assert sizes == {(72, 117)}


def test_prompts_of_a_file_are_drawn_by_several_numbers_of_steps(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two prompts, three images of each, a strip of two numbers of steps for each; in batches as all at once."""
    (tmp_path / "prompts.txt").write_text("a handwritten one\n\na handwritten two\n")
    sample = ["sample", str(chain / "run"), "--images", "3", "--solver-steps", "1", "3", "--prompts"]
    sheets = []
    for batch in ("2", "3"):
        out = tmp_path / f"{batch}.png"
        assert main([*sample, str(tmp_path / "prompts.txt"), "--batch", batch, "--out", str(out)]) == 0
        sheets.append(np.asarray(Image.open(out)).astype(int))
    assert sheets[0].shape[1] == 2 * (64 + 8)
    assert np.abs(sheets[0] - sheets[1]).max() <= 1
    strips = np.split(sheets[0], 6)
    assert all((one[:64] != other[:64]).any() for one, other in itertools.pairwise(strips))
    assert all((strip[:64, :72] != strip[:64, 72:]).any() for strip in strips)
    assert main([*sample, str(tmp_path / "none.txt")]) == 2
    assert "--prompts: " in capsys.readouterr().err
    assert main(sample[:-1]) == 2
    assert "say what to draw" in capsys.readouterr().err


def test_a_model_that_leaps_is_drawn_from_by_leaping_and_not_exported(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaps = ["flow.objective=shortcut", "model.leap_embed=true", "engine.dtype=fp32", "log.images_every_steps=1"]
    train(load(TrainConfig, chain / "train.yaml", [f"run_dir={tmp_path / 'run'}", "steps=1", "global_batch=8", *leaps]))
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 1
    command = ["sample", str(tmp_path / "run"), "--prompt", "a handwritten one", "--out", str(tmp_path / "leap.png")]
    assert main([*command, "--solver-steps", "2"]) == 0
    assert main([*command, "--solver-steps", "2", "--solver", "heun", "--guidance-interval", "0.2", "0.8"]) == 0
    assert main([*command, "--solver-steps", "3"]) == 2
    assert "a shortcut model leaps 1, 2, 4, 8 … times, given 3" in capsys.readouterr().err
    assert main([*command, "--guidance-interval", "0.8", "0.2"]) == 2
    assert "two numbers that rise within [0, 1]" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "export")]) == 2
    assert "was trained with flow.objective=shortcut" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


def test_a_shift_that_follows_the_size_is_exported(chain: Path, tmp_path: Path) -> None:
    """A stock pipeline visits the times that `fmscale sample` does, at two sizes."""
    from diffusers import StableDiffusion3Pipeline

    shifted = ["flow.shift=flux", "engine.dtype=fp32", "steps=1", "global_batch=8"]
    train(load(TrainConfig, chain / "train.yaml", [f"run_dir={tmp_path / 'run'}", *shifted]))
    export(open_run(tmp_path / "run"), tmp_path / "export", dtype="fp32")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "export")
    pipeline.set_progress_bar_config(disable=True)
    generator = open_generator(tmp_path / "export")
    for height, width in ((64, 64), (128, 64)):
        pipeline(
            "one", height=height, width=width, sigmas=[1, 2 / 3, 1 / 3], num_inference_steps=3, output_type="latent"
        )
        _, *shape = generator.latent_shape(height, width)
        assert generator.times(*shape, 3) == pytest.approx(pipeline.scheduler.sigmas.tolist(), abs=1e-4)


def test_a_clip_l_that_projects_is_not_in_a_single_file(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever reads one takes what SD3's clip_l pools as it is."""
    assert main(["export", str(chain / "run"), str(tmp_path / "out"), "--form", "single", "--with", "text"]) == 2
    assert "clip_l projects what it pools" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_an_exported_folder_has_one_set_of_weights(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample", str(chain / "export"), "--prompt", "a", "--weights", "raw"]
    assert main(command) == 2
    assert "leave out --step, --weights, --ema-std, --vae and --text-encoder" in capsys.readouterr().err


def test_a_teacher_of_other_encoders_is_refused(chain: Path, tmp_path: Path) -> None:
    shutil.copytree(chain / "latents", tmp_path / "latents")
    made_by = dict(Index.open(tmp_path / "latents").made_by or {})
    build_index(tmp_path / "latents", {**made_by, "vae": {**made_by["vae"], "scale": 3.0}})
    data = {"teacher": str(chain / "run"), "data": {"path": str(tmp_path / "latents")}, "out": str(tmp_path / "pairs")}
    with pytest.raises(UserError, match="not made by the same VAE and text encoders"):
        reflow(check(ReflowConfig, {**data, "pairs": 2}, "test"))
    assert not (tmp_path / "pairs").exists()


def test_networks_that_have_moved_are_found_again(chain: Path, tmp_path: Path) -> None:
    run = open_run(chain / "run")
    moved = tmp_path / "run"
    shutil.copytree(chain / "run", moved)
    index_json = next((moved / "checkpoints").glob("step-*6")) / "index.json"
    index_json.write_text(index_json.read_text().replace(str(chain / "encoders"), "/gone"))
    with pytest.raises(
        UserError, match="clip_l of the dataset is no longer there; give its folder: --text-encoder clip_l="
    ):
        open_generator(moved)
    roles = {role: str(chain / "encoders" / role) for role in ("clip_l", "clip_g")}
    generator = open_generator(moved, text_encoders=roles)
    assert generator.t5_length == run.made_by["t5_length"]


def test_inspect_shows_the_dataset(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = tmp_path / "latents"
    with ShardWriter(dataset, samples_per_shard=10) as writer:
        for number, caption in enumerate(["a <script>alert(1)</script>", "two words", "two words", ""]):
            writer.write(f"s{number}", {"latents": torch.zeros(4, 8, 8)}, {"caption": caption})
    build_index(dataset, None)
    page = tmp_path / "page.html"
    vae = str(chain / "export" / "vae")
    assert main(["inspect", str(dataset), "--html", str(page), "--vae", vae, "--thumbnails", "3"]) == 0
    said = capsys.readouterr().out
    assert "4 in 1 shards" in said
    assert "median 2; 1 empty, 1 repeated, of 4 read" in said
    content = page.read_text()
    assert content.count("<figure>") == content.count("data:image/png;base64,") == 3
    assert "<script>" not in content
    assert "&lt;script&gt;alert(1)" in content
    assert main(["inspect", str(dataset), "--html", str(tmp_path / "none" / "page.html")]) == 2


def test_a_vae_without_a_shift_can_be_exported(chain: Path, tmp_path: Path) -> None:
    """As the VAEs of SD1 and SDXL are: the stock pipeline adds its shift all the same."""
    from diffusers import StableDiffusion3Pipeline

    shutil.copytree(chain / "export" / "vae", tmp_path / "vae")
    vae_config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(vae_config | {"shift_factor": None}))
    shutil.copytree(chain / "run", tmp_path / "run")
    index_json = open_run(tmp_path / "run").checkpoint.path / "index.json"
    described = json.loads(index_json.read_text())
    described["description"]["dataset"]["made_by"]["vae"] |= {"path": str(tmp_path / "vae"), "shift": 0.0}
    index_json.write_text(json.dumps(described))
    export(open_run(tmp_path / "run"), tmp_path / "export", dtype="fp32")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "export")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a handwritten one", height=64, width=64, num_inference_steps=2, output_type="np").images[0]
    assert np.isfinite(image).all()
