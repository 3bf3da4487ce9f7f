"""Runs that begin with published weights, in any world and stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fmscale.config import TrainConfig
from fmscale.engine.checkpoint import Fragments, open_checkpoint
from fmscale.engine.optim import ema_name
from fmscale.engine.zero import WEIGHT
from fmscale.models.families import build
from fmscale.models.mmdit_names import original_form
from fmscale.models.published import publish

pytestmark = pytest.mark.slow

Make = Callable[..., TrainConfig]
Losses = Callable[[Path], dict[int, float]]
TrainMany = Callable[[int, Sequence[TrainConfig]], None]
STILL = ("optimizer.lr=1e-30", "optimizer.weight_decay=0", "optimizer.warmup_steps=0")  # nothing moves by so little
SETTINGS = ("steps=1", "checkpoint.every_steps=1", *STILL)


def write_bare(folder: Path, make_config: Make) -> tuple[Path, dict[str, Tensor]]:
    """Random weights without norms of queries and keys, in a file under Stability AI's names; and by our names."""
    bare = build("mmdit", make_config(folder).model.model_dump() | {"qk_norm": False})
    state = {name: torch.randn(weight.shape) for name, weight in bare.state_dict().items()}
    theirs = publish(state, bare, original_form)
    file = folder / "bare.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in theirs.items()}, file)
    return file, state


@pytest.mark.parametrize(("world", "stages", "dtype"), [(1, (1, 3), "fp32"), (3, (2, 3), "fp32"), (2, (1, 3), "bf16")])
def test_every_rank_begins_with_its_part_of_the_file(
    tmp_path: Path, make_config: Make, train_many: TrainMany, world: int, stages: tuple[int, ...], dtype: str
) -> None:
    """Weights and averages, to the bit; the norms that the file lacks are 1."""
    file, state = write_bare(tmp_path, make_config)
    settings = (*SETTINGS, f"model.init_from={file}", f"engine.dtype={dtype}")
    configs = [make_config(tmp_path / str(stage), *settings, f"engine.zero_stage={stage}") for stage in stages]
    train_many(world, configs)
    for config in configs:
        fragments = Fragments(open_checkpoint(config.run_dir / "checkpoints" / "step-00000001"))
        for kind in (WEIGHT, ema_name(0.99), ema_name(0.9)):
            for name, found in fragments.full(kind):
                assert torch.equal(found, state.get(name, torch.ones_like(found))), (config.run_dir, kind, name)


def test_the_first_step_sees_the_weights_and_a_resumed_run_needs_them_no_more(
    tmp_path: Path, make_config: Make, train_many: TrainMany, losses: Losses
) -> None:
    settings = (*SETTINGS, f"model.init_from={write_bare(tmp_path, make_config)[0]}", "engine.zero_stage=3")
    run = make_config(tmp_path / "run", *settings)
    train_many(2, [run])
    alone, from_scratch = make_config(tmp_path / "alone", *settings), make_config(tmp_path / "scratch", *SETTINGS)
    train_many(1, [alone, from_scratch])
    assert losses(run.run_dir)[1] == pytest.approx(losses(alone.run_dir)[1], rel=1e-5)
    assert losses(run.run_dir)[1] != pytest.approx(losses(from_scratch.run_dir)[1], rel=0.01)
    (tmp_path / "bare.safetensors").unlink()
    train_many(2, [make_config(tmp_path / "run", *settings, "steps=2")])
    assert len(losses(run.run_dir)) == 2
