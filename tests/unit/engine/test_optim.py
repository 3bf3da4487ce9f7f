"""AdamW with averages: the weights of torch's AdamW, and averages by their definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fmscale.engine.optim import AdamWEMA, ema_decay, ema_name, parameter_groups, sigma_name
from fmscale.engine.posthoc import exponent
from fmscale.engine.schedule import learning_rate
from fmscale.models.mmdit import MMDiT

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}


def make_gradients(shape: tuple[int, ...], steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def test_weights_are_those_of_adamw() -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6)) for _ in range(2))
    with_ema = AdamWEMA([ours], ema_decays=(0.9,), **SETTINGS)
    without = torch.optim.AdamW([theirs], fused=True, **SETTINGS)
    for gradient in make_gradients((4, 6), steps=20):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        with_ema.step()
        without.step()
    assert torch.equal(ours, theirs)


def test_averages_are_those_of_the_definition() -> None:
    param = nn.Parameter(torch.ones(5))
    optimizer = AdamWEMA([param], ema_decays=(0.9, 0.999), **SETTINGS)
    expected = {decay: param.detach().double() for decay in (0.9, 0.999)}
    for update, gradient in enumerate(make_gradients((5,), steps=60), start=1):
        param.grad = gradient
        optimizer.step()
        for decay, average in expected.items():
            now = min(decay, (1 + update) / (10 + update))
            expected[decay] = now * average + (1 - now) * param.detach().double()
    for decay, average in expected.items():
        assert torch.allclose(optimizer.state[param][ema_name(decay)].double(), average, atol=1e-6)


def test_a_parameter_without_gradient_keeps_weight_and_average() -> None:
    still, moving = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamWEMA([still, moving], ema_decays=(0.5,), **SETTINGS)
    moving.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(still, torch.ones(3))
    assert not optimizer.state[still]
    assert not torch.equal(moving, torch.ones(3))


def test_the_decay_rises_to_its_final_value() -> None:
    decays = [ema_decay(0.99, update) for update in range(1, 2000)]
    assert decays[0] == pytest.approx(2 / 11)
    assert decays == sorted(decays)
    assert decays[-1] == 0.99


def test_without_warmup_the_decay_is_final_at_once() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamWEMA([param], ema_decays=(0.9,), ema_warmup=False, **SETTINGS)
    param.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(optimizer.state[param][ema_name(0.9)], 0.9 + 0.1 * param.detach())


def test_power_functions_weigh_the_history() -> None:
    """Weight i of n counts (i^(γ+1) − (i−1)^(γ+1)) / n^(γ+1): for the smallest γ nearly the mean."""
    param = nn.Parameter(torch.ones(5))
    optimizer = AdamWEMA([param], ema_sigma_rels=(0.05, 0.2), **SETTINGS)
    history = []
    for gradient in make_gradients((5,), steps=40):
        param.grad = gradient
        optimizer.step()
        history.append(param.detach().double().clone())
    for sigma in (0.05, 0.2):
        edges = (torch.arange(41, dtype=torch.float64) / 40) ** (exponent(sigma) + 1)
        expected = (edges.diff()[:, None] * torch.stack(history)).sum(0)
        assert torch.allclose(optimizer.state[param][sigma_name(sigma)].double(), expected, atol=1e-6)


def several_averages(size: int) -> tuple[AdamWEMA, nn.Parameter]:
    param = nn.Parameter(torch.linspace(-1, 1, size))
    optimizer = AdamWEMA([param], ema_decays=(0.9, 0.99), ema_sigma_rels=(0.1,), **SETTINGS)
    optimizer.init_state(param)
    return optimizer, param


def test_an_update_of_averages_makes_no_temporaries() -> None:
    """All that it allocates, added up, is below 1 % of one average."""
    optimizer, param = several_averages(4_000_000)
    optimizer.set_updates(param, 10)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.update_averages([param])
        spare = torch.empty(100)  # so that a profiler that sees nothing is found out
    taken = sum(max(0, event.nbytes()) for event in allocations(profiler))
    assert spare.nbytes <= taken <= 0.01 * param.nbytes


def allocations(profiler: torch.profiler.profile) -> list[Any]:
    """Every growth or shrinkage of memory that was seen."""
    assert profiler.profiler is not None
    return [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]


class Reads(TorchDispatchMode):
    """Counts how often a number is taken from a tensor, for which a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device() -> None:
    optimizer, param = several_averages(100)
    with Reads() as reads:
        param.grad = torch.ones(100)
        optimizer.step()
    assert reads.count == 0
    assert optimizer.updates(param) == 1
    with reads:
        param.sum().item()
    assert reads.count == 1


