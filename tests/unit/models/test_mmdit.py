"""MMDiT's own promises: positions, initial values, precision, and the user's mistakes."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import nn

from fmscale.errors import UserError
from fmscale.models.families import MODELS
from fmscale.models.initial import initialise, zeros
from fmscale.models.layers import patchify, position_features, repetition_bias, timestep_features, unpatchify
from fmscale.models.mmdit import MMDiT
from fmscale.models.mmdit_names import position_grid

SMALL = {
    "layers": 2,
    "heads": 2,
    "head_dim": 16,
    "latent_channels": 4,
    "context_dim": 12,
    "pooled_dim": 10,
    "pos_embed_max_size": 8,
    "base_size": 4,
}
MEDIUM = SMALL | {"qk_norm": True, "dual_attention_layers": (0,)}


def small_inputs(device: str = "cpu", height: int = 8, width: int = 12) -> tuple[torch.Tensor, ...]:
    shapes = [(3, 4, height, width), (3,), (3, 5, 12), (3, 10)]
    return tuple(torch.rand(shape, device=device) for shape in shapes)


def test_table_builds_the_model() -> None:
    assert isinstance(MODELS["mmdit"](**SMALL), MMDiT)


@pytest.mark.parametrize(("max_size", "base_size"), [(8, 4), (9, 4), (7, 5)])
def test_positions_follow_the_paper(max_size: int, base_size: int) -> None:
    frequency = 10_000**-0.5
    model = MMDiT(layers=1, heads=1, head_dim=8, pos_embed_max_size=max_size, base_size=base_size)
    grid = position_grid(model)[0]
    for row, column in product(range(max_size), repeat=2):
        x, y = ((p - (max_size - base_size) / 2) * 16 / base_size for p in (column, row))
        waves = [(wave(p), wave(p * frequency)) for p in (x, y) for wave in (math.sin, math.cos)]
        expected = torch.tensor([value for pair in waves for value in pair])
        torch.testing.assert_close(grid[row * max_size + column], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("max_size", [7, 8])
def test_every_image_gets_the_centre_of_the_grid(max_size: int) -> None:
    kwargs = {"channels": 8, "max_size": max_size, "origin": 1.5, "step": 0.7}
    whole = position_features(max_size, max_size, **kwargs).unflatten(0, (max_size, max_size))
    for rows, columns in product(range(1, max_size + 1), repeat=2):
        top, left = (max_size - rows) // 2, (max_size - columns) // 2
        centre = whole[top : top + rows, left : left + columns].flatten(0, 1)
        assert torch.equal(position_features(rows, columns, **kwargs), centre)


def test_base_resolution_spans_sixteen_units_whatever_its_size() -> None:
    coarse, fine = (
        MMDiT(layers=1, heads=1, head_dim=16, pos_embed_max_size=size, base_size=base)
        for size, base in ((12, 4), (24, 8))
    )
    every_other = position_grid(fine)[0].unflatten(0, (24, 24))[::2, ::2]
    torch.testing.assert_close(position_grid(coarse)[0], every_other.flatten(0, 1), rtol=0, atol=1e-6)


def test_timesteps_keep_their_precision() -> None:
    features = timestep_features(torch.tensor([0.5, 0.5001], dtype=torch.float32))
    assert features.dtype == torch.float32
    torch.testing.assert_close(features[:, 0], torch.tensor([500.0, 500.1]).cos())
    torch.testing.assert_close(features[:, 128], torch.tensor([500.0, 500.1]).sin())


def test_patches_hold_whole_squares() -> None:
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = patchify(latents, 2)
    assert torch.equal(patches[1, 4].view(3, 2, 2), latents[1, :, 2:4, 2:4])  # five: second row, second column
    channel_last = patches.view(2, 6, 3, 4).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(channel_last, 4, 6, 2), latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repetition_weighs_right_in_every_dtype(dtype: torch.dtype) -> None:
    repeats = torch.tensor([1, 1, 179])
    bias = repetition_bias(repeats, image_tokens=4, dtype=dtype).flatten()
    assert bias.dtype == dtype
    weights = (bias.double() - bias[0].double()).exp()
    torch.testing.assert_close(weights, torch.tensor([1.0, 1, 1, 1, 1, 1, 179]).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stands_for_none_has_no_weight(dtype: torch.dtype) -> None:
    bias = repetition_bias(torch.tensor([[1, 0, 1], [0, 0, 0]]), image_tokens=2, dtype=dtype)
    assert bias.shape == (2, 1, 1, 5)
    assert bias.exp().flatten(1).tolist() == [[1, 1, 1, 0, 1], [1, 1, 0, 0, 0]]


@pytest.mark.parametrize("kwargs", [SMALL, MEDIUM], ids=["small", "medium"])
def test_starts_as_zero_velocity_with_a_gradient(kwargs: dict) -> None:
    model = MMDiT(**kwargs)
    velocity = model(*small_inputs())
    assert velocity.shape == (3, 4, 8, 12)
    assert not velocity.any()
    (velocity - 1).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.proj_out.weight.grad.any()


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = MMDiT(**(MEDIUM | {"heads": 8}))
    weights = dict(model.named_parameters())
    width = 128
    expected_std = {
        "patch_embed.weight": (2 / (16 + width)) ** 0.5,
        "timestep_mlp.up.weight": 0.02,
        "pooled_mlp.down.weight": 0.02,
        "blocks.0.image.mlp.up.weight": (2 / (5 * width)) ** 0.5,
        "blocks.0.image.dual.qkv.linear.weight": (2 / (4 * width)) ** 0.5,
        "blocks.1.text.qkv.linear.weight": (2 / (4 * width)) ** 0.5,
    }
    for name, std in expected_std.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.05), name
    for name, weight in weights.items():
        if ".norm_" in name:
            assert (weight == 1).all(), name
        elif name.endswith("bias") or "modulation" in name or name.startswith("proj_out"):
            assert not weight.any(), name
        else:
            assert weight.std() > 0, name


def test_initialisation_is_one_function_of_the_seed() -> None:
    def build_on_meta() -> MMDiT:
        with torch.device("meta"):
            model = MMDiT(**MEDIUM)
        model.to_empty(device="cpu").initialise()
        return model

    states = []
    for build in (lambda: MMDiT(**MEDIUM), build_on_meta):
        torch.manual_seed(5)
        states.append(build().state_dict())
    model = MMDiT(**MEDIUM)
    model.initialise(torch.Generator().manual_seed(5))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, states[0][name]), name
        assert torch.equal(weight, states[1][name]), name


def test_a_parameter_outside_the_table_is_our_fault() -> None:
    for table in ({"weight": zeros}, {".*": zeros, "bias": zeros}):
        with pytest.raises(AssertionError, match=r"bias fits [02] rows"):
            initialise(nn.Linear(2, 2), table)


def test_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = MMDiT(**MEDIUM)
    assert model(*small_inputs("meta"), repeats=torch.ones(5, dtype=torch.long, device="meta")).shape == (3, 4, 8, 12)


def test_bfloat16_weights_take_float32_inputs() -> None:
    torch.manual_seed(0)
    model, inputs = MMDiT(**MEDIUM), small_inputs()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    expected = model(*inputs)
    velocity = model.to(torch.bfloat16)(*inputs, repeats=torch.ones(5, dtype=torch.long))
    assert velocity.dtype == torch.bfloat16
    assert (velocity - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [(7, 8, "patch_size 2 does not divide latents of 7 x 8"), (8, 18, "covers latents up to 16 x 16, not 8 x 18")],
)
def test_latents_that_do_not_fit(height: int, width: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MMDiT(**SMALL)(*small_inputs(height=height, width=width))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dual_attention_layers": (0, 2)}, r"names layers \[2\]: with 2 layers, use 0 to 1"),
        ({"heads": 1, "head_dim": 6}, "is 6: choose a multiple of 4"),
    ],
)
def test_shapes_that_cannot_be_built(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MMDiT(**(SMALL | wrong))
