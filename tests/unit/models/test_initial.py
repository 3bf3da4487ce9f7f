"""What a network is before it has learned anything: each block is the identity, and no activation grows with depth."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmscale.models.families import build

SIZES = {"heads": 4, "head_dim": 32, "latent_channels": 16, "context_dim": 64, "pooled_dim": 32}
DEEP: dict[str, dict[str, Any]] = {
    "mmdit": {**SIZES, "layers": 12, "pos_embed_max_size": 16, "dual_attention_layers": (0, 1, 2)},
    "flux": {**SIZES, "layers": 5, "single_layers": 7, "rope_dims": (8, 12, 12), "guidance_embed": True},
}


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The output for random inputs, and that of each module within the blocks, the image's where there are two."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [part.register_forward_hook(keep(name)) for name, part in model.named_modules() if "blocks." in name]
    inputs = (torch.randn(2, 16, 16, 24), torch.rand(2), torch.randn(2, 20, 64), torch.randn(2, 32))
    with torch.no_grad():
        output = model(*inputs)
    for handle in handles:
        handle.remove()
    return output, seen


def depth_of(name: str) -> int:
    return int(name.split(".")[1])


@pytest.mark.parametrize("family", DEEP)
def test_each_block_is_the_identity_and_the_velocity_is_zero(family: str) -> None:
    torch.manual_seed(0)
    model = build(family, DEEP[family])
    output, seen = run(model)
    assert not output.any()
    blocks = [seen[f"blocks.{number}"] for number in range(12)]
    size = blocks[0].shape[1]
    for block in blocks[1:]:
        assert torch.equal(block[:, :size], blocks[0])


@pytest.mark.parametrize("family", DEEP)
def test_no_activation_grows_or_dies_with_depth(family: str) -> None:
    """Also where all gates are open, as after long training, the variance grows by a sum over layers, not a product."""
    torch.manual_seed(0)
    model = build(family, DEEP[family])
    width = 4 * 32
    for name, parameter in model.named_parameters():
        if name == "modulation.bias":
            gates = parameter.detach().view(-1, width)
            first = 0
            for rows in model.rows[:-1]:  # type: ignore[index, union-attr]
                gates[first : first + rows][2::3] = 1.0
                first += rows
    output, seen = run(model)
    assert not output.any()
    branches = {name: value.std().item() for name, value in seen.items() if name.endswith((".out", ".leave", ".down"))}
    assert len(branches) > 12
    for name, std in branches.items():
        assert 0.03 < std < 1.5, f"{name}: {std}"
    stds = [seen[f"blocks.{number}"].std().item() for number in range(12)]
    assert all(later > earlier for earlier, later in pairwise(stds))
    assert stds[-1] ** 2 - stds[0] ** 2 < 2 * 12, stds
    logits = [value for name, value in seen.items() if name.endswith("qkv.linear")]
    for value in logits:
        query, key, _ = value.chunk(3, dim=-1)
        assert 0.3 < query.std().item() < 1.5
        assert 0.3 < key.std().item() < 1.5
