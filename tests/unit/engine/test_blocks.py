from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fmscale.config import TrainConfig
from fmscale.engine.blocks import compile_blocks, recompute
from fmscale.engine.metrics import read_metrics
from fmscale.engine.zero import deepspeed_config
from fmscale.errors import UserError
from fmscale.train import check_setup, train

Make = Callable[..., TrainConfig]


def stack(every: int) -> tuple[nn.Sequential, list[int]]:
    """Four layers, and a list that grows by the number of each that computes."""
    torch.manual_seed(0)
    ran: list[int] = []
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    recompute(list(layers), every)
    return layers, ran


@pytest.mark.parametrize("every", [0, 1, 2, 3])
def test_chosen_blocks_compute_twice_and_give_the_same_gradient(every: int) -> None:
    inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    plain, _ = stack(0)
    saving, _ = stack(every)
    calls: list[int] = []
    for number, layer in enumerate(saving):
        weight = layer.weight
        weight.register_hook(lambda grad, number=number: calls.append(number))
    for model in (plain, saving):
        model(inputs).square().sum().backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert sorted(calls) == [0, 1, 2, 3]
    assert [isinstance(vars(layer).get("forward"), object) and "forward" in vars(layer) for layer in saving] == [
        bool(every) and number % every == 0 for number in range(4)
    ]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_that_recomputes_is_the_same_run(tmp_path: Path, make_config: Make, stage: int) -> None:
    losses = []
    for every in (0, 1):
        config = make_config(tmp_path / f"{every}", f"engine.recompute_every={every}", f"engine.zero_stage={stage}")
        train(config)
        losses.append([record["loss"] for record in read_metrics(config.run_dir / "metrics.jsonl")])
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradient() -> None:
    inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    (plain, _), (compiled, _) = stack(0), stack(0)
    compile_blocks(list(compiled))
    for model in (plain, compiled):
        model(inputs).square().sum().backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_raw_deepspeed_settings_are_laid_over_ours() -> None:
    raw = {"zero_optimization": {"overlap_comm": "no", "new": 1}, "wall_clock_breakdown": True}
    config, plain = deepspeed_config(2, "bf16", 4, 1.0, raw), deepspeed_config(2, "bf16", 4, 1.0)
    assert config["zero_optimization"] == {**plain["zero_optimization"], "overlap_comm": "no", "new": 1}
    assert config["wall_clock_breakdown"] is True
    assert {key for key in config if config[key] != plain.get(key)} == {"zero_optimization", "wall_clock_breakdown"}


@pytest.mark.parametrize("raw", ["{optimizer: {type: Adam}}", "{zero_optimization: {stage: 2}}", "{bf16: {}}"])
def test_settings_that_are_not_the_users_are_refused(tmp_path: Path, make_config: Make, raw: str) -> None:
    with pytest.raises(UserError, match=r"engine\.deepspeed: .* is decided by fmscale's own settings"):
        check_setup(make_config(tmp_path / "run", f"engine.deepspeed={raw}"), 1)
