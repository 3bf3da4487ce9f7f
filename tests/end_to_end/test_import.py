"""Published weights become a run that draws, teaches and exports as what they came from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from fmscale.cli import main
from fmscale.config import ReflowConfig, TrainConfig, check, dump, load
from fmscale.data.index import Index
from fmscale.imported import open_run_or_published
from fmscale.pictures import Guidance
from fmscale.reflow import reflow
from fmscale.runs import open_run
from fmscale.sample import open_generator

pytestmark = pytest.mark.slow

PROMPT = "a handwritten seven"


def weights_of(export: Path) -> dict[str, torch.Tensor]:
    return load_file(export / "transformer" / "diffusion_pytorch_model.safetensors")


def draw(source: Path) -> torch.Tensor:
    generator = open_generator(source)
    noise = torch.randn(1, *generator.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    return generator.draw(noise, [PROMPT], [""], Guidance(3.0), steps=3)


def test_an_export_comes_back_as_it_left(chain: Path, tmp_path: Path) -> None:
    """Imported and exported again it has the same bytes, and draws what the run draws."""
    assert main(["import", str(chain / "export"), str(tmp_path / "run")]) == 0
    note = json.loads((tmp_path / "run" / "imported.json").read_text())
    assert note["check"]["velocity"]["difference"] <= 1e-5
    assert note["check"]["read_by"] == "SD3Transformer2DModel"
    assert main(["checkpoints", str(tmp_path / "run"), "--verify"]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "again"), "--dtype", "fp32"]) == 0
    first, second = weights_of(chain / "export"), weights_of(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (draw(tmp_path / "run") - draw(chain / "run")).abs().max().item() <= 1e-5
    assert torch.equal(draw(chain / "export"), draw(tmp_path / "run"))


def test_a_pipeline_that_fmscale_never_saw(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As stock diffusers saves it: nothing of fmscale's beside the weights."""
    StableDiffusion3Pipeline.from_pretrained(chain / "export").save_pretrained(tmp_path / "published")
    assert not (tmp_path / "published" / "fmscale.json").exists()
    assert main(["import", str(tmp_path / "published"), str(tmp_path / "run")]) == 0
    config, trained = open_run(tmp_path / "run").config, open_run(chain / "run").config
    same = {"layers", "heads", "head_dim", "context_dim", "pooled_dim", "qk_norm", "base_size", "pos_embed_max_size"}
    assert {name: getattr(config.model, name) for name in same} == {name: getattr(trained.model, name) for name in same}
    assert config.flow.shift == trained.flow.shift
    command = ["sample", "--prompt", PROMPT, "--images", "1", "--solver-steps", "2"]
    assert main([*command, "--out", str(tmp_path / "run.png"), str(tmp_path / "run")]) == 0
    assert main([*command, "--out", str(tmp_path / "folder.png"), str(tmp_path / "published")]) == 0
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "folder.png").read_bytes()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "again")]) == 0
    assert "images seen" not in (tmp_path / "again" / "README.md").read_text()  # nobody said
    check_that_a_part_is_missed(tmp_path / "published", capsys)


