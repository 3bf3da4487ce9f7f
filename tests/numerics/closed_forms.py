"""Targets in one dimension whose marginal velocity is known in closed form on every path."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fmscale.flow.path import PATHS, coefficients_like


class Mixture:
    """A mixture of normal distributions; one of deviation 0 is a point."""

    def __init__(self, weights: list[float], means: list[float], deviations: list[float]) -> None:
        self.weights, self.means, self.deviations = (
            torch.tensor(values, dtype=torch.float64) for values in (weights, means, deviations)
        )

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Shape (count, 1), float64."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        fresh = torch.randn(count, generator=generator, dtype=torch.float64)
        return (self.means[which] + self.deviations[which] * fresh)[:, None]

    def data(self, z: Tensor, t: Tensor, path: str) -> Tensor:
        """The mean of the data given the point z, shape (B, 1): by Bayes' rule within and over the parts."""
        at = PATHS[path](t.double()[:, None])
        z = z.double()
        variance = (at.alpha * self.deviations) ** 2 + at.beta**2
        off = z - at.alpha * self.means
        logits = self.weights.log() - off**2 / (2 * variance) - variance.log() / 2
        each = self.means + at.alpha * self.deviations**2 / variance * off
        return (logits.softmax(dim=1) * each).sum(dim=1, keepdim=True)

    def velocity(self, z: Tensor, t: Tensor, path: str = "rectified") -> Tensor:
        """beta'/beta z + (alpha' - alpha beta'/beta) E[data | z]."""
        t = t.clamp(min=1e-6) if path in ("rectified", "cosine") else t  # 0 / 0 there
        at = coefficients_like(t.double(), z, path)
        ratio = at.beta_rate / at.beta
        return (ratio * z + (at.alpha_rate - at.alpha * ratio) * self.data(z, t, path)).to(z.dtype)

    def distribution(self, values: np.ndarray) -> np.ndarray:
        """The probability of at most each value; for parts of deviation above 0."""
        parts = zip(self.weights.tolist(), self.means.tolist(), self.deviations.tolist(), strict=True)
        return sum(weight * stats.norm(mean, deviation).cdf(values) for weight, mean, deviation in parts)

    def log_density(self, values: Tensor) -> Tensor:
        """Natural log, shape (B,), of values (B, 1)."""
        off = (values - self.means) / self.deviations
        logs = self.weights.log() - off**2 / 2 - self.deviations.log() - math.log(2 * math.pi) / 2
        return logs.logsumexp(dim=1)


TWO_POINTS = Mixture([0.5, 0.5], [-3.0, 3.0], [0.0, 0.0])
THREE_NORMALS = Mixture([0.3, 0.5, 0.2], [-2.0, 0.5, 2.5], [0.3, 0.5, 0.2])
