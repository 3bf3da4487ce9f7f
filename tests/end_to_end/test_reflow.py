"""Pairs: made by any number of workers, however they end, each from a noise that its name makes again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from encoding import contents
from PIL import Image
from running import PATIENCE_S, environment

from fmscale import digits
from fmscale.cli import main
from fmscale.config import ReflowConfig, TrainConfig, check, dump, load
from fmscale.data.index import Index, verify
from fmscale.data.mixture import Address, Mixture
from fmscale.data.tensors import widen
from fmscale.encode import encode
from fmscale.engine.metrics import read_metrics
from fmscale.errors import UserError
from fmscale.flow.coupling import NOISE_KEY
from fmscale.flow.noise import draw_noise
from fmscale.quickstart import write_encoders, write_train_config
from fmscale.reflow import check_setup, reflow
from fmscale.rounds import rounds
from fmscale.runs import open_run
from fmscale.teacher import Teacher
from fmscale.train import train

pytestmark = pytest.mark.slow

PAIRS, UNIT = 40, 4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset of digits in two buckets, and a run on it of three steps."""
    out = tmp_path_factory.mktemp("teacher")
    split = digits.load_split()
    (out / "images").mkdir()
    for number, picture in enumerate(digits.enlarge(split.train_images[:16])):
        shown = Image.fromarray(picture)
        (shown if number % 4 else shown.resize((64, 128))).save(out / "images" / f"{number:03d}.png")
        (out / "images" / f"{number:03d}.txt").write_text(digits.caption(split.train_labels[number]))
    encode(write_encoders(out))
    overrides = ["steps=3", "global_batch=8", "micro_batch=8", "engine.dtype=fp32", "flow.shift=2", "optimizer.lr=0.02"]
    train(load(TrainConfig, write_train_config(out), [*overrides, "optimizer.warmup_steps=0", "data.workers=0"]))
    return out


def settings(teacher: Path, out: Path, **more: Any) -> ReflowConfig:
    data: dict[str, Any] = {"teacher": str(teacher / "run"), "out": str(out), "solver_steps": 3, "batch": 3}
    source = {} if "prompts" in more else {"data": {"path": str(teacher / "latents")}, "pairs": PAIRS}
    return check(ReflowConfig, {**data, "shard_samples": UNIT, "guidance_scale": 2.0, **source, **more}, "test")


@pytest.fixture(scope="module")
def whole(teacher: Path) -> Index:
    return reflow(settings(teacher, teacher / "whole"))


def start(config: ReflowConfig, *flags: str) -> subprocess.Popen[bytes]:
    path = config.out.with_suffix(".yaml")
    path.write_text(dump(config))
    command = [sys.executable, "-m", "fmscale", "reflow", str(path), *flags]
    with config.out.with_suffix(".txt").open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment(), start_new_session=True)


def samples(index: Index) -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    found = [Mixture([index]).sample(Address(0, row)) for row in range(len(index))]
    return [(sample.tensors, sample.read_meta()) for sample in found]


