"""From noise to data along the learned velocity, with guidance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fmscale.errors import UserError
from fmscale.flow.path import PATHS, Coefficients
from fmscale.flow.prediction import convert
from fmscale.flow.timesteps import shift_timesteps

T_ROUNDING = 1e-6  # of a float32 t, and of the sums that make a solver's times

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


def check_guidance(interval: tuple[float, float], rescale: float) -> None:
    """Refuse an interval of t that is not within [0, 1], low end first, or a `rescale` that is not.

    Raises:
        UserError: says which.
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise UserError(f"guidance: the interval of t must be two numbers that rise within [0, 1], given {interval}")
    if not 0 <= rescale <= 1:
        raise UserError(f"guidance: rescale must be within [0, 1], given {rescale}")


def is_guided(t: Tensor, interval: tuple[float, float]) -> bool:
    """Whether there is guidance at a solver's t: within the interval, ends among them.

    Args:
        t: shape (B,), one for all images; the GPU is waited for, unless the interval is [0, 1].

    Source: Kynkäänniemi et al. 2024, arXiv:2404.07724.
    """
    low, high = interval
    return interval == (0.0, 1.0) or low - T_ROUNDING <= t.flatten()[0].item() <= high + T_ROUNDING


def guide(towards: Tensor, away: Tensor, guidance_scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance: away from what the network says without text.

    Args:
        towards: velocity with the prompt, shape (B, C, H, W).
        away: with the null or the negative prompt, likewise.
        guidance_scale: 1 is the conditional velocity, 0 the unconditional one.
        rescale: in [0, 1]: how much of the spread that guidance adds to an image's velocity is taken back.

    Source: Ho & Salimans 2022, arXiv:2207.12598, eq. 6, with 1 + w written as one scale; Lin et al. 2023,
        arXiv:2305.08891, eq. 14 to 16 (rescale), for velocity.
    """
    found = away + guidance_scale * (towards - away)
    if rescale == 0:
        return found
    dims = tuple(range(1, found.ndim))
    spread = towards.std(dim=dims, keepdim=True) / found.std(dim=dims, keepdim=True)
    return found * (1 - rescale + rescale * spread)


def _times(t: float, latents: Tensor) -> Tensor:
    return torch.full((latents.shape[0],), t, device=latents.device, dtype=torch.float32)


def euler(velocity: Velocity, noise: Tensor, times: Sequence[float], *, path: str = "rectified") -> Tensor:
    """Explicit Euler steps, one evaluation each, first order.

    Args:
        velocity: the field.
        noise: where to start, shape (B, C, H, W), float32: on a path other than the rectified one `begin` makes it.
        times: falling, from `time_grid` or a scheduler's sigmas.
        path: row of `PATHS` to which the field belongs; `dpm` alone wants to know.

    Returns:
        Latents at the last of `times`, shape and type of `noise`.
    """
    latents = noise
    for now, then in itertools.pairwise(times):
        latents = latents + (then - now) * velocity(latents, _times(now, latents))
    return latents


def heun(velocity: Velocity, noise: Tensor, times: Sequence[float], *, path: str = "rectified") -> Tensor:
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


def midpoint(velocity: Velocity, noise: Tensor, times: Sequence[float], *, path: str = "rectified") -> Tensor:
    """The slope at the middle of a step, found by half an Euler step: two evaluations each, second order.

    Args and Returns: as `euler`. It never evaluates the field at the last of `times`.
    """
    latents = noise
    for now, then in itertools.pairwise(times):
        half = (then - now) / 2
        middle = latents + half * velocity(latents, _times(now, latents))
        latents = latents + (then - now) * velocity(middle, _times(now + half, latents))
    return latents


def rk4(velocity: Velocity, noise: Tensor, times: Sequence[float], *, path: str = "rectified") -> Tensor:
    """The classical Runge-Kutta method: four evaluations each, fourth order.

    Args and Returns: as `euler`.

    Source: Hairer, Nørsett & Wanner 1993, Solving Ordinary Differential Equations I, table II.1.2.
    """
    latents = noise
    for now, then in itertools.pairwise(times):
        step, middle = then - now, _times((now + then) / 2, latents)
        first = velocity(latents, _times(now, latents))
        second = velocity(latents + step / 2 * first, middle)
        third = velocity(latents + step / 2 * second, middle)
        fourth = velocity(latents + step * third, _times(then, latents))
        latents = latents + step / 6 * (first + 2 * second + 2 * third + fourth)
    return latents


def dpm(velocity: Velocity, noise: Tensor, times: Sequence[float], *, path: str = "rectified") -> Tensor:
    """The data that the velocity points to, carried on along its last change: one evaluation each, second order.

    What noise does along the path is followed exactly, so few steps go far. In the log of signal to noise, by which the
    change is measured, the steps from noise itself and to data itself are infinitely long, and take the data as it is.

    Args and Returns: as `euler`.

    Source: Lu et al. 2022, arXiv:2211.01095, alg. 2 (DPM-Solver++(2M)).
    """
    latents, earlier, last_step = noise, noise, math.inf
    for now, then in itertools.pairwise(times):
        at, to = _at(now, path), _at(then, path)
        along = velocity(latents, _times(now, latents))
        data = convert(along, latents, latents.new_full((len(latents),), now), "velocity", "data", path)
        step = _log_snr(to) - _log_snr(at)
        ahead = data + step / (2 * last_step) * (data - earlier) if math.isfinite(step / last_step) else data
        kept = (to.beta / at.beta).item()
        latents = kept * latents + (to.alpha - at.alpha * kept).item() * ahead
        earlier, last_step = data, step
    return latents


def _at(t: float, path: str) -> Coefficients:
    return PATHS[path](torch.tensor(t, dtype=torch.float64))


def _log_snr(at: Coefficients) -> float:
    """log(alpha / beta); infinite at the ends of the rectified path."""
    return (at.alpha.log() - at.beta.log()).item()


def dopri5(
    velocity: Velocity, noise: Tensor, times: Sequence[float], *, path: str = "rectified", tolerance: float = 1e-5
) -> Tensor:
    """Dormand and Prince's method of fifth order, which chooses its own steps.

    Args and Returns: as `euler`, but of `times` the first and the last alone count.
        tolerance: of the error per step, relative and absolute.

    Raises:
        UserError: torchdiffeq is not installed.

    Source: Dormand & Prince 1980, doi:10.1016/0771-050X(80)90013-3, in torchdiffeq.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise UserError("solver: dopri5 needs the package torchdiffeq: pip install 'fmscale[ode]'") from error

    ends = torch.tensor([times[0], times[-1]], device=noise.device, dtype=torch.float64)

    def field(t: Tensor, latents: Tensor) -> Tensor:
        return velocity(latents, t.float().expand(len(latents)))

    no_further = {"step_t": ends[1:]}  # else it steps over the end, where there is no field, and comes back
    return odeint(field, noise, ends, rtol=tolerance, atol=tolerance, method="dopri5", options=no_further)[-1]


Solver = Callable[..., Tensor]  # (velocity, noise, times, *, path) -> latents
SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "heun": heun,
    "midpoint": midpoint,
    "rk4": rk4,
    "dpm": dpm,
    "dopri5": dopri5,
}