def test_the_count_of_updates_goes_with_the_state() -> None:
    (one, first), (other, second) = several_averages(8), several_averages(8)
    first.grad = torch.ones(8)
    one.step()
    one.set_updates(first, 7)
    with torch.no_grad():
        second.copy_(first)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert other.updates(second) == 7
    first.grad, second.grad = torch.ones(8), torch.ones(8)
    one.step()
    other.step()
    assert torch.equal(first, second)
    for name in one.averages:
        assert torch.equal(one.state[first][name], other.state[second][name])


def test_which_parameters_of_an_mmdit_decay() -> None:
    sizes = {"heads": 2, "head_dim": 4, "latent_channels": 4, "context_dim": 6, "pooled_dim": 5}
    model = MMDiT(layers=2, pos_embed_max_size=8, base_size=4, qk_norm=True, dual_attention_layers=(0,), **sizes)
    names = {id(param): name for name, param in model.named_parameters()}
    decaying, others = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1))
    stream = ("qkv.linear", "out", "mlp.up", "mlp.down")
    layers = {
        *("patch_embed", "context_embed", "timestep_mlp.up", "timestep_mlp.down", "pooled_mlp.up", "pooled_mlp.down"),
        *(f"blocks.0.image.{layer}" for layer in (*stream, "dual.qkv.linear", "dual.out")),
        *(f"blocks.0.text.{layer}" for layer in stream),
        *(f"blocks.1.image.{layer}" for layer in stream),
        *("blocks.1.text.qkv.linear", "modulation", "proj_out"),  # the last text is read and not updated
    }
    norms = {
        *(
            f"blocks.{i}.{stream}.qkv.norm_{which}.weight"
            for i in (0, 1)
            for stream in ("image", "text")
            for which in "qk"
        ),
        *(f"blocks.0.image.dual.qkv.norm_{which}.weight" for which in "qk"),
    }
    assert decaying == {f"{layer}.weight" for layer in layers}
    assert others == {f"{layer}.bias" for layer in layers} | norms


def test_norms_and_embeddings_of_any_shape_do_not_decay() -> None:
    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 4)
            self.positions = nn.Parameter(torch.zeros(3, 4))
            self.norm = nn.LayerNorm((3, 4))
            self.patches = nn.Conv2d(3, 4, 2)

    model = Others()
    matrices, others = parameter_groups(model, 0.1)
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert [p is model.patches.weight for p in matrices["params"]] == [True]
    assert {id(p) for p in others["params"]} == {id(p) for p in model.parameters()} - {id(model.patches.weight)}


@pytest.mark.parametrize(
    ("step", "schedule", "expected"),
    [
        (0, "constant", 0.1),
        (9, "constant", 1.0),
        (10, "constant", 1.0),
        (10_000, "constant", 1.0),
        (4, "cosine", 0.5),
        (10, "cosine", 1.0),
        (60, "cosine", 0.5),  # half way between the end of warm-up and step 110
        (110, "cosine", 0.0),
        (500, "cosine", 0.0),
    ],
)
def test_learning_rate(step: int, schedule: str, expected: float) -> None:
    rate = learning_rate(step, peak=1.0, warmup_steps=10, schedule=schedule, decay_steps=110)
    assert rate == pytest.approx(expected, abs=1e-12)
