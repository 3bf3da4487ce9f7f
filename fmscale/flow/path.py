"""The straight path between data and noise, and its velocity."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PathSample(NamedTuple):
    """A point on the path and what the network should say there.

    Attributes:
        noisy_latents: shape (B, C, H, W).
        velocity: the derivative of noisy_latents by t, same shape.
    """

    noisy_latents: Tensor
    velocity: Tensor


def expand_like(t: Tensor, latents: Tensor) -> Tensor:
    """`t`, shape (B,), with as many trailing dimensions of size 1 as `latents` has beyond its first."""
    return t.reshape(-1, *[1] * (latents.ndim - 1))


def interpolate(latents: Tensor, noise: Tensor, t: Tensor) -> PathSample:
    """The rectified-flow path: a straight line from data to noise.

    Args:
        latents: clean, VAE-scaled, shape (B, C, H, W), float32.
        noise: standard normal, same shape.
        t: shape (B,), in [0, 1].

    Returns:
        z_t = (1 - t) latents + t noise, and its velocity noise - latents.

    Source: Esser et al. 2024, arXiv:2403.03206, eq. 13; Liu et al. 2022, arXiv:2209.03003.
    """
    t = expand_like(t, latents)
    return PathSample((1 - t) * latents + t * noise, noise - latents)
