"""Laws by which training draws t, and the shift that moves them with resolution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fmscale.errors import UserError


def uniform(batch: int, generator: torch.Generator, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """t uniform in [0, 1); `mean` and `std` have no part in it.

    Args:
        batch: number of images B.

    Returns:
        t, shape (B,), float32.
    """
    return torch.rand(batch, generator=generator)


def logit_normal(batch: int, generator: torch.Generator, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """t = sigmoid(u), u ~ N(mean, std²): favours the middle of the path, where the velocity is hardest to tell.

    Args:
        batch: number of images B.
        mean: of the logit; above 0 favours noise.
        std: of the logit, > 0.

    Returns:
        t, shape (B,), float32, in (0, 1).

    Raises:
        UserError: std <= 0.

    Source: Esser et al. 2024, arXiv:2403.03206, sec. 3.1.
    """
    if std <= 0:
        raise UserError(f"logit-normal timesteps: std must be above 0, given {std}")
    return torch.sigmoid(mean + std * torch.randn(batch, generator=generator))


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """Move t towards noise: at m pixels the noise level that at n pixels hid as much is t' with α = sqrt(m / n).

    Args:
        t: any shape, in [0, 1].
        shift: α > 0; 1 changes nothing, above 1 favours noise.

    Returns:
        α t / (1 + (α - 1) t), which keeps 0 and 1 in place.

    Raises:
        UserError: shift <= 0.

    Source: Esser et al. 2024, arXiv:2403.03206, eq. 23.
    """
    if shift <= 0:
        raise UserError(f"timestep shift must be above 0, given {shift}")
    return shift * t / (1 + (shift - 1) * t)


TimestepSampler = Callable[..., Tensor]  # (batch, generator, *, mean, std) -> t (B,)
TIMESTEP_SAMPLERS: dict[str, TimestepSampler] = {"uniform": uniform, "logit_normal": logit_normal}
