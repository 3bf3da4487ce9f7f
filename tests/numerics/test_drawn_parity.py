"""Both families against diffusers over configurations that are drawn: forward and every gradient, fp32 and bf16."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch
from parity import copies, distance, draw_inputs, gradients, make_pair, run_ours, run_theirs, their_gradients

DRAWS = 16


class Case(NamedTuple):
    """A configuration.

    Attributes:
        family, values: of the network.
        size: of the latents.
        text: tokens.
    """

    family: str
    values: dict[str, Any]
    size: tuple[int, int]
    text: int


def draw(number: int) -> Case:
    """Configuration `number`: families take turns, all the rest is drawn."""
    rng = random.Random(number)
    heads, half = rng.choice([1, 2, 3, 5]), rng.choice([4, 8, 12])
    layers = rng.randint(1, 4)
    values: dict[str, Any] = {
        "layers": layers,
        "heads": heads,
        "head_dim": 2 * half,
        "latent_channels": rng.choice([4, 16]),
        "context_dim": rng.choice([24, 40]),
        "pooled_dim": rng.choice([16, 24]),
    }
    if number % 2:
        values |= {"single_layers": rng.randint(1, 3), "guidance_embed": rng.random() < 0.5}
        axis = rng.choice([2, half // 2])
        values["rope_dims"] = (2 * half - 2 * axis, axis, axis)
    else:
        dual = [layer for layer in range(layers) if rng.random() < 0.5]
        values |= {"qk_norm": rng.random() < 0.6, "dual_attention_layers": tuple(dual)}
        values |= {"pos_embed_max_size": 16, "base_size": rng.choice([4, 8])}
    size = (2 * rng.randint(1, 12), 2 * rng.randint(1, 12))
    return Case("flux" if number % 2 else "mmdit", values, size, rng.randint(1, 30))


@pytest.mark.parametrize("number", range(DRAWS))
def test_forward_and_every_gradient_equal_diffusers(number: int) -> None:
    case = draw(number)
    torch.manual_seed(number)
    pair = make_pair(case.family, case.values)
    inputs, t = draw_inputs(case.values, case.size, case.text), torch.rand(2)
    guidance = torch.tensor([1.0, 3.5]) if case.values.get("guidance_embed") else None
    theirs = copies(inputs)
    velocity, expected = run_ours(pair, inputs, t, guidance), run_theirs(pair, theirs, t, guidance)
    weight = torch.randn_like(expected)
    (velocity * weight).sum().backward()
    (expected * weight).sum().backward()
    assert distance(velocity, expected) <= 1e-5
    worst = 0.0
    for ours, stock in ((gradients(inputs), gradients(theirs)), their_gradients(pair)):
        assert ours.keys() == stock.keys()
        least = 1e-3 * max(tensor.norm().item() for tensor in stock.values())
        for name, tensor in stock.items():
            # Those of the biases of keys that only one stream reads are 0 but for rounding: softmax takes them away.
            sized = stock[name.replace("bias", "weight")] if name.endswith("to_k.bias") else tensor
            error = (ours[name] - tensor).norm().item() / max(sized.norm().item(), least)
            assert error <= 1e-5, (case, name)
            worst = max(worst, error)
    print(f"{case}: velocity {distance(velocity, expected):.1e}, worst gradient {worst:.1e}")


@pytest.mark.parametrize("number", range(DRAWS))
def test_bfloat16_is_no_further_from_float32_than_twice_diffusers(number: int) -> None:
    case = draw(number)
    torch.manual_seed(number)
    exact = make_pair(case.family, case.values)
    torch.manual_seed(number)
    rounded = make_pair(case.family, case.values, torch.bfloat16)
    exact.theirs.load_state_dict(rounded.theirs.state_dict())  # the same numbers, so that rounding is no part of it
    inputs, t = draw_inputs(case.values, case.size, case.text, batch=4), torch.rand(4)
    guidance = torch.full((4,), 3.5) if case.values.get("guidance_embed") else None
    short = copies(inputs, torch.bfloat16)
    with torch.no_grad():
        expected = run_theirs(exact, {name: value.float() for name, value in short.items()}, t, guidance)
        ours, theirs = run_ours(rounded, short, t, guidance), run_theirs(rounded, short, t, guidance)
    assert ours.dtype == torch.bfloat16
    print(f"{case}: {distance(ours, expected):.1e}, of diffusers {distance(theirs, expected):.1e}")
    assert distance(ours, expected) <= 2 * min(distance(theirs, expected), 1e-2)  # diffusers' FLUX rounds the time too