def check_that_a_part_is_missed(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipeline that was downloaded in part is not taken for another one."""
    capsys.readouterr()
    out = published.parent / "part"
    (published / "text_encoder_2").rename(published / "elsewhere")
    for command in (["import", str(published), str(out)], ["sample", str(published), "--prompt", PROMPT]):
        assert main(command) == 2
        assert "names clip_g, and text_encoder_2 and tokenizer_2 are not both there" in capsys.readouterr().err
    index = json.loads((published / "model_index.json").read_text())
    (published / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": [None, None]}))
    assert main(["import", str(published), str(out)]) == 2
    assert "numbers of pooled text, clip_l" in capsys.readouterr().err
    (published / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    assert main(["import", str(published), str(out)]) == 2
    assert "its model_index.json is of a FluxPipeline" in capsys.readouterr().err
    assert not out.exists()


def test_a_single_file_takes_a_config_that_says_its_shape(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(chain / "run"), str(tmp_path / "one"), "--form", "single", "--dtype", "fp32"]) == 0
    file = tmp_path / "published.safetensors"
    shutil.copy(tmp_path / "one" / "one.safetensors", file)
    assert main(["import", str(file), str(tmp_path / "run")]) == 2
    assert "give a train config that does: --config" in capsys.readouterr().err
    (tmp_path / "like.yaml").write_text(dump(load(TrainConfig, chain / "train.yaml")))
    assert main(["import", str(file), str(tmp_path / "run"), "--config", str(tmp_path / "like.yaml")]) == 0
    assert json.loads((tmp_path / "run" / "imported.json").read_text())["check"]["velocity"]["difference"] <= 1e-5
    assert main(["import", str(tmp_path / "one"), str(tmp_path / "folder")]) == 0  # which says its shape
    ours, first = open_run(tmp_path / "folder").state("ema"), open_run(chain / "run").state("ema")
    assert all(torch.equal(ours[name], value) for name, value in first.items())
    command = ["train", str(chain / "train.yaml"), "steps=1", "global_batch=4", "micro_batch=4", "engine.dtype=fp32"]
    assert main([*command, f"run_dir={tmp_path / 'next'}", f"model.init_from={tmp_path / 'one'}"]) == 0
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "run"), "--prompt", PROMPT, "--out", str(tmp_path / "x.png")]) == 2
    assert "VAE" in capsys.readouterr().err


def test_an_exported_folder_teaches(chain: Path, tmp_path: Path) -> None:
    """Its pairs are those of the run that it was exported from, on the same dataset."""
    made = {}
    for name, teacher in {"run": chain / "run", "export": chain / "export"}.items():
        settings = {"teacher": str(teacher), "data": {"path": str(chain / "latents")}, "pairs": 4}
        config = check(ReflowConfig, {**settings, "out": str(tmp_path / name), "solver_steps": 2}, "test")
        index = reflow(config)
        made[name] = {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.tar")}
        assert isinstance(index, Index)
        assert len(index) == 4
    assert made["run"] == made["export"]
    assert open_run_or_published(chain / "export").is_imported


def test_what_was_imported_is_no_run_to_go_on_with(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is where another run starts."""
    assert main(["import", str(chain / "export"), str(tmp_path / "run")]) == 0
    command = ["train", str(chain / "train.yaml"), "steps=1", "global_batch=4", "micro_batch=4", "engine.dtype=fp32"]
    assert main([*command, f"run_dir={tmp_path / 'run'}"]) == 2
    assert f"model.init_from={tmp_path / 'run'}" in capsys.readouterr().err
    assert main([*command, f"run_dir={tmp_path / 'next'}", f"model.init_from={tmp_path / 'run'}"]) == 0
    other = [f"run_dir={tmp_path / 'other'}", f"model.init_from={tmp_path / 'run'}", "model.base_size=8"]
    assert main([*command, *other]) == 2
    assert "learned other positions than those of model.base_size: set model.position_origin" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--ema-std", "0.1"]) == 2
    assert "one set of weights" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "missing", "other", "size", "note"])
def test_what_cannot_be_imported_leaves_nothing(
    chain: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(chain / "export", source)
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "missing":
        file.unlink()
    elif damage == "note":
        note = json.loads((source / "fmscale.json").read_text())
        (source / "fmscale.json").write_text(json.dumps(note | {"encoders": "t5"}))
    else:
        config = json.loads((source / "transformer" / "config.json").read_text())
        wrong = {"size": {"sample_size": None}, "other": {"num_layers": config["num_layers"] + 1}}
        (source / "transformer" / "config.json").write_text(json.dumps(config | wrong[damage]))
    assert main(["import", str(source), str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert str(source) in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".run*"))
