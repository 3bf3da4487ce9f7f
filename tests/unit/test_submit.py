"""What a batch script says, and what is refused before one is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from range_server import serving

from fmscale.beforehand import check_train
from fmscale.config import EncodeConfig, ReflowConfig, TrainConfig, dump
from fmscale.errors import UserError
from fmscale.section import check
from fmscale.site import Site, worlds
from fmscale.submit import Order, batch_script, read_order, submit
from fmscale.submit import check as examine


def make_site(**values: object) -> Site:
    return check(Site, {"time_min": 60, **values}, "test")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"nodes": 3, "gpus_per_node": 8}, (24, 24)),
        ({"nodes": "2-4", "tasks_per_node": 3}, (6, 12)),
        ({}, (1, 1)),
    ],
)
def test_how_many_ranks_a_job_may_get(values: dict[str, object], expected: tuple[int, int]) -> None:
    assert worlds(make_site(**values)) == expected


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"nodes": "4-2"}, "from few to many"),
        ({"nodes": "all"}, "nodes"),
        ({"gpus_per_node": 8, "tasks_per_node": 2}, "one process per GPU"),
        ({"partiton": "gpu"}, "did you mean partition"),
        ({"environment": {"A=1; touch x #": "y"}}, "environment"),
        ({"sbatch": {"hold\ntouch x": 1}}, "sbatch"),
        ({"sbatch": {"time": "1:00", "nodes": 3}}, "may not hold nodes, time"),
        ({"partition": "a\ntouch x"}, "line break"),
        ({"srun": ["--a\n--b"]}, "line break"),
    ],
)
def test_a_site_that_makes_no_sense_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_site(**values)


@pytest.mark.parametrize(
    ("overrides", "site", "said"),
    [
        ((), {"nodes": 17, "tasks_per_node": 2}, "global_batch 32 cannot be split over 34 ranks"),
        (("data.path=/nowhere",), {}, "data: /nowhere: no such folder"),
        (("model.heads=4000",), {}, "run_dir: .* GB are free"),
        (("model.init_from=/nowhere/x.safetensors",), {}, "model.init_from: /nowhere/x.safetensors: neither"),
        ((), {"write_gb_per_s": 1e-9}, "site.signal_delay_s: 90 leaves 65 s"),
        ((), {"time_min": 2}, "site.time_min"),
        (("steps=100_000_000", "checkpoint.keep_every_steps=4"), {}, "run_dir: 25000001 checkpoints"),
        (("steps=100_000_000", "ema.sigma_rels=[0.05]", "ema.snapshot_every_steps=4"), {}, "and 25000000 snapshots"),
        (("data.path='pipe:cat {name} {range}'",), {}, "--allow-pipe"),
        (("run_dir=/tmp/100%",), {}, "holds a %, a backslash"),
        (("run_dir=/usr",), {}, "is not empty and holds no run"),
        ((f"run_dir=/tmp/{'x' * 300}",), {}, "cannot be looked at"),
    ],
)
def test_what_could_not_run_is_refused(
    overrides: tuple[str, ...],
    site: dict[str, object],
    said: str,
    make_config: Callable[..., TrainConfig],
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=said):
        examine(Order("train", make_config(tmp_path / "run", *overrides), make_site(**site)))
    examine(Order("train", make_config(tmp_path / "run"), make_site()))


@pytest.mark.parametrize(
    ("command", "more", "said"),
    [
        ("train", {"workers": 3}, "--workers: only `encode`"),
        ("encode", {"at_once": 3}, "--at-once: .* give those too"),
        ("encode", {"flags": ["--allow-append"]}, "--allow-append: is for `train`"),
        ("reflow", {"flags": ["--allow-pipe", "--allow-append"]}, "--allow-append: is for `train`"),
    ],
)
def test_arguments_of_another_command_are_refused(command: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        examine(Order(command, None, make_site(), **more))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "teacher: .* is no run directory that has saved a checkpoint"),
        ({"rounds": 2}, "rounds: train too, on one machine"),
        ({"out": "a%b"}, "holds a %"),
    ],
)
def test_pairs_that_could_not_be_made_are_refused(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    values = {"teacher": f"{tmp_path}/run", "prompts": f"{tmp_path}/prompts.txt", "out": f"{tmp_path}/pairs", **more}
    with pytest.raises(UserError, match=said):
        examine(Order("reflow", check(ReflowConfig, values, "test"), make_site()))


def test_a_shard_that_is_gone_is_missed(make_config: Callable[..., TrainConfig], dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "dataset"
    copy.mkdir()
    for entry in dataset.iterdir():
        (copy / entry.name).symlink_to(entry)
    config = make_config(tmp_path / "run", f"data.path={copy}")
    check_train(config, make_site())
    gone = next(copy.glob("*.tar"))
    gone.unlink()
    with pytest.raises(UserError, match=f"{gone.name} is gone"):
        check_train(config, make_site())


def test_a_dataset_behind_a_url_is_looked_at(
    make_config: Callable[..., TrainConfig], dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(dataset) as server:
        check_train(make_config(tmp_path / "run", f"data.path={server.url}"), make_site())
        assert caplog.text == ""
        with pytest.raises(UserError, match=r"nowhere/index/manifest.json is no index"):
            check_train(make_config(tmp_path / "run", f"data.path={server.url}/nowhere"), make_site())
    check_train(make_config(tmp_path / "run", f"data.path={server.url}"), make_site())
    assert "cannot be looked at from here" in caplog.text


def test_overrides_go_where_they_belong(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(dump(make_config(tmp_path / "run")))
    (tmp_path / "site.yaml").write_text("time_min: 60\n")
    overrides = ("steps=9", "site.nodes=1-2", "site.environment={NCCL_DEBUG: INFO}")
    order = read_order("train", str(tmp_path / "train.yaml"), str(tmp_path / "site.yaml"), overrides)
    assert (order.config.steps, order.site.nodes, order.site.environment) == (9, "1-2", {"NCCL_DEBUG": "INFO"})


def test_what_a_script_says(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    values = {
        "nodes": "1-4",
        "gpus_per_node": 8,
        "mem_gb": 64.0,
        "modules": ["cuda/12"],
        "venv": "/opt/my env",
        "environment": {"NCCL_DEBUG": "two words"},
        "setup": ["ulimit -n 4096"],
        "srun": ["--cpu-bind=cores"],
        "sbatch": {"constraint": "h100", "exclusive": True},
    }
    order = Order("train", make_config(tmp_path / "run"), make_site(**values), flags=["--allow-append"])
    lines = batch_script(order, tmp_path / "folder").splitlines()
    for line in (
        "#SBATCH --nodes=1-4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --mem=65536M",
        "#SBATCH --signal=USR2@90",
        "#SBATCH --requeue",
        "#SBATCH --exclusive",
        "#SBATCH --constraint=h100",
        "module load cuda/12",
        "source '/opt/my env/bin/activate'",
        "export NCCL_DEBUG='two words'",
        "ulimit -n 4096",
    ):
        assert line in lines, line
    (command,) = [line for line in lines if line.startswith("srun ")]
    assert "--cpu-bind=cores" in command
    assert command.endswith(
        f"'/opt/my env/bin/python' {tmp_path}/folder/code train --allow-append {tmp_path}/folder/train.yaml"
    )
    assert lines[-1] == f"'/opt/my env/bin/python' {tmp_path}/folder/code requeue {tmp_path}/run $?"


def test_an_array_shares_its_nodes_and_relative_paths_stay_what_they_are(
    make_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    site = make_site(sbatch={"exclusive": True, "hold": False}, setup=["cd /"], venv="~/env")
    lines = batch_script(Order("train", make_config(Path("a b")), site), tmp_path / "folder").splitlines()
    assert "#SBATCH --exclusive" in lines
    assert not any("--hold" in line for line in lines)
    assert f"source {Path.home()}/env/bin/activate" in lines
    (cd,) = [number for number, line in enumerate(lines) if line.startswith(f"cd {tmp_path} || exec ")]
    assert lines[cd] == f"cd {tmp_path} || exec {lines[-1].removesuffix(' $?')} 1"
    assert cd == lines.index("cd /") + 1
    assert "#SBATCH --job-name=a_b" in lines
    text = {"clip_l": {"path": "clip"}}
    encode = check(EncodeConfig, {"out": "out", "images": "in", "vae": "vae", "text": text}, "test")
    lines = batch_script(Order("encode", encode, site, workers=4), tmp_path / "folder").splitlines()
    assert "#SBATCH --array=0-3%4" in lines
    assert "#SBATCH --exclusive" not in lines


def test_a_dry_run_writes_nothing(
    make_config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(Order("train", make_config(tmp_path / "run"), make_site()), dry_run=True) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash")
    assert list(tmp_path.iterdir()) == []
