"""FLOPs in closed form against torch's own count, on the meta device: no difference at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fmscale.engine.blocks import recompute
from fmscale.models.families import MODELS
from fmscale.models.flops import FLOPS, Flops, mmdit_flops, peak_flops

SIZES = {"layers": 3, "heads": 2, "head_dim": 16, "latent_channels": 4, "patch_size": 2, "context_dim": 48}
SMALL = {**SIZES, "pooled_dim": 32, "pos_embed_max_size": 192, "base_size": 16, "qk_norm": False} | {
    "dual_attention_layers": (),
}
FLUX = {**SIZES, "pooled_dim": 32, "single_layers": 4, "rope_dims": (4, 6, 6), "guidance_embed": False}
SD3_MEDIUM = {**SMALL, "layers": 24, "heads": 24, "head_dim": 64, "latent_channels": 16} | {
    "context_dim": 4096,
    "pooled_dim": 2048,
}
WIDE = {**SD3_MEDIUM, "layers": 3}  # what many layers would add takes long to count, and is the same
CASES = [  # model, latent height and width, text tokens, recompute_every
    (SMALL, (8, 8), 7, 0),
    ({**SMALL, "qk_norm": True, "dual_attention_layers": (0, 2)}, (16, 8), 1, 0),
    ({**SMALL, "patch_size": 4, "heads": 5}, (16, 32), 12, 1),
    ({**SMALL, "layers": 1}, (8, 24), 3, 0),
    ({**SMALL, "layers": 5, "dual_attention_layers": (4,)}, (8, 8), 7, 2),
    (WIDE, (48, 80), 333, 2),
    ({**WIDE, "qk_norm": True, "dual_attention_layers": (0, 1), "pos_embed_max_size": 384}, (128, 128), 333, 0),
    ({**WIDE, "heads": 38, "qk_norm": True}, (64, 64), 154, 1),
    ({**WIDE, "layers": 7}, (32, 32), 78, 3),
    (FLUX, (8, 8), 7, 0),
    ({**FLUX, "guidance_embed": True}, (16, 8), 1, 1),
    ({**FLUX, "layers": 1, "single_layers": 5}, (8, 24), 3, 2),
    ({**FLUX, "heads": 24, "head_dim": 128, "rope_dims": (16, 56, 56), "context_dim": 4096}, (64, 64), 512, 3),
]


def counted(family: str, model: dict[str, Any], size: tuple[int, int], text_tokens: int, every: int) -> Flops:
    """The same by running it, for a batch of two."""
    batch = 2
    with torch.device("meta"):
        network = MODELS[family](**model)
        given = (
            torch.empty(batch, model["latent_channels"], *size),
            torch.empty(batch),
            torch.empty(batch, text_tokens, model["context_dim"]),
            torch.empty(batch, model["pooled_dim"]),
            torch.ones(text_tokens, dtype=torch.int64),
        )
        totals, between = [], 0
        for backward, again in ((False, 0), (True, 0), (True, every)):
            recompute(list(network.blocks), again)
            with FlopCounterMode(display=False) as counter:
                output = network(*given)
                if backward:
                    output.sum().backward()
            totals.append(counter.get_total_flops() // batch)
            if backward and not again:
                by_operation = counter.get_flop_counts()["Global"]
                between = sum(count for name, count in by_operation.items() if str(name) == "aten.bmm") // batch
    forward, train_step, with_recomputation = totals
    return Flops(forward, train_step, between, with_recomputation - train_step)


@pytest.mark.parametrize(("model", "size", "text_tokens", "every"), CASES)
def test_the_closed_form_is_the_count(
    model: dict[str, Any], size: tuple[int, int], text_tokens: int, every: int
) -> None:
    family = "flux" if "single_layers" in model else "mmdit"
    assert FLOPS[family](model, *size, text_tokens, every) == counted(family, model, size, text_tokens, every)


@pytest.mark.parametrize(("side", "teraflops"), [(32, 2.525), (64, 6.318), (128, 26.708)])
def test_stable_diffusion_3_medium(side: int, teraflops: float) -> None:
    assert mmdit_flops(SD3_MEDIUM, side, side, 333).train_step / 1e12 == pytest.approx(teraflops, rel=1e-4)


@pytest.mark.parametrize(
    ("device", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12),
        ("NVIDIA H100 PCIe", 756.5e12, 51.2e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 19.5e12),
        ("A100-PCIE-40GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
    ],
)
def test_devices_are_known_by_name(device: str, bf16: float, fp32: float) -> None:
    assert peak_flops(device, "bf16") == pytest.approx(bf16)
    assert peak_flops(device, "fp32") == pytest.approx(fp32)


@pytest.mark.parametrize(
    "device",
    ["cpu", "Tesla V100-SXM2-16GB", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"]
    + ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"],
)
def test_a_device_that_only_sounds_like_one_is_unknown(device: str) -> None:
    assert peak_flops(device, "bf16") is None
