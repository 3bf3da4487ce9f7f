from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from fmscale.building import build_network, check_setup
from fmscale.config import FluxConfig, MMDiTConfig, TrainConfig
from fmscale.engine.blocks import recompute
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
    assert ["forward" in vars(layer) for layer in saving] == [
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


@pytest.mark.usefixtures("quick_compiler")
def test_a_run_that_compiles_and_recomputes_is_the_same_run(tmp_path: Path, make_config: Make) -> None:
    """Under ZeRO-3; under the others, and of parts of blocks, `test_compile_ahead` and the tests below."""
    losses = []
    for name, settings in (("plain", ()), ("other", ("engine.compile=true", "engine.recompute_every=1"))):
        config = make_config(tmp_path / name, "engine.zero_stage=3", "steps=3", *settings)
        train(config)
        losses.append([record["loss"] for record in read_metrics(config.run_dir / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


SIZES: dict[str, Any] = {"heads": 2, "head_dim": 8, "latent_channels": 4, "context_dim": 6, "pooled_dim": 5}
# Two kinds of blocks in each: with dual attention and the last one, of two streams and of one.
SMALL = {
    "mmdit": MMDiTConfig(**SIZES, layers=2, pos_embed_max_size=16, dual_attention_layers=(0,)),
    "flux": FluxConfig(**SIZES, family="flux", layers=1, single_layers=1, rope_dims=(2, 2, 4)),
}


def network_of(config: TrainConfig) -> nn.Module:
    """As a run builds it, with open gates."""
    network = build_network(config)
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


def one_step(network: nn.Module, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The velocity at latents of this size, and every gradient of a loss."""
    generator = torch.Generator().manual_seed(size[0])
    shapes = ((3, 4, *size), (3,), (3, 5, 6), (3, 5))
    network.zero_grad()
    velocity = network(*(torch.rand(shape, generator=generator) for shape in shapes))
    velocity.square().sum().backward()
    return {"velocity": velocity.detach()} | {name: weight.grad for name, weight in network.named_parameters()}


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces as ever, and runs what it traced without writing code for it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()


def steps_without_compiling(network: nn.Module, sizes: list[tuple[int, int]]) -> None:
    """Further steps of known buckets in another order; raises where one would be compiled again."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in random.Random(0).sample(sizes, len(sizes)):
            one_step(network, size)


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALL)
def test_compiled_equals_eager_and_each_bucket_compiles_once(family: str, tmp_path: Path, make_config: Make) -> None:
    torch._dynamo.reset()
    counters.clear()
    # The first block of that MMDiT is also its last; blocks whose text goes on are in the FLUX.
    model = SMALL[family].model_copy(update={"layers": 1})
    kinds = 1 if family == "mmdit" else 2
    plain, compiled = (
        network_of(make_config(tmp_path, f"engine.compile={how}").model_copy(update={"model": model}))
        for how in ("false", "true")
    )
    sizes = [(4, 6), (8, 4)]
    for size in sizes:
        ours, expected = one_step(compiled, size), one_step(plain, size)
        largest = max(tensor.norm().item() for tensor in expected.values())
        for name, tensor in expected.items():  # some are 0 but for rounding
            assert (ours[name] - tensor).norm().item() <= 1e-5 * max(tensor.norm().item(), 1e-3 * largest), name
    steps_without_compiling(compiled, 3 * sizes)
    assert counters["stats"]["unique_graphs"] == kinds * len(sizes)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize(("family", "every"), [("mmdit", 0), ("flux", 1)])
def test_a_run_of_many_buckets_compiles_every_block_for_each(
    family: str, every: int, tmp_path: Path, make_config: Make
) -> None:
    """torch would stop at 8 versions of a function, and with checkpoint's own frames it would not begin."""
    settings = ("engine.compile=true", f"engine.recompute_every={every}")
    deeper = SMALL[family].model_copy(update={"layers": 4})
    network = network_of(make_config(tmp_path, *settings).model_copy(update={"model": deeper}))
    kinds = 3 if family == "mmdit" else 2
    sizes = [(4, 2 * columns) for columns in range(1, 13)]
    for size in sizes:
        one_step(network, size)
    steps_without_compiling(network, sizes)
    assert counters["stats"]["unique_graphs"] == kinds * len(sizes)
    assert counters["frames"] == {"total": kinds * len(sizes), "ok": kinds * len(sizes)}
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("how", ["recompute_every=0", "recompute_every=1", "recompute=[mlp]"])
def test_blocks_are_compiled_whole_under_stage_3(how: str, tmp_path: Path, make_config: Make) -> None:
    losses = []
    for compiled in ("false", "true"):
        settings = (f"engine.compile={compiled}", f"engine.{how}", "engine.zero_stage=3", "steps=4")
        config = make_config(tmp_path / compiled, *settings)
        train(config)
        losses.append([record["loss"] for record in read_metrics(config.run_dir / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert counters["stats"]["unique_graphs"] > 0
    assert counters["stats"]["unique_graphs"] == counters["frames"]["total"] == counters["frames"]["ok"]
    assert not counters["graph_break"]


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
