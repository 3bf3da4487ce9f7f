"""What a step is made of, and what becomes of it when the data is damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fmscale.config import TrainConfig
from fmscale.data.index import Index
from fmscale.data.index_build import build_index
from fmscale.dataset import open_mixture
from fmscale.errors import UserError
from fmscale.train import draw_step, drop_text, train

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
        with place.shard.open("r+b") as file:
            file.seek(place.offset + 600)  # behind the first header
            file.write(b"\xff" * 64)
    return to


def test_damaged_samples_are_named_counted_and_weigh_nothing(
    tmp_path: Path, dataset: Path, make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    broken = damage(dataset, tmp_path / "broken", share=0.2)
    train(make_config(tmp_path / "run", f"data.path={broken}"))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(record["bad_samples"] for record in records) == caplog.text.count("bad sample s") > 0
    assert all(0 < record["loss"] < 10 for record in records)


def test_a_step_without_a_sound_sample_ends_the_run(tmp_path: Path, dataset: Path, make_config: Make) -> None:
    broken = damage(dataset, tmp_path / "broken", share=1.0)
    with pytest.raises(UserError, match=r"data\.path: every sample of step 1 is damaged; `fmscale index .* --verify`"):
        train(make_config(tmp_path / "run", f"data.path={broken}"))
    assert not (tmp_path / "run" / "checkpoints").exists()


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
