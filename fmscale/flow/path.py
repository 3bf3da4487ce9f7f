"""Paths between data and noise, and their velocity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fmscale.errors import UserError

VP_RATES = (0.1, 20.0)  # of the diffusion at t = 0 and at t = 1
VP_FIRST = 1e-3  # where on the diffusion's own time our t = 0 lies: at 0 itself, beta rises infinitely fast
VE_SIGMAS = (0.01, 50.0)  # standard deviation of the noise at t = 0 and at t = 1


class Coefficients(NamedTuple):
    """How much data and noise there is at t, and how fast that changes.

    Attributes:
        alpha: of the data, shape of t.
        beta: of the noise, likewise.
        alpha_rate: derivative of alpha by t.
        beta_rate: derivative of beta by t.
    """

    alpha: Tensor
    beta: Tensor
    alpha_rate: Tensor
    beta_rate: Tensor

    @property
    def turning(self) -> Tensor:
        """alpha beta' - alpha' beta, above 0: with it, (noisy_latents, velocity) give data and noise."""
        return self.alpha * self.beta_rate - self.alpha_rate * self.beta


class PathSample(NamedTuple):
    """A point on the path and what the network should say there.

    Attributes:
        noisy_latents: shape (B, C, H, W).
        velocity: the derivative of noisy_latents by t, same shape.
    """

    noisy_latents: Tensor
    velocity: Tensor


def rectified(t: Tensor) -> Coefficients:
    """A straight line: from data itself to noise itself, at constant speed.

    Args:
        t: any shape, in [0, 1], float32 or float64.

    Source: Liu et al. 2022, arXiv:2209.03003; the conditional optimal-transport path of Lipman et al. 2022,
        arXiv:2210.02747, eq. 20, with its sigma_min = 0.
    """
    return Coefficients(1 - t, t, -torch.ones_like(t), torch.ones_like(t))


def cosine(t: Tensor) -> Coefficients:
    """A quarter of a circle: from data itself to noise itself; alpha² + beta² = 1. At t = 1 alpha is 0 up to rounding.

    Args: as `rectified`.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17 without its offset; Albergo & Vanden-Eijnden 2022,
        arXiv:2209.15571.
    """
    angle, speed = t * (math.pi / 2), math.pi / 2
    alpha, beta = torch.cos(angle), torch.sin(angle)
    return Coefficients(alpha, beta, -speed * beta, speed * alpha)


def variance_preserving(t: Tensor) -> Coefficients:
    """The diffusion of DDPM in continuous time; alpha² + beta² = 1.

    It reaches neither end: at t = 0 beta is 0.0105, at t = 1 alpha is 0.0066.

    Args: as `rectified`.

    Source: Song et al. 2021, arXiv:2011.13456, app. C, from 1e-3 on as it samples.
    """
    least, most = VP_RATES
    time, stretch = VP_FIRST + (1 - VP_FIRST) * t, 1 - VP_FIRST
    integral = time * least + time**2 * (most - least) / 2
    rate = (least + time * (most - least)) * stretch
    alpha, beta = torch.exp(-integral / 2), torch.sqrt(-torch.expm1(-integral))
    return Coefficients(alpha, beta, -rate / 2 * alpha, rate / 2 * alpha**2 / beta)


def variance_exploding(t: Tensor) -> Coefficients:
    """All of the data throughout, under noise that grows geometrically.

    It reaches neither end: at t = 0 noise of 0.01 stays, at t = 1 the data is still there, under noise of 50. So
    sampling starts from `begin(noise)`, and a network wants its input times `input_scale`.

    Args: as `rectified`.

    Source: Song et al. 2021, arXiv:2011.13456, app. C.
    """
    least, most = VE_SIGMAS
    beta = least * torch.exp(t * math.log(most / least))
    return Coefficients(torch.ones_like(t), beta, torch.zeros_like(t), beta * math.log(most / least))


PATHS: dict[str, Callable[[Tensor], Coefficients]] = {
    "rectified": rectified,
    "cosine": cosine,
    "variance_preserving": variance_preserving,
    "variance_exploding": variance_exploding,
}


def expand_like(t: Tensor, latents: Tensor) -> Tensor:
    """`t`, shape (B,), with as many trailing dimensions of size 1 as `latents` has beyond its first."""
    return t.reshape(-1, *[1] * (latents.ndim - 1))


def coefficients_like(t: Tensor, latents: Tensor, path: str) -> Coefficients:
    """The path's coefficients at `t`, shape (B,), shaped as `expand_like` does."""
    return PATHS[path](expand_like(t, latents))


def interpolate(
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    path: str = "rectified",
    sigma: float = 0.0,
    jitter: Tensor | None = None,
) -> PathSample:
    """A point between data and noise, and the velocity with which it moves there.

    Args:
        latents: clean, VAE-scaled, shape (B, C, H, W), float32.
        noise: standard normal, same shape.
        t: shape (B,), in [0, 1].
        path: row of `PATHS`.
        sigma: bandwidth, >= 0: the point is normal around the path's mean with this standard deviation, at all t.
        jitter: standard normal, same shape, independent of `noise`; needed where sigma is above 0.

    Returns:
        z_t = alpha latents + beta noise + sigma jitter, and its velocity alpha' latents + beta' noise: a constant
        bandwidth moves with the mean.

    Raises:
        UserError: sigma < 0, or above 0 without jitter.

    Source: Esser et al. 2024, arXiv:2403.03206, eq. 13; Lipman et al. 2022, arXiv:2210.02747, theorem 3; sigma as in
        Tong et al. 2023, arXiv:2302.00482, eq. 14.
    """
    if sigma < 0 or (sigma > 0 and jitter is None):
        raise UserError(f"the path's sigma must be 0, or above 0 with noise of its own, given {sigma}")
    alpha, beta, alpha_rate, beta_rate = coefficients_like(t, latents, path)
    mean = alpha * latents + beta * noise
    velocity = alpha_rate * latents + beta_rate * noise
    return PathSample(mean if jitter is None or sigma == 0 else mean + sigma * jitter, velocity)


def begin(noise: Tensor, path: str = "rectified") -> Tensor:
    """Where sampling starts: standard normal noise times beta(1), which is 50 where variance explodes, else 1."""
    return noise * PATHS[path](torch.ones((), device=noise.device, dtype=noise.dtype)).beta


def input_scale(t: Tensor, path: str = "rectified") -> Tensor:
    """What brings a point down to at most unit variance where the data has it: a network takes input_scale · z_t.

    Args:
        t: shape (B,).
        path: row of `PATHS`.

    Returns:
        1 / sqrt(max(1, alpha² + beta²)), shape (B,): 1, but on the path whose variance explodes.

    Source: Karras et al. 2022, arXiv:2206.00364, table 1 (c_in), with data of unit variance.
    """
    alpha, beta, _, _ = PATHS[path](t)
    return (alpha**2 + beta**2).clamp(min=1).rsqrt()