def _by_noise(at: Coefficients) -> Tensor:
    return 2 * at.beta


def _constant(at: Coefficients) -> Tensor:
    return torch.ones_like(at.beta)


# coefficients at t -> squared diffusion, before `churn`
DIFFUSIONS: dict[str, Callable[[Coefficients], Tensor]] = {"noise": _by_noise, "constant": _constant}


def stochastic(
    velocity: Velocity,
    noise: Tensor,
    times: Sequence[float],
    generator: torch.Generator,
    *,
    path: str = "rectified",
    diffusion: str = "noise",
    churn: float = 1.0,
) -> Tensor:
    """Euler-Maruyama steps of an equation that adds noise and takes as much away: the field's own marginals at every t.

    dz = (velocity - g² score / 2) dt + g dw, backwards in t, with score = -noise / beta, the noise of `convert`. Fresh
    noise forgives errors of earlier steps, at the price of more steps. The last step adds none.

    Args:
        velocity, noise, times, path: as `euler`.
        generator: of the fresh noise, on the CPU.
        diffusion: row of `DIFFUSIONS`: g² is churn · 2 beta, which vanishes with the noise, or churn.
        churn: >= 0; 0 is `euler`.

    Returns:
        Latents at the last of `times`, shape and type of `noise`.

    Raises:
        UserError: churn < 0.

    Source: Ma et al. 2024, arXiv:2401.08740 (SiT), sec. 2; Song et al. 2021, arXiv:2011.13456, app. D.1.
    """
    if churn < 0:
        raise UserError(f"stochastic sampler: churn must be 0 or more, given {churn}")
    latents, final = noise, len(times) - 2
    for number, (now, then) in enumerate(itertools.pairwise(times)):
        at, t, length = _at(now, path), _times(now, latents), now - then
        along = velocity(latents, t)
        squared = churn * DIFFUSIONS[diffusion](at).item()
        score = -convert(along, latents, t, "velocity", "noise", path) / at.beta.item()
        latents = latents - length * (along - squared / 2 * score)
        if number < final:
            fresh = torch.randn(latents.shape, generator=generator, dtype=latents.dtype).to(latents.device)
            latents = latents + math.sqrt(squared * length) * fresh
    return latents
