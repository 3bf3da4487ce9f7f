"""What training minimises, and which images train without their text."""

from __future__ import annotations

from collections.abc import Callable

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


def velocity_huber(predicted: Tensor, velocity: Tensor, width: float = 0.00054) -> Tensor:
    """Pseudo-Huber error, per image, in float32: the root of the mean square, rounded off below `width`.

    Images that a network cannot tell weigh as much as those that it nearly can, which keeps distilled ones sharp.

    Args:
        predicted, velocity: as `velocity_mse`.
        width: > 0, in units of the velocity.

    Returns:
        sqrt(mse + width²) - width, shape (B,), float32.

    Source: Song & Dhariwal 2023, arXiv:2310.14189, eq. 7, whose c is width times the root of the dimension.
    """
    return (velocity_mse(predicted, velocity) + width**2).sqrt() - width


# (predicted, wanted, width) -> loss per image (B,)
LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "squared": lambda predicted, velocity, width: velocity_mse(predicted, velocity),
    "huber": velocity_huber,
}


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
