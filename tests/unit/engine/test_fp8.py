"""Products in 8 bits, rounded as a GPU rounds them and then multiplied on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fmscale.building import check_setup
from fmscale.config import TrainConfig
from fmscale.distributed import world_from_environment
from fmscale.engine.fp8 import check_fp8, convert
from fmscale.engine.optim import AdamWEMA, parameter_groups
from fmscale.engine.zero import Engine, deepspeed_config, init_process_group
from fmscale.errors import UserError
from fmscale.models.flux import Flux
from fmscale.models.mmdit import MMDiT

pytest.importorskip("torchao", reason="needs the extra `fp8`")
SIZES = {"heads": 4, "latent_channels": 4, "context_dim": 48, "pooled_dim": 32}
Make = Callable[..., TrainConfig]


def make_network(fp8: bool = False, family: str = "mmdit", **sizes: int) -> nn.Module:
    """Two blocks of each kind whose gates are open, so that every weight has a gradient."""
    if family == "mmdit":
        grid = {"pos_embed_max_size": 16, "base_size": 4}
        network: nn.Module = MMDiT(**SIZES, **grid, layers=2, qk_norm=True, **{"head_dim": 16, **sizes})
    else:
        network = Flux(**SIZES, layers=2, single_layers=2, head_dim=16, rope_dims=(4, 6, 6))
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    if fp8:
        convert(network.get_submodule("blocks"), emulate=True)
    return network


def make_inputs() -> tuple[Tensor, ...]:
    """Latents, t, text tokens, whose number is no multiple of 16, and pooled text of three images."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.rand(shape, generator=generator) for shape in ((3, 4, 8, 8), (3,), (3, 7, 48), (3, 32)))


def in_eight_bits(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if type(module).__name__ == "Float8Linear"]


@pytest.mark.parametrize("family", ["mmdit", "flux"])
def test_layers_of_blocks_are_converted_and_parameters_are_the_same_by_name(family: str) -> None:
    network = make_network(family=family)
    before, state = list(network.named_parameters()), list(network.state_dict())
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    convert(network.get_submodule("blocks"), emulate=True)
    after = list(network.named_parameters())
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(one is other for (_, one), (_, other) in zip(before, after, strict=True))
    assert list(network.state_dict()) == state
    assert in_eight_bits(network) == [name for name in linear if name.startswith("blocks.")]
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_layers_with_a_side_that_is_no_multiple_of_sixteen_stay_as_they_are() -> None:
    network = make_network(fp8=True, head_dim=6)  # 24 wide; 72 and 96 beside it
    assert in_eight_bits(network) == []


def gradients(network: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and all gradients, each as one vector."""
    network = network.to(dtype)
    velocity = network(*make_inputs())
    velocity.float().square().mean().backward()
    of_weights = [parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None]
    return velocity.detach().float().flatten(), torch.cat(of_weights).float()


@pytest.mark.parametrize("family", ["mmdit", "flux"])
def test_output_and_gradients_are_near_those_in_bf16(family: str) -> None:
    exact = gradients(make_network(family=family), torch.float32)
    bf16 = gradients(make_network(family=family), torch.bfloat16)
    fp8 = gradients(make_network(True, family), torch.bfloat16)
    for truth, plain, rounded in zip(exact, bf16, fp8, strict=True):
        error, usual = ((found - truth).norm() / truth.norm() for found in (rounded, plain))
        print(f"{family}: {error:.4f} in fp8, {usual:.4f} in bf16")
        assert 2 * usual < error < 0.08


def train(stage: int, fp8: bool) -> tuple[list[float], list[str]]:
    """Losses of 30 steps in which a network learns one batch, and the names of what a checkpoint would hold."""
    init_process_group(world_from_environment())
    network = make_network(fp8)
    optimizer = AdamWEMA(parameter_groups(network, 0.0), lr=3e-3, ema_decays=(0.9,))
    engine = Engine(network, optimizer, deepspeed_config(stage, "bf16", 3), clip_norm=1.0)
    target = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(30):
        loss = (engine(*make_inputs()).float() - target).square().mean()
        engine.backward(loss, last=True)
        assert engine.step(3e-3)
        losses.append(loss.item())
    pieces = list(engine.pieces())
    assert {tensor.dtype for piece in pieces for tensor in piece.tensors.values()} == {torch.float32}
    return losses, [piece.name for piece in pieces]


@pytest.mark.parametrize("stage", [1, 3])
def test_it_trains_under_zero_as_bf16_does(stage: int) -> None:
    (fp8, names), (bf16, same) = train(stage, True), train(stage, False)
    print(f"ZeRO-{stage}: {bf16[0]:.3f} to {bf16[-1]:.3f} in bf16, {fp8[0]:.3f} to {fp8[-1]:.3f} in fp8")
    assert names == same
    assert fp8[0] == pytest.approx(bf16[0], rel=0.02)
    assert max(fp8[-1], bf16[-1]) < 0.1 * bf16[0]
    assert fp8 != bf16


def test_what_cannot_multiply_in_eight_bits_is_refused_before_anything_is_made(
    tmp_path: Path, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp32 = make_config(tmp_path / "run", "engine.fp8=true")
    with pytest.raises(UserError, match=r"^engine\.fp8: is for engine\.dtype=bf16, not fp32"):
        check_setup(fp32, 1)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"^engine\.fp8: needs torchao .*: pip install fmscale\[fp8\]$"):
        check_fp8("bf16", torch.device("cuda"))
    monkeypatch.undo()
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_cpu_is_refused(tmp_path: Path, make_config: Make) -> None:
    with pytest.raises(UserError, match=r"^engine\.fp8: needs a GPU of compute capability 8\.9 or more, there is none"):
        check_setup(make_config(tmp_path / "run", "engine.fp8=true", "engine.dtype=bf16"), 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with 8-bit floats"
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_agrees_with_the_emulation(compiled: bool) -> None:
    device, results = torch.device("cuda", 0), []
    for emulate in (False, True):
        network = make_network().to(device, torch.bfloat16)
        convert(network.get_submodule("blocks"), emulate)
        if compiled and not emulate:
            for block in network.get_submodule("blocks").children():
                block.compile(dynamic=False)
        results.append(network(*(tensor.to(device) for tensor in make_inputs())).float())
    assert (results[0] - results[1]).norm() / results[1].norm() < 0.03
