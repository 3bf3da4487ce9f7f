"""Whatever the world, the ZeRO stage, the micro-batch and the interruptions: one and the same run."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from fmscale.config import TrainConfig
from fmscale.engine.checkpoint import Fragments, open_checkpoint
from fmscale.engine.optim import ema_decay, ema_name, sigma_name
from fmscale.engine.posthoc import power_decay
from fmscale.engine.zero import WEIGHT

STEPS = 20
SAVING = (f"steps={STEPS}", "checkpoint.every_steps=10")
STAGES = (1, 2, 3)
WORLDS = (1, 2, 4)
TOLERANCE = 1e-5  # relative, in fp32: the order of additions differs
OBJECTIVES = {
    "rows": (
        "flow.path=cosine",
        "flow.prediction=data",
        "flow.sigma=0.1",
        "flow.timesteps=mode",
        "flow.stratified=true",
        "flow.weight=cosmap",
    ),
    "mean_flow": ("flow.objective=mean_flow", "model.leap_embed=true", "flow.shift=sqrt"),
    "shortcut": ("flow.objective=shortcut", "model.leap_embed=true", "flow.shift=flux"),
}

Make = Callable[..., TrainConfig]
TrainMany = Callable[[int, Sequence[TrainConfig]], None]
Losses = Callable[[Path], dict[int, float]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, make_config: Make, train_many: TrainMany) -> Path:
    """Runs of 20 steps named WORLD-STAGE, checkpoints at 10 and 20; on one process also one of 8 micro-batches."""
    folder = tmp_path_factory.mktemp("runs")
    for world in WORLDS:
        configs = [make_config(folder / f"{world}-{stage}", *SAVING, f"engine.zero_stage={stage}") for stage in STAGES]
        if world == 1:
            configs.append(make_config(folder / "accumulated", *SAVING, "micro_batch=4", "data.workers=1"))
        train_many(world, configs)
    return folder


@pytest.fixture(scope="module")
def objectives(tmp_path_factory: pytest.TempPathFactory, make_config: Make, train_many: TrainMany) -> Path:
    """The same of each objective, named WORLD-OBJECTIVE."""
    folder = tmp_path_factory.mktemp("objectives")
    for world in (1, 2):
        rows = OBJECTIVES.items()
        train_many(world, [make_config(folder / f"{world}-{name}", *SAVING, *given) for name, given in rows])
    return folder


def worst_difference(ours: dict[int, float], theirs: dict[int, float]) -> float:
    assert ours.keys() == theirs.keys()
    assert len(ours) == STEPS
    return max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in theirs)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", WORLDS)
def test_every_world_and_stage_trains_the_same_run(runs: Path, losses: Losses, world: int, stage: int) -> None:
    assert worst_difference(losses(runs / f"{world}-{stage}"), losses(runs / "1-1")) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_the_same_run_in_another_world(objectives: Path, losses: Losses, objective: str) -> None:
    assert worst_difference(losses(objectives / f"2-{objective}"), losses(objectives / f"1-{objective}")) <= TOLERANCE


def test_eight_micro_batches_of_four_are_one_of_thirty_two(runs: Path, losses: Losses) -> None:
    assert worst_difference(losses(runs / "accumulated"), losses(runs / "1-1")) <= TOLERANCE


def test_weights_moments_and_averages_agree_too(runs: Path) -> None:
    reference = Fragments(open_checkpoint(runs / "1-1" / "checkpoints" / "step-00000020"))
    other = Fragments(open_checkpoint(runs / "4-3" / "checkpoints" / "step-00000020"))
    for kind in (WEIGHT, "exp_avg", ema_name(0.99), ema_name(0.9)):
        for (name, ours), (_, theirs) in zip(reference.full(kind), other.full(kind), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=2e-5), (kind, name)


def cut_back(runs: Path, name: str, to: Path) -> Path:
    """A run as it was when it died some steps after its checkpoint at 10: its metrics know of later steps."""
    shutil.copytree(runs / name, to)
    shutil.rmtree(to / "checkpoints" / "step-00000020")
    return to


def test_resuming_in_the_same_world_is_exact(
    runs: Path, tmp_path: Path, make_config: Make, train_many: TrainMany, losses: Losses
) -> None:
    for world, stage in ((1, 1), (2, 2), (2, 3)):
        run_dir = cut_back(runs, f"{world}-{stage}", tmp_path / f"{world}-{stage}")
        train_many(world, [make_config(run_dir, *SAVING, f"engine.zero_stage={stage}")])
        assert losses(run_dir) == losses(runs / f"{world}-{stage}")
        ours, theirs = (
            Fragments(open_checkpoint(root / "checkpoints" / "step-00000020"))
            for root in (run_dir, runs / f"{world}-{stage}")
        )
        for kind in ours.checkpoint.index["kinds"]:
            for (name, one), (_, other) in zip(ours.full(kind), theirs.full(kind), strict=True):
                assert torch.equal(one, other), (kind, name)


@pytest.mark.parametrize(
    ("saved", "world", "stages"),
    [
        ("4-2", 3, (3,)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("4-2", 1, STAGES), ("4-2", 2, (1,)), ("1-1", 2, (3, 1)), ("2-3", 3, (2,)))
        ),
    ],
)
def test_resuming_in_another_world_or_stage(
    runs: Path,
    tmp_path: Path,
    make_config: Make,
    train_many: TrainMany,
    losses: Losses,
    saved: str,
    world: int,
    stages: tuple[int, ...],
) -> None:
    configs = [
        make_config(cut_back(runs, saved, tmp_path / str(stage)), *SAVING, f"engine.zero_stage={stage}")
        for stage in stages
    ]
    train_many(world, configs)
    for config in configs:
        assert worst_difference(losses(config.run_dir), losses(runs / saved)) <= TOLERANCE


def test_the_average_in_a_checkpoint_is_the_average_of_full_weights(
    tmp_path: Path, make_config: Make, train_many: TrainMany
) -> None:
    """Computed step by step from the full fp32 weights of every step, in another world and stage: equal to the bit."""
    for world, stage in ((1, 1), (2, 3)):
        run_dir = tmp_path / f"{world}-{stage}"
        averaging = ("ema.sigma_rels=[0.2]", "ema.snapshot_every_steps=3")
        settings = ("steps=6", "checkpoint.every_steps=1", f"engine.zero_stage={stage}", *averaging)
        train_many(world, [make_config(run_dir, *settings)])
        saved = [Fragments(open_checkpoint(path)) for path in sorted((run_dir / "checkpoints").glob("step-*"))]
        initial = initial_weights(make_config(run_dir, *settings))
        decays = {ema_name(decay): functools.partial(ema_decay, decay) for decay in (0.99, 0.9)}
        for kind, decay in {**decays, sigma_name(0.2): functools.partial(power_decay, 0.2)}.items():
            averages = {name: weight.clone() for name, weight in initial.items()}
            for update, fragments in enumerate(saved, start=1):
                for name, weight in fragments.full(WEIGHT):
                    averages[name].lerp_(weight, 1 - decay(update))
                for name, stored in fragments.full(kind):
                    assert torch.equal(stored, averages[name]), (world, stage, kind, update, name)
        for step in (3, 6):
            snapshot = Fragments(open_checkpoint(run_dir / "ema" / f"step-{step:08d}"))
            for (name, ours), (_, theirs) in zip(
                snapshot.full(sigma_name(0.2)), saved[step - 1].full(sigma_name(0.2)), strict=True
            ):
                assert torch.equal(ours, theirs), (world, stage, step, name)


def initial_weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    from fmscale.runs import build_model

    torch.manual_seed(config.seed)
    return {name: parameter.detach().clone() for name, parameter in build_model(config).named_parameters()}
