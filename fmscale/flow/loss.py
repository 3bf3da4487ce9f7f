"""What training minimises, and which images train without their text."""

from __future__ import annotations

import torch
from torch import Tensor


def velocity_mse(predicted: Tensor, velocity: Tensor) -> Tensor:
    """Mean squared error of the velocity, per image, in float32.

    Args:
        predicted: the network's velocity, shape (B, C, H, W), any float type.
        velocity: the target, same shape.

    Returns:
        Shape (B,), float32.

    Source: Esser et al. 2024, arXiv:2403.03206, eq. 7 in the form of sec. 2 for rectified flow.
    """
    return (predicted.float() - velocity.float()).square().flatten(1).mean(dim=1)


def draw_dropped(batch: int, encoders: int, rate: float, generator: torch.Generator) -> Tensor:
    """Which text encoders are dropped for which images, such that a share `rate` of images loses all of them.

    Args:
        batch: number of images B.
        encoders: number of text encoders k.
        rate: in [0, 1]; each encoder is dropped independently with probability rate^(1/k).

    Returns:
        Shape (B, k), bool, True = dropped.

    Source: Esser et al. 2024, arXiv:2403.03206, sec. 5.3 and app. B (k = 3, 46.4 %).
    """
    probability = rate ** (1 / encoders) if rate > 0 else 0.0
    return torch.rand(batch, encoders, generator=generator) < probability
