"""What a network may be asked for, and how each answer gives the others."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fmscale.flow.path import PATHS, Coefficients, coefficients_like

LEAST_SHARE = 1e-3  # of data or noise in a point, by which is divided


def _velocity_from_data(data: Tensor, noisy: Tensor, at: Coefficients) -> Tensor:
    return (at.beta_rate * noisy - at.turning * data) / at.beta.clamp(min=LEAST_SHARE)


def _velocity_from_noise(noise: Tensor, noisy: Tensor, at: Coefficients) -> Tensor:
    return (at.alpha_rate * noisy + at.turning * noise) / at.alpha.clamp(min=LEAST_SHARE)


def _data(velocity: Tensor, noisy: Tensor, at: Coefficients) -> Tensor:
    return (at.beta_rate * noisy - at.beta * velocity) / at.turning


def _noise(velocity: Tensor, noisy: Tensor, at: Coefficients) -> Tensor:
    return (at.alpha * velocity - at.alpha_rate * noisy) / at.turning


_TO_VELOCITY: dict[str, Callable[[Tensor, Tensor, Coefficients], Tensor]] = {
    "velocity": lambda velocity, noisy, at: velocity,
    "data": _velocity_from_data,
    "noise": _velocity_from_noise,
}
_FROM_VELOCITY: dict[str, Callable[[Tensor, Tensor, Coefficients], Tensor]] = {
    "velocity": lambda velocity, noisy, at: velocity,
    "data": _data,
    "noise": _noise,
}

# (latents, noise, velocity) -> what a network that predicts this should say
PREDICTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "velocity": lambda latents, noise, velocity: velocity,
    "data": lambda latents, noise, velocity: latents,
    "noise": lambda latents, noise, velocity: noise,
}


def convert(
    predicted: Tensor, noisy_latents: Tensor, t: Tensor, given: str, wanted: str, path: str = "rectified"
) -> Tensor:
    """One prediction from another, at the same point: all of them solve z = alpha data + beta noise, v = alpha' data +
    beta' noise, so the point must be without bandwidth.

    At its ends a path loses what is divided by: where beta is 0 data says nothing of the velocity, where alpha is 0
    noise does not. A share below 1e-3 counts as 1e-3, so that the answer is finite there, and not exact.

    Args:
        predicted: shape (B, C, H, W).
        noisy_latents: z_t, same shape.
        t: shape (B,), in [0, 1].
        given, wanted: rows of `PREDICTIONS`.
        path: row of `PATHS`.

    Returns:
        Shape and type of `predicted`.

    Source: Lipman et al. 2024, arXiv:2412.06264, table 1.
    """
    if given == wanted:
        return predicted
    at = coefficients_like(t, noisy_latents, path)
    return _FROM_VELOCITY[wanted](_TO_VELOCITY[given](predicted, noisy_latents, at), noisy_latents, at)


def as_velocity(
    network: Callable[[Tensor, Tensor], Tensor], prediction: str, path: str = "rectified"
) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity field of a network (noisy_latents, t) -> `prediction`, as solvers take it.

    Where a path reaches data itself, a network of data should not be asked there: `heun`, `rk4` and `dopri5` would,
    `euler`, `midpoint` and `dpm` do not. Where it reaches noise itself, no solver can start from a network of noise.
    """

    def velocity(noisy_latents: Tensor, t: Tensor) -> Tensor:
        return convert(network(noisy_latents, t), noisy_latents, t, prediction, "velocity", path)

    return velocity


def implied_weight(t: Tensor, prediction: str, path: str = "rectified") -> Tensor:
    """The weight on the velocity's squared error that the plain squared error of a prediction amounts to.

    Args:
        t: shape (B,), in [0, 1].
        prediction: row of `PREDICTIONS`.
        path: row of `PATHS`.

    Returns:
        Shape (B,): 1 for velocity, (beta / turning)² for data, (alpha / turning)² for noise.

    Source: Kingma & Gao 2023, arXiv:2303.00848; on the rectified path t² and (1 - t)².
    """
    at = PATHS[path](t)
    share = {"velocity": at.turning, "data": at.beta, "noise": at.alpha}[prediction]
    return (share / at.turning).square()
