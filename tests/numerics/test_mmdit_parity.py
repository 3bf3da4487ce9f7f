"""MMDiT against diffusers' SD3Transformer2DModel: same weights, same numbers, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from fmscale.models.mmdit import MMDiT
from fmscale.models.mmdit_names import diffusers_config, diffusers_form, to_diffusers
from fmscale.models.published import publish

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}  # of its norm; diffusers' RMS norm is float32 at best
SMALL = {
    "layers": 3,
    "heads": 3,
    "head_dim": 16,
    "latent_channels": 4,
    "context_dim": 40,
    "pooled_dim": 24,
    "pos_embed_max_size": 12,
    "base_size": 4,
}
FAMILY = {
    "sd3": {},
    "sd3.5-medium": {"qk_norm": True, "dual_attention_layers": (0, 1)},
    "sd3.5-large": {"qk_norm": True},
    "dual to the end": {"qk_norm": True, "dual_attention_layers": (0, 2)},
}
SIZES = [(8, 8), (6, 20), (24, 4), (10, 14)]  # latent pixels; square, wide, as tall as the grid, odd patch counts


def randomised(kwargs: dict, dtype: torch.dtype = torch.float32) -> MMDiT:
    """A model in which every parameter is random and none is zero: zeros would hide errors."""
    torch.manual_seed(0)
    model = MMDiT(**kwargs)
    for name, parameter in model.named_parameters():
        offset = 1.0 if ".norm_" in name else 0.0
        torch.nn.init.normal_(parameter, mean=offset, std=parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.1)
    return model.to(dtype)


def stock(model: MMDiT, kwargs: dict) -> SD3Transformer2DModel:
    """diffusers' network with the weights of ours."""
    theirs = SD3Transformer2DModel(**diffusers_config(kwargs, sample_size=16))
    theirs.to(model.proj_out.weight.dtype).load_state_dict(to_diffusers(model.state_dict(), model))
    return theirs


def draw_inputs(kwargs: dict, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "latents": (2, kwargs["latent_channels"], *size),
        "context": (2, 7, kwargs["context_dim"]),
        "pooled": (2, kwargs["pooled_dim"]),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for name, shape in shapes.items()
    }


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        distance, scale = (ours[name] - expected).norm().item(), expected.norm().item()
        assert distance <= TOLERANCE[expected.dtype] * scale, f"{name}: {distance} away, norm {scale}"


def weights_like(velocity: Tensor) -> Tensor:
    """The gradient that a test sends back through the network."""
    return torch.randn(velocity.shape, generator=torch.Generator().manual_seed(2), dtype=velocity.dtype)


def gradients(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: tensor.grad for name, tensor in tensors.items()}
    assert all(grad is not None for grad in found.values())
    return found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("member", FAMILY)
def test_forward_and_every_gradient_equal_diffusers(member: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    kwargs = SMALL | FAMILY[member]
    ours = randomised(kwargs, dtype)
    theirs = stock(ours, kwargs)
    inputs, t = draw_inputs(kwargs, size, dtype), torch.tensor([0.03, 0.87])
    their_inputs = copies(inputs)

    velocity = ours(inputs["latents"], t, inputs["context"], inputs["pooled"])
    expected = theirs(their_inputs["latents"], their_inputs["context"], their_inputs["pooled"], 1000 * t)[0]
    assert_same({"velocity": velocity}, {"velocity": expected})

    weight = weights_like(expected)
    (velocity * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_same(gradients(inputs), gradients(their_inputs))
    by_their_names = publish(gradients(dict(ours.named_parameters())), ours, diffusers_form)
    assert_same(by_their_names, gradients(dict(theirs.named_parameters())))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 16), (torch.float64, 256)], ids=str)
@pytest.mark.parametrize("member", FAMILY)
def test_a_repeated_token_equals_its_repetitions(member: str, dtype: torch.dtype, most: int) -> None:
    kwargs = SMALL | FAMILY[member]
    model, repeats, t = randomised(kwargs, dtype), torch.tensor([1, 3, 1, 1, 1, 1, most]), torch.tensor([0.4, 1.0])
    short = draw_inputs(kwargs, (8, 12), dtype)
    explicit = copies(short)

    velocity = model(short["latents"], t, short["context"], short["pooled"], repeats)
    weight = weights_like(velocity)
    (velocity * weight).sum().backward()
    ours = gradients(dict(model.named_parameters()))
    model.zero_grad(set_to_none=True)
    expected = model(explicit["latents"], t, explicit["context"].repeat_interleave(repeats, dim=1), explicit["pooled"])
    (expected * weight).sum().backward()

    assert_same({"velocity": velocity}, {"velocity": expected})
    assert_same(gradients(short), gradients(explicit))
    assert_same(ours, gradients(dict(model.named_parameters())))


@pytest.mark.parametrize(
    ("kwargs", "parameters"),
    [
        ({"layers": 24, "heads": 24}, 2_028_328_000),
        (
            {
                "layers": 24,
                "heads": 24,
                "pos_embed_max_size": 384,
                "qk_norm": True,
                "dual_attention_layers": tuple(range(13)),
            },
            2_243_171_520,
        ),
        ({"layers": 38, "heads": 38, "qk_norm": True}, 8_056_627_520),
    ],
    ids=["sd3-medium", "sd3.5-medium", "sd3.5-large"],
)
def test_published_sizes(kwargs: dict, parameters: int) -> None:
    with torch.device("meta"):
        model = MMDiT(**kwargs)
        expected = SD3Transformer2DModel(**diffusers_config(kwargs, sample_size=128))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert sum(parameter.numel() for parameter in expected.parameters()) == parameters
