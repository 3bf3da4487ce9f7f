"""What a step is made of, and what becomes of it when the data is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fmscale.config import TrainConfig
from fmscale.data.index import Index
from fmscale.data.index_build import build_index
from fmscale.dataset import open_mixture
from fmscale.encoders.null import load_null, save_null
from fmscale.engine.metrics import read_metrics
from fmscale.errors import UserError
from fmscale.train import Allowed, draw_step, drop_text, train

Make = Callable[..., TrainConfig]


def test_draws_are_a_function_of_seed_and_step(tmp_path: Path, make_config: Make) -> None:
    config = make_config(tmp_path, "global_batch=2000", "conditioning.dropout=0.3", "flow.shift=3.0")
    first, again, later = draw_step(config, 5, 2), draw_step(config, 5, 2), draw_step(config, 6, 2)
    assert torch.equal(first.t, again.t)
    assert torch.equal(first.dropped, again.dropped)
    assert not torch.equal(first.t, later.t)
    assert not torch.equal(first.dropped, later.dropped)
    assert first.t.median().item() == pytest.approx(0.75, abs=0.03)  # 0.5, shifted: 3 t / (1 + 2 t)
    assert first.dropped.all(dim=1).float().mean().item() == pytest.approx(0.3, abs=0.04)


def test_a_dropped_encoder_says_what_it_says_of_the_null() -> None:
    tensors = {"clip_l": torch.ones(3, 4, 2), "clip_l_pooled": torch.ones(3, 5), "t5": torch.ones(3, 6, 2)}
    null = {"clip_l": torch.full((4, 2), 7.0), "clip_l_pooled": torch.full((5,), 8.0), "t5": torch.full((6, 2), 9.0)}
    dropped = torch.tensor([[True, False], [False, True], [False, False]])
    text = drop_text(tensors, ("clip_l", "t5"), dropped, null)
    assert text["clip_l"][:, 0, 0].tolist() == [7, 1, 1]
    assert text["clip_l_pooled"][:, 0].tolist() == [8, 1, 1]
    assert text["t5"][:, 0, 0].tolist() == [1, 9, 1]


def damage(dataset: Path, to: Path, share: float) -> Path:
    """A copy of a dataset in which the last bytes of some samples are other ones."""
    shutil.copytree(dataset, to)
    index = Index.open(to)
    for row in range(round(share * len(index))):
        place = index.location(row)
        with (index.path / place.shard).open("r+b") as file:
            file.seek(place.offset + 600)  # behind the first header
            file.write(b"\xff" * 64)
    return to


def test_damaged_samples_are_named_counted_and_weigh_nothing(
    tmp_path: Path, dataset: Path, make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    broken = damage(dataset, tmp_path / "broken", share=0.2)
    overrides = (f"data.path={broken}", "data.max_bad_fraction=0.5")
    train(make_config(tmp_path / "run", *overrides))
    records, listed = (read_metrics(tmp_path / "run" / name) for name in ("metrics.jsonl", "bad_samples.jsonl"))
    assert sum(record["bad_samples"] for record in records) == caplog.text.count("bad sample s") == len(listed) > 0
    assert {entry["key"] for entry in listed} <= {f"s{number:05d}" for number in range(120)}
    assert all("changed since it was indexed" in entry["reason"] for entry in listed)
    assert all(0 < record["loss"] < 10 for record in records)

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    train(make_config(tmp_path / "run", *overrides))  # from step 4 on: nothing is listed twice
    assert read_metrics(tmp_path / "run" / "bad_samples.jsonl") == listed


@pytest.mark.parametrize(("share", "said"), [(1.0, "32 of 32 images"), (0.3, r"\d+ of [\d,]+ images")])
def test_too_much_damage_ends_the_run(
    tmp_path: Path, dataset: Path, make_config: Make, share: float, said: str
) -> None:
    broken = damage(dataset, tmp_path / "broken", share)
    settings = (f"data.path={broken}", "log.every_steps=1", "steps=60", "checkpoint.every_steps=60")
    with pytest.raises(UserError, match=rf"data\.max_bad_fraction: {said} were damaged, allowed are 1\.0%"):
        train(make_config(tmp_path / "run", *settings))
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert len(read_metrics(tmp_path / "run" / "bad_samples.jsonl")) > 10


def encode_again(dataset: Path, to: Path, made_by: dict[str, object]) -> Path:
    """A copy of a dataset, as if the same program had made it with other networks."""
    shutil.copytree(dataset, to)
    build_index(to, made_by)
    return to


def test_a_mixture_trains_by_weight(tmp_path: Path, dataset: Path, make_config: Make) -> None:
    made_by = {"program": "tests", "t5_length": 32}
    other = encode_again(dataset, tmp_path / "other", made_by)
    parts = f"data.mixture=[{{path: {dataset}, weight: 1.0}}, {{path: {other}, weight: 3.0}}]"
    config = make_config(tmp_path / "run", "data.path=null", parts, "steps=2", "global_batch=8", "micro_batch=8")
    train(config)
    plan = open_mixture(config.data).order(1000, config.seed).batch(0)
    assert plan.parts.mean() == pytest.approx(0.75, abs=0.01)
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()


def test_a_mixture_of_other_encoders_is_refused(tmp_path: Path, dataset: Path, make_config: Make) -> None:
    other = encode_again(dataset, tmp_path / "other", {"program": "tests", "t5_length": 77})
    parts = f"data.mixture=[{{path: {dataset}, weight: 1.0}}, {{path: {other}, weight: 3.0}}]"
    with pytest.raises(UserError, match=r"other and .* were not made by the same VAE and text encoders"):
        train(make_config(tmp_path / "run", "data.path=null", parts))
    assert not (tmp_path / "run").exists()


def written(run_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.heads=4", r"is \(.*\) there and \(.*\) in the config's model"),
        ("model.layers=3", r"is absent there and \(.*\) in the config's model"),
        ("model.dual_attention_layers=[9]", "dual_attention_layers"),
        ("ema.decays=[0.5]", r"holds no ema_0\.5"),
        ("data.path=OTHER", r"is not what .* was trained on: 8x8-00000\.tar has other content"),
        ("data.path=NULL", "the features of the empty caption in .* are not those"),
    ],
)
def test_a_refused_start_changes_nothing(
    tmp_path: Path, dataset: Path, make_config: Make, change: str, said: str
) -> None:
    """Even where the user has allowed a change of config."""
    if change.endswith("OTHER"):
        change = f"data.path={damage(dataset, tmp_path / 'other', 0.1)}"
        build_index(tmp_path / "other", {"program": "tests", "t5_length": 32})
    if change.endswith("NULL"):
        shutil.copytree(dataset, tmp_path / "null")
        stored = load_null(
            dataset, {name: shape for name, (_, shape) in Index.open(dataset).layout.items() if "clip" in name}
        )
        save_null(tmp_path / "null", {name: value + 1 for name, value in stored.items()})
        change = f"data.path={tmp_path / 'null'}"
    train(make_config(tmp_path / "run", "steps=2"))
    before = written(tmp_path / "run")
    with pytest.raises(UserError, match=said):
        train(make_config(tmp_path / "run", "steps=4", change), Allowed(config_change=True))
    assert written(tmp_path / "run") == before


def test_an_invalid_model_leaves_no_run_directory(tmp_path: Path, make_config: Make) -> None:
    with pytest.raises(UserError, match="dual_attention_layers"):
        train(make_config(tmp_path / "run", "model.dual_attention_layers=[9]"))
    assert not (tmp_path / "run").exists()
