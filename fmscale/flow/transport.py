"""Minibatch optimal transport: which noise of a micro-batch goes with which of its latents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fmscale.errors import UserError


def squared_distances(latents: Tensor, noise: Tensor) -> Tensor:
    """What it costs to bring each noise to each of the latents, shape (B, B), float64, on the CPU."""
    return torch.cdist(latents.flatten(1).double(), noise.flatten(1).double()).square().cpu()


def exact(cost: Tensor, generator: torch.Generator | None = None, *, blur: float = 0.05) -> Tensor:
    """The permutation of least total cost: about B³ operations, 1 ms for 64 images, 0.1 s for 1,000.

    Args:
        cost: shape (B, B), on the CPU: of row i (latents) with column j (noise).
        generator: has no part in it; nor has blur.

    Returns:
        The noise of each of the latents, shape (B,), int64.

    Source: Crouse 2016, doi:10.1109/TAES.2016.140952, in scipy; Pooladian et al. 2023, arXiv:2304.14772.
    """
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1]).long()


def sinkhorn_plan(cost: Tensor, blur: float) -> Tensor:
    """How much of each noise goes with each of the latents where the plan's entropy is worth `blur` mean costs.

    Args:
        cost: shape (B, B), on the CPU.
        blur: > 0; small is near the exact plan and slow, large near independence.

    Returns:
        Shape (B, B), float64, sums to 1 over each row.

    Raises:
        UserError: POT is not installed, or blur <= 0.

    Source: Cuturi 2013, arXiv:1306.0895, in POT.
    """
    if blur <= 0:
        raise UserError(f"sinkhorn: blur must be above 0, given {blur}")
    try:
        import ot
    except ImportError as error:
        raise UserError("sinkhorn needs the package POT: pip install 'fmscale[ot]', or take `exact`") from error
    temperature = blur * cost.mean().item()
    method = "sinkhorn" if cost.max().item() < 500 * temperature else "sinkhorn_log"  # exp(-745) is 0; logs are slow
    plan = torch.from_numpy(ot.sinkhorn([], [], cost.numpy(), temperature, method, stopThr=1e-6, warn=False))
    return plan / plan.sum(dim=1, keepdim=True)


def sinkhorn(cost: Tensor, generator: torch.Generator | None = None, *, blur: float = 0.05) -> Tensor:
    """Noise drawn for each of the latents from the entropic plan: about B² operations an iteration, for large batches.

    Args:
        cost: as `exact`.
        generator: on the CPU.
        blur: as `sinkhorn_plan`.

    Returns:
        The noise of each of the latents, shape (B,), int64. One may be drawn twice and another not at all.

    Source: Tong et al. 2023, arXiv:2302.00482, alg. 3.
    """
    return torch.multinomial(sinkhorn_plan(cost, blur), 1, generator=generator).squeeze(1)


TRANSPORTS: dict[str, Callable[..., Tensor]] = {"exact": exact, "sinkhorn": sinkhorn}


def transport(
    method: str,
    latents: Tensor,
    noise: Tensor,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    blur: float = 0.05,
) -> Tensor:
    """Which noise each image of a micro-batch takes: `noise[transport(...)]` goes with `latents`.

    Args:
        method: row of `TRANSPORTS`.
        latents: shape (B, C, H, W).
        noise: same shape, drawn independently of the latents.
        weight: shape (B,); slots of weight 0, padding or damaged, keep their noise and lend it to none, as do those
            whose latents are not finite. None is all 1.
        generator: on the CPU; for `sinkhorn`.
        blur: for `sinkhorn`, see `sinkhorn_plan`.

    Returns:
        Shape (B,), int64, on the device of `noise`.

    Source: Tong et al. 2023, arXiv:2302.00482; Pooladian et al. 2023, arXiv:2304.14772.
    """
    chosen = torch.arange(len(latents))
    counts = latents.flatten(1).isfinite().all(dim=1).cpu()
    live = chosen[counts if weight is None else counts & (weight.cpu() > 0)]
    if len(live) > 1:
        cost = squared_distances(latents[live], noise[live])
        chosen[live] = live[TRANSPORTS[method](cost, generator, blur=blur)]
    return chosen.to(noise.device)
