"""Averages by a power function of the time trained: how they decay, and how one of any length is made from others.

At time t, counted in updates, such an average is ∫ p(τ) weights(τ) dτ over 0 … t, with the response function
p(τ) = (γ + 1) τ^γ / t^(γ + 1). Its relative width σ_rel is the standard deviation of p over t.

Source: Karras et al. 2024, arXiv:2312.02696, sec. 3.1 and 3.2, app. C; p is its eq. 121.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Number = TypeVar("Number", float, Tensor)
WIDEST = 0.28  # of the relative widths; γ = 0, the mean of all weights, has 12^(-1/2) = 0.289
HALVINGS = 64  # of an interval of 1/σ_rel, which then is below the last bit of γ
CUTOFF = 1e-12  # directions of less weight are rounding: two snapshots of the same update, for instance


class Response(NamedTuple):
    """The response function of one average.

    Attributes:
        updates: t, > 0.
        sigma_rel: in (0, `WIDEST`).
    """

    updates: float
    sigma_rel: float


class Combination(NamedTuple):
    """An average as a sum of others.

    Attributes:
        coefficients: one for each of the others, float64.
        error: norm of the response function that the sum lacks, over the norm of the one that was wanted.
    """

    coefficients: NDArray[np.float64]
    error: float


def relative_width(gamma: float) -> float:
    """σ_rel of the power function with exponent γ ≥ 0: the larger γ, the narrower.

    Source: eq. 123.
    """
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


@functools.lru_cache
def exponent(sigma_rel: float) -> float:
    """The γ of a relative width, by bisection: it lies between 0 and 1/σ_rel, since σ_rel < 1/(γ + 2).

    Args:
        sigma_rel: in (0, `WIDEST`).
    """
    assert 0 < sigma_rel < WIDEST, sigma_rel
    low, high = 0.0, 1 / sigma_rel
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if relative_width(middle) > sigma_rel else (low, middle)
    return (low + high) / 2


def power_decay(sigma_rel: float, updates: Number) -> Number:
    """The decay in force at an update: β = (1 − 1/n)^(γ + 1); the first update forgets the initial weights.

    Args:
        sigma_rel: in (0, `WIDEST`).
        updates: n, optimizer updates done so far, this one included, >= 1; a number, or a float64 scalar on a device.

    Source: eq. 127.
    """
    return (1 - 1 / updates) ** (exponent(sigma_rel) + 1)


def combine(known: Sequence[Response], wanted: Response) -> Combination:
    """The sum of known averages whose response function is nearest to that of another, by least squares.

    Source: sec. 3.2 and algorithm 3, A x = b, where A holds the inner products of what is known and b those with what
    is wanted.
    """
    functions, target = _table(known), _table([wanted])
    scale = np.sqrt(np.diag(inner_products(functions, functions)))  # to unit norm: late functions are flat and small
    products = inner_products(functions, functions) / np.outer(scale, scale)
    towards = inner_products(functions, target)[:, 0] / scale
    square = float(inner_products(target, target)[0, 0])
    unit = np.linalg.lstsq(products, towards, rcond=CUTOFF)[0]
    lacking = square - 2 * unit @ towards + unit @ products @ unit
    return Combination(unit / scale, float(np.sqrt(max(0.0, lacking) / square)))


def inner_products(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.float64]:
    """∫ p q dτ of every p of ours with every q of theirs.

    With m the smaller t: (γ + 1)(δ + 1) / (γ + δ + 1) · (m/t)^γ (m/u)^δ / max(t, u), where no power can overflow.

    Args:
        ours: rows of (t, γ), shape (K, 2).
        theirs: rows of (u, δ), shape (M, 2).

    Returns:
        Shape (K, M), float64.
    """
    (t, gamma), (u, delta) = ours.T[:, :, None], theirs.T[:, None, :]
    first = np.minimum(t, u)
    powers = (first / t) ** gamma * (first / u) ** delta
    return (gamma + 1) * (delta + 1) / (gamma + delta + 1) * powers / np.maximum(t, u)


def _table(responses: Sequence[Response]) -> NDArray[np.float64]:
    """Rows of (t, γ)."""
    return np.array([(response.updates, exponent(response.sigma_rel)) for response in responses], dtype=np.float64)
