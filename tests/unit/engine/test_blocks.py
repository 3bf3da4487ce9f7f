from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fmscale.building import check_setup
from fmscale.config import TrainConfig
from fmscale.engine.blocks import compile_blocks, recompute
from fmscale.engine.metrics import read_metrics
from fmscale.engine.zero import deepspeed_config
from fmscale.errors import UserError
from fmscale.models.mmdit import MMDiT
from fmscale.train import train

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


def make_network() -> MMDiT:
    """Two small blocks whose gates are open, so that every weight has a gradient."""
    torch.manual_seed(0)
    sizes = {"layers": 2, "heads": 2, "head_dim": 8, "latent_channels": 4, "context_dim": 6, "pooled_dim": 5}
    network = MMDiT(**sizes, pos_embed_max_size=8, base_size=4, qk_norm=True, dual_attention_layers=(0,))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


def gradients_and_saved_bytes(network: nn.Module) -> tuple[list[torch.Tensor], int]:
    """Every gradient of a loss, and how much the forward pass kept for the backward pass."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((3, 4, 8, 8), (3,), (3, 5, 6), (3, 5))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = network(*(torch.rand(shape, generator=generator) for shape in shapes)).square().sum()
    saved = sum(kept.values())
    loss.backward()
    return [parameter.grad for parameter in network.parameters()], saved


def test_parts_that_are_named_forget_and_the_gradient_is_the_same_to_the_bit() -> None:
    plain, most = gradients_and_saved_bytes(make_network())
    before = most
    for every, parts in ((0, ["mlp"]), (0, ["mlp", "qkv", "dual"]), (2, ["mlp", "qkv", "dual"]), (1, [])):
        network = make_network()
        recompute(list(network.blocks), every, parts)
        ours, saved = gradients_and_saved_bytes(network)
        assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True)), (every, parts)
        assert saved < before, (every, parts, saved, before)
        before = saved
    assert before < most / 2


def test_a_part_that_no_block_has_is_refused(tmp_path: Path, make_config: Make) -> None:
    with pytest.raises(UserError, match=r"engine\.recompute: the blocks have no 'mpl', only mlp, qkv$"):
        check_setup(make_config(tmp_path / "run", "engine.recompute=[mlp, mpl]"), 1)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_that_recomputes_is_the_same_run(tmp_path: Path, make_config: Make, stage: int) -> None:
    losses = []
    for number, how in enumerate(("recompute_every=0", "recompute_every=1", "recompute=[mlp, qkv]")):
        config = make_config(tmp_path / f"{number}", f"engine.{how}", f"engine.zero_stage={stage}")
        train(config)
        losses.append([record["loss"] for record in read_metrics(config.run_dir / "metrics.jsonl")])
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "how"), [(1, "recompute=[mlp]"), (3, "recompute_every=1")])
def test_a_run_that_compiles_and_recomputes_is_the_same_run(
    tmp_path: Path, make_config: Make, stage: int, how: str
) -> None:
    losses = []
    for name, settings in (("plain", ()), ("other", ("engine.compile=true", f"engine.{how}"))):
        config = make_config(tmp_path / name, f"engine.zero_stage={stage}", "steps=3", *settings)
        train(config)
        losses.append([record["loss"] for record in read_metrics(config.run_dir / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


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
    config, plain = deepspeed_config(2, "bf16", 4, raw=raw), deepspeed_config(2, "bf16", 4)
    assert config["zero_optimization"] == {**plain["zero_optimization"], "overlap_comm": "no", "new": 1}
    assert config["wall_clock_breakdown"] is True
    assert {key for key in config if config[key] != plain.get(key)} == {"zero_optimization", "wall_clock_breakdown"}


@pytest.mark.parametrize("raw", ["{optimizer: {type: Adam}}", "{zero_optimization: {stage: 2}}", "{bf16: {}}"])
def test_settings_that_are_not_the_users_are_refused(tmp_path: Path, make_config: Make, raw: str) -> None:
    with pytest.raises(UserError, match=r"engine\.deepspeed: .* is decided by fmscale's own settings"):
        check_setup(make_config(tmp_path / "run", f"engine.deepspeed={raw}"), 1)
