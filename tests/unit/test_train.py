"""What a step is made of, and what becomes of it when the data is damaged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from range_server import ERROR, SOUND, STALL, TRUNCATE, Server, serving

import fmscale.train as training
from fmscale.batch import Batch
from fmscale.building import STRICT, Allowed
from fmscale.config import TrainConfig
from fmscale.data.index import Index
from fmscale.data.index_build import build_index
from fmscale.data.shards import ShardWriter
from fmscale.dataset import open_mixture
from fmscale.draws import Draws, draw_step, drop_text
from fmscale.encoders.null import load_null, save_null
from fmscale.engine import checkpoint as checkpoints
from fmscale.engine.metrics import read_metrics
from fmscale.errors import OutageError, UserError
from fmscale.guards import SETTLED_STEPS
from fmscale.train import train

Make = Callable[..., TrainConfig]


def test_draws_are_a_function_of_seed_and_step(tmp_path: Path, make_config: Make) -> None:
    config = make_config(tmp_path, "global_batch=2000", "conditioning.dropout=0.3", "flow.shift=3.0")
    first, again, later = (draw_step(config, step, 2, (8, 8)) for step in (5, 5, 6))
    assert torch.equal(first.times.t, again.times.t)
    assert torch.equal(first.dropped, again.dropped)
    assert not torch.equal(first.times.t, later.times.t)
    assert not torch.equal(first.dropped, later.dropped)
    assert first.times.t.median().item() == pytest.approx(0.75, abs=0.03)  # 0.5, shifted: 3 t / (1 + 2 t)
    assert first.dropped.all(dim=1).float().mean().item() == pytest.approx(0.3, abs=0.04)


def test_a_dropped_encoder_says_what_it_says_of_the_null() -> None:
    tensors = {"clip_l": torch.ones(3, 4, 2), "clip_l_pooled": torch.ones(3, 5), "t5": torch.ones(3, 6, 2)}
    null = {"clip_l": torch.full((4, 2), 7.0), "clip_l_pooled": torch.full((5,), 8.0), "t5": torch.full((6, 2), 9.0)}
    dropped = torch.tensor([[True, False], [False, True], [False, False]])
    text = drop_text(tensors, ("clip_l", "t5"), dropped, null)
    assert text["clip_l"][:, 0, 0].tolist() == [7, 1, 1]
    assert text["clip_l_pooled"][:, 0].tolist() == [8, 1, 1]
    assert text["t5"][:, 0, 0].tolist() == [1, 9, 1]
    counts, counts_of_null = {"t5_count": torch.tensor([4, 5, 6])}, {"t5_count": torch.tensor(1.0)}
    text = drop_text(tensors | counts, ("clip_l", "t5"), dropped, null | counts_of_null)
    assert text["t5_count"].tolist() == [4, 1, 6]


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
        ("ema.sigma_rels=[0.1]", r"holds no ema_sigma_0\.1"),
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


def keys_by_step(config: TrainConfig, allowed: Allowed = STRICT) -> dict[int, list[str]]:
    """Train, and tell which samples each step drew, bucket first."""
    drawn: dict[int, list[str]] = {}

    def note(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
        for batch in batches:
            drawn.setdefault(batch.step, []).extend([str(batch.bucket), *batch.keys])
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fmscale.train.prefetch", note)
        train(config, allowed)
    return drawn


def append_shards(dataset: Path, prefix: str = "new-", count: int = 30) -> None:
    """More samples for a dataset, in two of its buckets and a new one."""
    generator = torch.Generator().manual_seed(9)
    stored = Index.open(dataset).layout
    with ShardWriter(dataset, prefix=prefix) as writer:
        for number in range(count):
            size = ((8, 8), (8, 16), (16, 16))[number % 3]
            tensors = {name: torch.randn(shape, generator=generator) for name, (_, shape) in stored.items()}
            tensors["latents"] = torch.randn(4, *size, generator=generator)
            writer.write(f"{prefix}{number}", tensors, {"caption": "new"})
    build_index(dataset, Index.open(dataset, check_shards=False).made_by)


class TestAppendedShards:
    """A run of 6 steps on a dataset that grows; a checkpoint every 2."""

    SETTINGS = ("checkpoint.every_steps=2", "global_batch=16", "micro_batch=16")

    @pytest.fixture
    def growing(self, tmp_path: Path, dataset: Path) -> Path:
        return Path(shutil.copytree(dataset, tmp_path / "growing"))

    def config(self, make_config: Make, growing: Path, steps: int) -> TrainConfig:
        return make_config(growing.parent / "run", f"data.path={growing}", f"steps={steps}", *self.SETTINGS)

    def test_they_are_refused_without_the_flag(self, growing: Path, make_config: Make) -> None:
        train(self.config(make_config, growing, 2))
        append_shards(growing)
        before = written(growing.parent / "run")
        with pytest.raises(UserError, match=r"new-16x16-00000\.tar is new; add --allow-append to take in what is new"):
            train(self.config(make_config, growing, 4))
        assert written(growing.parent / "run") == before

    def test_they_come_in_with_the_flag_and_stay(self, growing: Path, make_config: Make) -> None:
        before = keys_by_step(self.config(make_config, growing, 2))
        append_shards(growing)
        allowed = Allowed(append=True)
        after = keys_by_step(self.config(make_config, growing, 40), allowed)
        assert sorted(after) == list(range(2, 40))
        new_bucket = [keys for keys in after.values() if keys[0] == "(16, 16)"]
        assert new_bucket
        assert all(key.startswith("new-") for keys in new_bucket for key in keys[1:])
        steps = [keys for _, keys in sorted({**before, **after}.items())]
        squares = [key for keys in steps if keys[0] == "(8, 8)" for key in keys[1:]]
        assert len(squares) > 80 + 90
        assert not any(key.startswith("new-") for key in squares[:80])  # the epoch that had begun is not touched
        assert len(set(squares[:80])) == 80
        assert len(set(squares[80:170])) == 90
        assert sum(key.startswith("new-") for key in squares[80:170]) == 10

        again = keys_by_step(self.config(make_config, growing, 44))  # what is known needs no flag
        assert sorted(again) == list(range(40, 44))
        append_shards(growing, prefix="newer-")
        more = keys_by_step(self.config(make_config, growing, 46), allowed)
        newest = checkpoints.latest(growing.parent / "run" / "checkpoints")
        assert newest is not None
        description = newest.index["description"]
        assert [entry["step"] for entry in description["dataset"]["generations"]] == [0, 2, 44]
        assert sorted(more) == [44, 45]

    def test_a_run_stopped_anywhere_draws_the_same(self, growing: Path, make_config: Make) -> None:
        keys_by_step(self.config(make_config, growing, 2))
        append_shards(growing)
        shutil.copytree(growing.parent / "run", growing.parent / "kept")
        whole = keys_by_step(self.config(make_config, growing, 12), Allowed(append=True))
        shutil.rmtree(growing.parent / "run")
        (growing.parent / "kept").rename(growing.parent / "run")
        first = keys_by_step(self.config(make_config, growing, 6), Allowed(append=True))
        then = keys_by_step(self.config(make_config, growing, 12))
        assert {**first, **then} == whole

    @pytest.mark.parametrize("change", ["gone", "other content", "before"])
    def test_any_other_change_is_refused(self, growing: Path, make_config: Make, change: str) -> None:
        train(self.config(make_config, growing, 2))
        append_shards(growing, prefix="" if change != "before" else "0")
        lost = growing / "8x16-00000.tar"
        if change == "gone":
            lost.unlink()
        if change == "other content":
            index = Index.open(growing)
            place = next(p for p in map(index.location, range(len(index))) if p.shard == lost.name)
            with lost.open("r+b") as file:
                file.seek(place.offset + place.tensors_start + place.tensors_length - 8)
                file.write(bytes(8))
        build_index(growing, Index.open(growing, check_shards=False).made_by)
        said = {
            "gone": r"8x16-00000\.tar is gone; put it back",
            "other content": r"8x16-00000\.tar has other content, .*; put it back",
            "before": "in bucket 8x8 new shards stand before old ones; rename them",
        }
        with pytest.raises(UserError, match=said[change]):
            train(self.config(make_config, growing, 4), Allowed(append=True))


@pytest.fixture
def behind_url(dataset: Path) -> Iterator[Server]:
    with serving(dataset) as server:
        yield server


REMOTE = ("data.remote.attempts=4",)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", [ERROR, TRUNCATE, STALL])
def test_training_goes_on_when_a_server_recovers(
    tmp_path: Path, make_config: Make, behind_url: Server, fault: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmscale.data.remote.FIRST_DELAY_S", 0.01)
    local = make_config(tmp_path / "local", "steps=4")
    train(local)
    behind_url.fault = lambda request: fault if request.before == 0 and request.start % 7 == 0 else SOUND
    places = (f"data.path={behind_url.url}", f"data.remote.cache={tmp_path}/cache", f"data.workers={workers}")
    patience = f"data.remote.timeout_s={1.0 if fault == STALL else 20.0}"
    remote = make_config(tmp_path / "remote", "steps=4", *REMOTE, patience, *places)
    train(remote)
    assert any(request.before for request in behind_url.requests)
    losses = [
        [record["loss"] for record in read_metrics(config.run_dir / "metrics.jsonl")] for config in (local, remote)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_stops_with_the_url_and_the_cause_when_it_does_not(
    tmp_path: Path, make_config: Make, behind_url: Server, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmscale.data.remote.FIRST_DELAY_S", 0.01)
    behind_url.fault = lambda request: ERROR if request.name.startswith("16x8") else SOUND
    places = (f"data.path={behind_url.url}", f"data.remote.cache={tmp_path}/cache", f"data.workers={workers}")
    with pytest.raises(OutageError, match=rf"^{behind_url.url}/16x8-00000\.tar cannot be read \(tried 4 times\).*500"):
        train(make_config(tmp_path / "run", "steps=20", *REMOTE, *places))


class TestSkippedSteps:
    """A loss that is not a number: the step is dropped, its samples are named, and too many in a row lead back."""

    SETTINGS = ("checkpoint.every_steps=2", "guard.max_skipped_steps=2", "log.every_steps=1")

    @pytest.fixture
    def poison(self, monkeypatch: pytest.MonkeyPatch) -> set[int]:
        """Steps whose losses are NaN."""
        steps: set[int] = set()
        losses = training.losses_of

        def poisoned(job: training.Job, batch: Batch, draws: Draws) -> torch.Tensor:
            found = losses(job, batch, draws)
            return found * float("nan") if batch.step in steps else found

        monkeypatch.setattr(training, "losses_of", poisoned)
        return steps

    def skipped(self, run_dir: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run_dir / "skipped_steps.jsonl").read_text().splitlines()]

    def test_they_are_named_and_change_nothing(
        self, tmp_path: Path, make_config: Make, poison: set[int], caplog: pytest.LogCaptureFixture
    ) -> None:
        poison.add(2)
        config = make_config(tmp_path / "run", *self.SETTINGS, "steps=4", "optimizer.warmup_steps=0")
        drawn = keys_by_step(config)
        (line,) = self.skipped(config.run_dir)
        assert line["step"] == 3
        assert line["keys"] == drawn[2][1:]
        applied = [record["applied"] for record in read_metrics(config.run_dir / "metrics.jsonl")]
        assert applied == [True, True, False, True]
        assert "step 3: a gradient was not finite, so nothing was updated" in caplog.text
        newest = checkpoints.latest(config.run_dir / "checkpoints")
        assert newest is not None
        assert newest.index["updates"] == 3

    def test_too_many_in_a_row_lead_back_to_the_last_checkpoint(
        self, tmp_path: Path, make_config: Make, poison: set[int], caplog: pytest.LogCaptureFixture
    ) -> None:
        poison.update((5, 6))
        config = make_config(tmp_path / "run", *self.SETTINGS, "steps=10")
        train(config)
        assert re.search(r"step 7: back to the weights of .*step-00000004; the data goes on", caplog.text)
        assert [line["step"] for line in self.skipped(config.run_dir)] == [6, 7]
        steps = [record["step"] for record in read_metrics(config.run_dir / "metrics.jsonl")]
        assert steps == list(range(1, 11))

    def test_snapshots_of_what_was_given_up_are_given_up_too(
        self, tmp_path: Path, make_config: Make, poison: set[int]
    ) -> None:
        poison.update((5, 6))
        snapshots = ("ema.sigma_rels=[0.1]", "ema.snapshot_every_steps=1")
        train(make_config(tmp_path / "run", *self.SETTINGS, *snapshots, "steps=10"))
        found = map(checkpoints.open_checkpoint, checkpoints.find_all(tmp_path / "run" / "ema"))
        updates = {one.step: one.index["updates"] for one in found}
        assert updates == {1: 1, 2: 2, 3: 3, 4: 4, 7: 4, 8: 5, 9: 6, 10: 7}

    def test_without_a_checkpoint_the_run_stops_and_says_why(
        self, tmp_path: Path, make_config: Make, poison: set[int]
    ) -> None:
        poison.update((0, 1))
        with pytest.raises(UserError, match=r"max_skipped_steps: the last 2 steps .*there is no checkpoint"):
            train(make_config(tmp_path / "run", *self.SETTINGS, "checkpoint.every_steps=50"))


def test_a_loss_that_leaps_is_dropped_and_the_medians_go_on_with_the_run(
    tmp_path: Path, make_config: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    losses, leaping = training.losses_of, SETTLED_STEPS + 5

    def leap(job: training.Job, batch: Batch, draws: Draws) -> torch.Tensor:
        return losses(job, batch, draws) * (50 if batch.step == leaping else 1)

    monkeypatch.setattr(training, "losses_of", leap)
    settings = ("global_batch=8", "micro_batch=8", "log.every_steps=5", "checkpoint.every_steps=60")
    whole = make_config(tmp_path / "whole", *settings, f"steps={leaping + 3}")
    train(whole)
    cut = tmp_path / "cut"
    train(make_config(cut, *settings, "steps=60"))
    train(make_config(cut, *settings, f"steps={leaping + 3}"), Allowed(config_change=True))
    for run_dir in (whole.run_dir, cut):
        records = read_metrics(run_dir / "metrics.jsonl")
        assert [record["step"] for record in records if not record["applied"]] == [leaping + 1]
        assert records[leaping]["loss_ratio"] > 20
    keys = ("loss", "loss_ratio", "grad_norm")
    first, second = (
        [[record[key] for key in keys] for record in read_metrics(run_dir / "metrics.jsonl")]
        for run_dir in (whole.run_dir, cut)
    )
    assert first == second
    assert re.search(rf"step {leaping + 1}: its loss was \d+\.\d times what its timesteps cost as a rule", caplog.text)
