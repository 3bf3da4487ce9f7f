"""From noise to data along the learned velocity, with guidance."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fmscale.errors import UserError
from fmscale.flow.timesteps import shift_timesteps

Velocity = Callable[[Tensor, Tensor], Tensor]  # (noisy_latents (B, C, H, W), t (B,)) -> velocity (B, C, H, W)


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """The times that a solver visits: `steps` + 1 values from 1 (noise) to 0 (data), even before the shift.

    Args:
        steps: > 0.
        shift: as in training, see `shift_timesteps`.

    Raises:
        UserError: steps <= 0.
    """
    if steps <= 0:
        raise UserError(f"a solver takes at least one step, given {steps}")
    return shift_timesteps(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()


def guide(velocity: Velocity, unconditional: Velocity, guidance_scale: float) -> Velocity:
    """Classifier-free guidance: away from what the network says without text.

    Args:
        velocity: with the prompt.
        unconditional: with the null or the negative prompt.
        guidance_scale: 1 is the conditional velocity, 0 the unconditional one.

    Source: Ho & Salimans 2022, arXiv:2207.12598, eq. 6, with 1 + w written as one scale.
    """

    def guided(noisy_latents: Tensor, t: Tensor) -> Tensor:
        away = unconditional(noisy_latents, t)
        return away + guidance_scale * (velocity(noisy_latents, t) - away)

    return guided


def _times(t: float, latents: Tensor) -> Tensor:
    return torch.full((latents.shape[0],), t, device=latents.device, dtype=torch.float32)


def euler(velocity: Velocity, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Explicit Euler steps, one evaluation each, first order.

    Args:
        velocity: the field.
        noise: where to start, shape (B, C, H, W), float32.
        times: falling, from `time_grid` or a scheduler's sigmas.

    Returns:
        Latents at the last of `times`, shape and type of `noise`.
    """
    latents = noise
    for now, then in itertools.pairwise(times):
        latents = latents + (then - now) * velocity(latents, _times(now, latents))
    return latents


def heun(velocity: Velocity, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Heun's method: the mean of the slopes at both ends of a step, two evaluations each, second order.

    Args and Returns: as `euler`.

    Source: Karras et al. 2022, arXiv:2206.00364, alg. 1, without its Euler last step: our field is defined at t = 0.
    """
    latents = noise
    for now, then in itertools.pairwise(times):
        first = velocity(latents, _times(now, latents))
        second = velocity(latents + (then - now) * first, _times(then, latents))
        latents = latents + (then - now) * (first + second) / 2
    return latents


SOLVERS: dict[str, Callable[[Velocity, Tensor, Sequence[float]], Tensor]] = {"euler": euler, "heun": heun}
