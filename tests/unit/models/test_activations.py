"""What is kept for the backward pass, in closed form, against what autograd is given to keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from live import Live
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from fmscale.engine.blocks import prepare
from fmscale.flow.loss import velocity_mse
from fmscale.models.activations import Activations, activations
from fmscale.models.families import build

Bucket = tuple[int, int, int, int]
Parts = tuple[str, ...]

SIZES = {"layers": 3, "heads": 4, "head_dim": 32, "latent_channels": 4, "patch_size": 2, "context_dim": 48}
PLAIN = {**SIZES, "family": "mmdit", "pooled_dim": 32, "pos_embed_max_size": 64, "base_size": 16, "qk_norm": False} | {
    "dual_attention_layers": (),
}
NORMED = {**PLAIN, "qk_norm": True}
DUAL = {**PLAIN, "dual_attention_layers": (0, 1)}
DUAL_NORMED = {**NORMED, "dual_attention_layers": (0, 2), "leap_embed": True}
FLUX = {**SIZES, "family": "flux", "pooled_dim": 32, "single_layers": 2, "rope_dims": (8, 12, 12)} | {
    "guidance_embed": True,
}
MODELS = {"plain": PLAIN, "normed": NORMED, "dual": DUAL, "dual_normed": DUAL_NORMED, "flux": FLUX}
BUCKETS = SQUARE, LANDSCAPE, PORTRAIT = (16, 16, 7, 1), (12, 20, 40, 3), (24, 16, 23, 2)  # height, width, text, batch
FORGETTING = [(0, ()), (1, ()), (2, ()), (0, ("mlp",)), (0, ("qkv",)), (2, ("mlp", "qkv"))]
CASES = [
    (name, BUCKETS[(row + column) % 3], *how)
    for row, name in enumerate(MODELS)
    for column, how in enumerate(FORGETTING)
] + [(name, LANDSCAPE, *how) for name in ("dual", "dual_normed") for how in ((0, ("dual",)), (3, ("dual", "qkv")))]
BFLOAT16_STATISTICS = 0.005  # the CPU keeps those of layer norms in bfloat16, GPUs in float32


def network_of(model: dict[str, Any], dtype: torch.dtype, every: int, parts: Parts) -> nn.Module:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # fake weights cannot be cast
    try:
        network = build(model["family"], model)
    finally:
        torch.set_default_dtype(torch.float32)
    prepare(network.blocks, every, parts, compiled=False)
    return network


def batch_of(model: dict[str, Any], bucket: Bucket) -> tuple[Tensor, ...]:
    """Latents, times, text, pooled text, velocity."""
    height, width, text_tokens, batch = bucket
    latents = (batch, model["latent_channels"], height, width)
    shapes = (latents, (batch,), (batch, text_tokens, model["context_dim"]), (batch, model["pooled_dim"]), latents)
    return tuple(torch.rand(shape) for shape in shapes)


def counted(network: nn.Module, batch: tuple[Tensor, ...], **more: Tensor) -> int:
    """Bytes that autograd is given to keep, weights aside; several tensors in one memory count once."""
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other gets its place
        return tensor

    *given, velocity = batch
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = velocity_mse(network(*given, **more), velocity).sum()
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def most_at_a_time(network: nn.Module, batch: tuple[Tensor, ...]) -> int:
    """Bytes of all that is made in a forward and backward pass, at its peak, gradients of weights aside."""
    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    *given, velocity = batch
    with Live({tuple(parameter.shape) for parameter in network.parameters() if parameter.dim() == 2}) as live:
        velocity_mse(network(*given), velocity).sum().backward()
    return live.most


def closed_form(
    model: dict[str, Any],
    bucket: Bucket,
    dtype: torch.dtype,
    every: int = 0,
    parts: Parts = (),
    fused_norm: bool = False,
) -> Activations:
    return activations(model, *bucket, dtype.itemsize, every, parts, fused_norm)


def unseen(model: dict[str, Any], bucket: Bucket, every: int) -> int:
    """Bytes of cosines and sines: where every block forgets, nothing but its arguments holds them."""
    height, width, text_tokens, _ = bucket
    return (height * width // 4 + text_tokens) * model["head_dim"] * 4 if model is FLUX and every == 1 else 0


@pytest.mark.parametrize(("name", "bucket", "every", "parts"), CASES)
def test_the_closed_form_is_what_autograd_keeps(name: str, bucket: Bucket, every: int, parts: Parts) -> None:
    model, batch = MODELS[name], batch_of(MODELS[name], bucket)
    for dtype, error in ((torch.float32, 0), (torch.bfloat16, BFLOAT16_STATISTICS)):
        saved = closed_form(model, bucket, dtype, every, parts).saved - unseen(model, bucket, every)
        found = counted(network_of(model, dtype, every, parts), batch)
        assert found <= saved <= found * (1 + error), dtype


@pytest.mark.parametrize(
    ("name", "bucket", "every", "parts"), [case for case in CASES if case[0] in ("dual_normed", "flux")]
)
def test_the_closed_form_is_what_autograd_keeps_on_gpus(
    name: str, bucket: Bucket, every: int, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake ones: tensors without memory, which choose their kernels, but for that of attention, as on a GPU."""

    def flash(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
        assert attn_mask is None
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    monkeypatch.setattr(functional, "scaled_dot_product_attention", flash)
    model = MODELS[name]
    with FakeTensorMode(), torch.device("cuda"):
        found = counted(network_of(model, torch.bfloat16, every, parts), batch_of(model, bucket))
    saved = closed_form(model, bucket, torch.bfloat16, every, parts, True).saved - unseen(model, bucket, every)
    assert saved == pytest.approx(found, rel=0.001)  # the kernel also keeps its random state


@pytest.mark.parametrize("how", FORGETTING[:4])
@pytest.mark.parametrize(
    ("name", "bucket", "dtype"),
    [("plain", PORTRAIT, torch.float32), ("dual_normed", SQUARE, torch.bfloat16), ("flux", LANDSCAPE, torch.float32)],
)
def test_the_peak_is_right_within_a_tenth(
    name: str, bucket: Bucket, dtype: torch.dtype, how: tuple[int, Parts]
) -> None:
    model, batch = MODELS[name], batch_of(MODELS[name], bucket)
    found = most_at_a_time(network_of(model, dtype, *how), batch)
    assert 0.98 * found < sum(closed_form(model, bucket, dtype, *how)) < 1.08 * found


@pytest.mark.parametrize("model", [PLAIN, FLUX], ids=["mmdit", "flux"])
def test_a_bias_of_the_attention_is_too_little_to_count(model: dict[str, Any]) -> None:
    repeats = torch.randint(1, 9, (LANDSCAPE[3], LANDSCAPE[2]))
    found = counted(network_of(model, torch.float32, 0, ()), batch_of(model, LANDSCAPE), repeats=repeats)
    saved = closed_form(model, LANDSCAPE, torch.float32).saved
    assert saved < found < 1.01 * saved


@pytest.mark.parametrize("count", [counted, most_at_a_time])
@pytest.mark.parametrize("model", [DUAL_NORMED, FLUX], ids=["mmdit", "flux"])
def test_what_forgets_keeps_less(count: Callable[..., int], model: dict[str, Any]) -> None:
    """Of the counters themselves: one that missed what is kept would be of no use to the tests above."""
    batch, settings = batch_of(model, SQUARE), [(0, ()), (0, ("mlp",)), (1, ())]
    found = [count(network_of(model, torch.float32, *setting), batch) for setting in settings]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0] / 2


def test_stable_diffusion_3_medium() -> None:
    """The dominant terms by hand: 21 rows of each token in each of 24 blocks, in bf16."""
    model = {**PLAIN, "layers": 24, "heads": 24, "head_dim": 64, "latent_channels": 16} | {
        "context_dim": 4096,
        "pooled_dim": 2048,
    }
    image, text = 64 * 64, 333
    rows = 24 * 21 * (image + text) - (21 - 7) * text
    assert activations(model, 128, 128, text, 4, 2).saved == pytest.approx(4 * rows * 1536 * 2, rel=0.02)
