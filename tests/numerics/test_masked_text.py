"""Padding that is not seen: both families on a padded batch against diffusers on each caption's own tokens alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import Pair, copies, distance, gradients, make_pair, run_theirs, their_gradients
from torch import Tensor

from fmscale.batch import Conditioning
from fmscale.encoders.text import TRIM_TOKENS, assemble, trim

SHARED = {"layers": 3, "heads": 2, "head_dim": 16, "latent_channels": 4, "context_dim": 40, "pooled_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "mmdit": {**SHARED, "qk_norm": True, "dual_attention_layers": (0,), "pos_embed_max_size": 16, "base_size": 8},
    "flux": {**SHARED, "single_layers": 2, "rope_dims": (4, 6, 6), "guidance_embed": False},
}
CLIP_TOKENS, T5_TOKENS = 10, 70
COUNTS = {"clip_l": [3, 8], "clip_g": [5, 8], "t5": [4, 200]}  # the last is cut


def features_of(family: str) -> dict[str, Tensor]:
    """Features of two captions, the second one longer, whose padding holds large numbers that would show."""
    shapes = {"t5": (2, T5_TOKENS, 40), "clip_l_pooled": (2, 16)}
    if family == "mmdit":
        shapes |= {"clip_l": (2, CLIP_TOKENS, 12), "clip_g": (2, CLIP_TOKENS, 20)}
        shapes |= {"clip_l_pooled": (2, 6), "clip_g_pooled": (2, 10)}
    features = {name: torch.randn(shape) for name, shape in shapes.items()}
    for role in COUNTS.keys() & features.keys():
        features[f"{role}_count"] = torch.tensor(COUNTS[role])
        for row, count in enumerate(COUNTS["clip_g" if role == "clip_l" else role]):  # the larger one holds for both
            features[role][row, count:] = 30.0
    return features


def velocities(pair: Pair, latents: Tensor, t: Tensor, given: Conditioning) -> Tensor:
    velocity: Tensor = pair.ours(latents, t, given.context, given.pooled, given.repeats)
    return velocity


def row_of(given: Conditioning, row: int) -> Conditioning:
    assert given.repeats is not None
    one = slice(row, row + 1)
    return Conditioning(given.context[one], given.pooled[one], given.repeats[one])


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_every_gradient_equal_diffusers_on_trimmed_text(family: str) -> None:
    torch.manual_seed(0)
    pair = make_pair(family, FAMILIES[family])
    given, latents, t = (
        assemble(features_of(family), context_dim=40),
        torch.randn(2, 4, 8, 12),
        torch.tensor([0.3, 0.9]),
    )
    velocity = velocities(pair, latents, t, given)
    weight = torch.randn_like(velocity)
    (velocity * weight).sum().backward()
    assert given.repeats is not None
    own = [4 if family == "flux" else 5 + 4, 70 if family == "flux" else 8 + 70]
    assert given.repeats.sum(dim=1).tolist() == own
    for row, seen in enumerate(given.repeats.bool()):
        alone = {"latents": latents[row], "context": given.context[row, seen], "pooled": given.pooled[row]}
        expected = run_theirs(pair, copies({name: tensor[None] for name, tensor in alone.items()}), t[row : row + 1])
        assert distance(velocity[row : row + 1], expected) <= 1e-5
        (expected * weight[row]).sum().backward()
    ours, stock = their_gradients(pair)
    assert ours.keys() == stock.keys()
    least = 1e-3 * max(tensor.norm().item() for tensor in stock.values())
    for name, tensor in stock.items():
        assert (ours[name] - tensor).norm().item() <= 1e-5 * max(tensor.norm().item(), least), name


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_s_velocity_depends_on_no_other_and_not_on_trimming(family: str) -> None:
    torch.manual_seed(1)
    pair = make_pair(family, FAMILIES[family])
    given, latents, t = (
        assemble(features_of(family), context_dim=40),
        torch.randn(2, 4, 8, 12),
        torch.tensor([0.3, 0.9]),
    )
    with torch.no_grad():
        together = velocities(pair, latents, t, given)
        for row in range(2):
            alone = row_of(given, row)
            short = trim(alone)
            assert short.context.shape[1] == (TRIM_TOKENS if row == 0 else min(given.context.shape[1], 3 * TRIM_TOKENS))
            one = slice(row, row + 1)
            for conditioning in (alone, short):
                velocity = velocities(pair, latents[one], t[one], conditioning)
                assert distance(velocity, together[one]) <= 1e-6
        assert distance(velocities(pair, latents, t, Conditioning(given.context, given.pooled)), together) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_seen_of_a_text_is_no_reason_for_nan(family: str) -> None:
    """As of a slot that is padding, in bfloat16, forward and backward."""
    torch.manual_seed(2)
    ours = make_pair(family, FAMILIES[family], torch.bfloat16).ours
    features = {name: torch.zeros_like(value) for name, value in features_of(family).items()}
    given = assemble(features, context_dim=40)
    velocity = ours(torch.randn(2, 4, 8, 12), torch.rand(2), given.context, given.pooled, given.repeats)
    velocity.square().sum().backward()
    found = gradients(dict(ours.named_parameters()))
    assert all(tensor.isfinite().all() for tensor in (velocity, *found.values()))
