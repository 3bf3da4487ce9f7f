"""How likely a sample is under the field that would make it: the continuous change of variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fmscale.errors import UserError
from fmscale.flow.path import begin
from fmscale.flow.solver import SOLVERS, Velocity


def exact_divergence(field: Tensor, at: Tensor, probes: Sequence[Tensor]) -> Tensor:
    """The trace of the field's Jacobian, by one backward pass for each dimension: for a few hundred of them at most.

    Args:
        field: velocity, shape (B, N), a function of `at` image by image.
        at: shape (B, N), requires grad.
        probes: none are needed.

    Returns:
        Shape (B,).
    """
    columns = range(at.shape[1])
    return sum((_gradient(field[:, column], at)[:, column] for column in columns), torch.zeros_like(at[:, 0]))


def probed_divergence(field: Tensor, at: Tensor, probes: Sequence[Tensor]) -> Tensor:
    """An estimate of the same without bias: the mean of e · (Jacobian e) over probes e of unit covariance.

    Args:
        probes: shape (B, N) each.

    Source: Hutchinson 1990, doi:10.1080/03610919008812866; Grathwohl et al. 2018, arXiv:1810.01367, sec. 3.1.
    """
    found = [(_gradient(field * probe, at) * probe).sum(dim=1) for probe in probes]
    return torch.stack(found).mean(dim=0)


def _gradient(values: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(values.sum(), at, retain_graph=True)[0]


def _rademacher(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator) * 2.0 - 1.0


def _gaussian(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    return torch.randn(tuple(shape), generator=generator)


Probe = Callable[[Sequence[int], torch.Generator | None], Tensor]
DIVERGENCES: dict[str, Probe | None] = {"exact": None, "rademacher": _rademacher, "gaussian": _gaussian}


def log_likelihood(
    velocity: Velocity,
    latents: Tensor,
    times: Sequence[float],
    *,
    divergence: str = "exact",
    probes: int = 1,
    generator: torch.Generator | None = None,
    solver: str = "rk4",
    path: str = "rectified",
) -> Tensor:
    """Natural log of the density that the field gives to latents: log p(z_1) + ∫ div velocity dt over [0, 1].

    On a path that does not reach data, they are points of its t = 0; on one that does not reach noise, z_1 counts as
    normal all the same, of standard deviation beta(1).

    Args:
        velocity: the field, a function image by image.
        latents: shape (B, C, H, W).
        times: rising from 0 to 1, such as `time_grid(n)[::-1]`.
        divergence: row of `DIVERGENCES`: exact, or estimated with probes of ±1 or of normal numbers.
        probes: how many, drawn once and kept along the way.
        generator: of the probes, on the CPU.
        solver: row of `SOLVERS`, any but `dpm`.
        path: row of `PATHS`.

    Returns:
        Shape (B,), type of `latents`, in nats.

    Raises:
        UserError: the solver is `dpm`, or probes < 1.

    Source: Chen et al. 2018, arXiv:1806.07366, eq. 8; Lipman et al. 2022, arXiv:2210.02747, app. C.
    """
    if solver == "dpm" or probes < 1:
        raise UserError(f"log-likelihood takes any solver but dpm and at least one probe, given {solver}, {probes}")
    batch, shape = len(latents), latents.shape
    draw = DIVERGENCES[divergence]
    kept = [] if draw is None else [draw((batch, latents[0].numel()), generator).to(latents) for _ in range(probes)]
    measure = exact_divergence if draw is None else probed_divergence

    def field(state: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            at = state[:, :-1].detach().requires_grad_()
            along = velocity(at.reshape(shape), t).flatten(1)
            spreading = measure(along, at, kept)
        return torch.cat([along.detach(), spreading.detach()[:, None]], dim=1)

    start = torch.cat([latents.flatten(1), latents.new_zeros(batch, 1)], dim=1)
    end = SOLVERS[solver](field, start, times)
    deviation = begin(torch.ones((), dtype=torch.float64), path).item()
    noise = end[:, :-1] / deviation
    normal = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(dim=1) - noise.shape[1] * math.log(deviation)
    return normal + end[:, -1]