def test_a_worker_that_is_killed_leaves_every_pair_once(teacher: Path, whole: Index) -> None:
    """Killed at a unit; then two workers go on: the dataset of one that was left alone, to the byte."""
    config = settings(teacher, teacher / "killed")
    first = start(config)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not list(config.out.glob("unfinished/done/*")) or not list(config.out.glob("unfinished/writing/*/*")):
            assert first.poll() is None, config.out.with_suffix(".txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert not (config.out / "manifest.json").exists()
    assert start(config, "--nproc", "2").wait(PATIENCE_S) == 0, config.out.with_suffix(".txt").read_text()
    index = Index.open(config.out)
    assert dict(contents(index)) == dict(contents(whole))
    assert len(index) == PAIRS
    assert index.fingerprint == whole.fingerprint
    assert verify(index) == []


def test_the_stored_latents_are_what_the_solver_makes_of_the_named_noise(teacher: Path, whole: Index) -> None:
    config = settings(teacher, teacher / "again")
    plan = check_setup(config)
    again = Teacher(config, plan.run, plan.captions)
    keys = set()
    for tensors, meta in samples(whole):
        caption = plan.captions.by_number.read(meta[NOISE_KEY][2])
        assert tuple(meta[NOISE_KEY]) == caption.noise_key
        assert tensors["latents"].shape[1:] == caption.size
        latents, _ = again.draw([caption])  # alone, where the program had it among others
        torch.testing.assert_close(latents[0], tensors["latents"], rtol=0, atol=1e-5)
        keys.add(caption.noise_key)
    assert keys == {("reflow", config.seed, number) for number in range(PAIRS)}
    assert len({bucket.name for bucket in whole.buckets}) == 2


def test_training_sees_the_noise_that_the_teacher_started_from(
    teacher: Path, whole: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fmscale.train as training

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    losses = training.losses_of
    monkeypatch.setattr(
        training,
        "losses_of",
        lambda job, batch, draws: seen.append((batch.tensors["latents"], batch.noise)) or losses(job, batch, draws),
    )
    run = open_run(teacher / "run").config.model_dump(mode="json")
    run |= {"run_dir": str(tmp_path / "student"), "data": {"path": str(whole.path), "workers": 0}, "steps": 2}
    run["flow"]["coupling"], run["model"]["init_from"] = "paired", str(teacher / "run")
    train(check(TrainConfig, run, "test"))
    known = {
        tensors["latents"].numpy().tobytes(): draw_noise(tensors["latents"].shape, *meta[NOISE_KEY])
        for tensors, meta in samples(whole)
    }
    assert sum(len(latents) for latents, _ in seen) == 16
    for latents, noise in seen:
        for one, its in zip(latents, noise, strict=True):
            assert torch.equal(known[one.numpy().tobytes()], its)


def test_a_student_begins_with_its_teacher_s_averaged_weights(teacher: Path, whole: Index, tmp_path: Path) -> None:
    run = open_run(teacher / "run").config.model_dump(mode="json")
    run |= {"run_dir": str(tmp_path / "student"), "steps": 1}
    run["data"] |= {"path": str(whole.path)}
    run["flow"] |= {"coupling": "paired", "timesteps": "steps", "distill_steps": 2, "loss": "huber"}
    run["model"] |= {"init_from": str(teacher / "run")}
    run["optimizer"] |= {"lr": 1e-12}
    train(check(TrainConfig, run, "test"))
    ours, theirs = open_run(tmp_path / "student").state("raw"), open_run(teacher / "run").state("ema")
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-9)
    run["model"] |= {"layers": 3}
    run["run_dir"] = str(tmp_path / "other")
    (tmp_path / "other.yaml").write_text(dump(check(TrainConfig, run, "test")))
    assert main(["train", str(tmp_path / "other.yaml")]) == 2
    assert not (tmp_path / "other").exists()


def test_written_captions_take_the_sizes_in_turns(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a handwritten one\n\na handwritten two\n")
    more: dict[str, Any] = {"prompts": str(tmp_path / "prompts.txt"), "sizes_px": [[64, 64], [128, 64]], "pairs": 4}
    index = reflow(settings(teacher, tmp_path / "pairs", **more, text="captions"))
    text = (tmp_path / "prompts.txt").read_text()
    (tmp_path / "prompts.txt").write_text(text.replace("two", "three"))
    with pytest.raises(UserError, match=r"was begun otherwise: config\.prompts\.sha256"):
        reflow(settings(teacher, tmp_path / "pairs", **more, text="captions"))
    (tmp_path / "prompts.txt").write_text(text)
    found = samples(index)
    assert sorted((meta["caption"], tuple(tensors["latents"].shape[1:])) for tensors, meta in found) == [
        ("a handwritten one", (8, 8)),
        ("a handwritten one", (16, 8)),
        ("a handwritten two", (8, 8)),
        ("a handwritten two", (16, 8)),
    ]
    assert all(tensors.keys() == {"latents"} for tensors, _ in found)
    stored = {
        meta["caption"] + str(tensors["latents"].shape): widen(tensors)["latents"]
        for tensors, meta in samples(reflow(settings(teacher, tmp_path / "stored", **more)))
    }
    for tensors, meta in found:
        assert torch.equal(stored[meta["caption"] + str(tensors["latents"].shape)], widen(tensors)["latents"])
    run = open_run(teacher / "run").config.model_dump(mode="json")
    run |= {"run_dir": str(tmp_path / "student"), "steps": 1, "global_batch": 4}
    losses = []
    for name in ("pairs", "stored"):
        run |= {"run_dir": str(tmp_path / f"student_{name}"), "data": {"path": str(tmp_path / name)}}
        run["flow"]["coupling"] = "paired"
        train(check(TrainConfig, run, "test"))
        losses += [record["loss"] for record in read_metrics(Path(run["run_dir"]) / "metrics.jsonl")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_cannot_be_is_refused_and_nothing_is_written(
    teacher: Path, whole: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(said: str, **more: Any) -> None:
        config = settings(teacher, tmp_path / "pairs", **more)
        (tmp_path / "reflow.yaml").write_text(dump(config))
        assert main(["reflow", str(tmp_path / "reflow.yaml")]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "pairs").exists()

    (tmp_path / "empty.txt").write_text("\n")
    refused("holds no text; write one caption a line", prompts=str(tmp_path / "empty.txt"))
    (tmp_path / "one.txt").write_text("a handwritten one")
    refused("both sides must be multiples of", prompts=str(tmp_path / "one.txt"), sizes_px=[[65, 64]])
    refused("none.txt: cannot be read: No such file", prompts=str(tmp_path / "none.txt"))
    refused("positions cover", prompts=str(tmp_path / "one.txt"), sizes_px=[[2048, 2048]])
    refused("no longer there", prompts=str(tmp_path / "one.txt"), text_encoders={"clip_l": str(tmp_path / "gone")})
    refused("no checkpoint of step 2; there are 3", step=2)
    refused("leap needs a model that was trained to", solver="leap")
    (tmp_path / "latents.yaml").write_text(dump(settings(teacher, teacher / "latents")))
    assert main(["reflow", str(tmp_path / "latents.yaml")]) == 2
    assert "holds a dataset that another command makes" in capsys.readouterr().err
    (tmp_path / "other.yaml").write_text(dump(settings(teacher, whole.path, solver_steps=4)))
    assert main(["reflow", str(tmp_path / "other.yaml")]) == 2
    assert "was begun otherwise: config.solver_steps was 3, and is 4" in capsys.readouterr().err
    data = {"path": str(teacher / "latents"), "run": 4}
    (tmp_path / "other.yaml").write_text(dump(settings(teacher, whole.path, data=data)))
    assert main(["reflow", str(tmp_path / "other.yaml")]) == 2
    assert "was begun otherwise: config.data.run was 1, and is 4" in capsys.readouterr().err
    assert json.loads((whole.path / "manifest.json").read_text())["samples"] == PAIRS


def test_rounds_make_pairs_train_and_measure_and_go_on(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = {"steps": 2, "checkpoint": {"every_steps": 1}, "flow": {"timesteps": "u_shaped"}}
    config = settings(teacher, tmp_path / "rounds", rounds=2, student=student, pairs=8)
    (tmp_path / "reflow.yaml").write_text(dump(config))
    trained = list[Path]()

    def stopped(config: TrainConfig) -> None:
        trained.append(config.run_dir)
        if len(trained) == 2:
            raise KeyboardInterrupt
        train(config)

    monkeypatch.setattr("fmscale.rounds.train", stopped)
    monkeypatch.setattr("fmscale.rounds.TRACE_STEPS", 5)
    monkeypatch.setattr("fmscale.rounds.IMAGES", 4)
    assert main(["reflow", str(tmp_path / "reflow.yaml")]) == 130
    assert main(["reflow", str(tmp_path / "reflow.yaml")]) == 0
    first, second = (tmp_path / "rounds" / f"round-{number}" / "run" for number in (1, 2))
    assert trained == [first, second, first, second]
    found = json.loads((tmp_path / "rounds" / "rounds.json").read_text())
    assert [record["run"] for record in found] == [str(teacher / "run"), str(first), str(second)]
    assert all(0 < record["straightness"] <= 1 for record in found)
    assert all(record["relative_error"].keys() == {"1", "2", "4", "8", "25"} for record in found)
    made_by = [Index.open(run.with_name("pairs")).made_by["teacher"] for run in (first, second)]
    assert [made["run"] for made in made_by] == [str(teacher / "run"), str(first)]
    assert [made["guidance_scale"] for made in made_by] == [2.0, 1.0]
    config = config.model_copy(update={"student": {**student, "steps": 3}})
    with pytest.raises(UserError, match="its rounds were begun with student"):
        rounds(config)
    assert open_run(first).checkpoint.step == 2
