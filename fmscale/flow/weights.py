"""Weights of the loss by t: how much each part of the path counts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fmscale.errors import UserError
from fmscale.flow.path import PATHS

LEAST_SHARE = 1e-3  # of data or noise in a point, by which is divided: no weight is above 10^6 for it


def none(t: Tensor, path: str = "rectified", prediction: str = "velocity", *, gamma: float = 5.0) -> Tensor:
    """Every t counts as the plain squared error of what is predicted makes it count.

    Args:
        t: shape (B,), in [0, 1].
        path: row of `PATHS`.
        prediction: row of `PREDICTIONS`, whose squared error is to be weighted.
        gamma: the largest signal-to-noise ratio that counts, for `min_snr` alone.

    Returns:
        Shape (B,), type of t; here 1.
    """
    return torch.ones_like(t)


def snr(t: Tensor, path: str = "rectified", prediction: str = "velocity", *, gamma: float = math.inf) -> Tensor:
    """Signal to noise, alpha² / beta², on the squared error of the data, whatever is predicted: every prediction then
    trains as one of noise does without weights, as in DDPM.

    Args and Returns: as `none`.

    Source: Salimans & Ho 2022, arXiv:2202.00512, sec. 4.
    """
    return _on_data(t, path, prediction, math.inf)


def min_snr(t: Tensor, path: str = "rectified", prediction: str = "velocity", *, gamma: float = 5.0) -> Tensor:
    """As `snr`, up to a signal-to-noise ratio of gamma: points that are almost data do not drown the others.

    Args and Returns: as `none`.

    Raises:
        UserError: gamma <= 0.

    Source: Hang et al. 2023, arXiv:2303.09556, which has it for each prediction.
    """
    if gamma <= 0:
        raise UserError(f"min-SNR weights: gamma must be above 0, given {gamma}")
    return _on_data(t, path, prediction, gamma)


def _on_data(t: Tensor, path: str, prediction: str, most: float) -> Tensor:
    """min(alpha² / beta², most) on the data's squared error, which is (beta / divisor)² times the prediction's."""
    at = PATHS[path](t)
    alpha, beta = at.alpha.clamp(min=LEAST_SHARE), at.beta.clamp(min=LEAST_SHARE)
    divisor = {"velocity": at.turning, "data": beta, "noise": alpha}[prediction]
    return (alpha / beta).square().clamp(max=most) * (beta / divisor).square()


def data_end(t: Tensor, path: str = "rectified", prediction: str = "velocity", *, gamma: float = math.inf) -> Tensor:
    """3 (1 - t)²: emphasis on the end where details are made; 1 on average over uniform t.

    Args and Returns: as `none`.
    """
    return 3 * (1 - t).square()


def noise_end(t: Tensor, path: str = "rectified", prediction: str = "velocity", *, gamma: float = math.inf) -> Tensor:
    """3 t²: emphasis on the end where the layout is made; 1 on average over uniform t.

    Args and Returns: as `none`.
    """
    return 3 * t.square()


def sigma_sqrt(t: Tensor, path: str = "rectified", prediction: str = "velocity", *, gamma: float = math.inf) -> Tensor:
    """1 / beta², whatever is predicted; beta counts as at least 1e-3, the least of a thousand noise levels.

    Args and Returns: as `none`.

    Source: `sigma_sqrt` of diffusers' `compute_loss_weighting_for_sd3`, whose sigma is our t.
    """
    return PATHS[path](t).beta.clamp(min=LEAST_SHARE) ** -2


def cosmap(t: Tensor, path: str = "rectified", prediction: str = "velocity", *, gamma: float = math.inf) -> Tensor:
    """2 / (π - 2 π t + 2 π t²): what drawing t by the law of the same name would do, as a weight.

    Args and Returns: as `none`.

    Source: Esser et al. 2024, arXiv:2403.03206, sec. 3.1, "CosMap".
    """
    return 2 / (math.pi * (1 - 2 * t + 2 * t.square()))


LossWeight = Callable[..., Tensor]  # (t (B,), path, prediction, *, gamma) -> weight per image (B,)
WEIGHTS: dict[str, LossWeight] = {
    "none": none,
    "snr": snr,
    "min_snr": min_snr,
    "data_end": data_end,
    "noise_end": noise_end,
    "sigma_sqrt": sigma_sqrt,
    "cosmap": cosmap,
}
