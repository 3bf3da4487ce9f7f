"""How near drawn images come to real ones, as distances between two clouds of features."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

NEIGHBOURS = 3  # as the source of `precision_recall` recommends
KID_SUBSETS, KID_SUBSET = 100, 1000
FEWEST = 2 * NEIGHBOURS  # images with which each of these is defined
BLOCK = 1024


class _Given(nn.Module):
    """Features that are features already: torchmetrics wants a network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, drawn: Tensor) -> float | None:
    """FID: the squared Fréchet distance between two normal distributions, fitted to features.

    Args:
        real: shape (N, D).
        drawn: shape (M, D).

    Returns:
        The distance, or None where no more than D images make a covariance that means nothing.

    Source: Heusel et al. 2017, arXiv:1706.08500, eq. 6, in torchmetrics.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(len(real), len(drawn)) <= real.shape[1]:
        return None
    return _compare(FrechetInceptionDistance(feature=_Given(real.shape[1])), real, drawn).item()


def kernel_distance(real: Tensor, drawn: Tensor, seed: int) -> tuple[float, float]:
    """KID: the squared maximum mean discrepancy under a cubic kernel, unbiased with any number of images.

    Args:
        real: shape (N, D).
        drawn: shape (M, D).
        seed: of the subsets that are compared: 100 of 1000 images, or of half as many as there are.

    Returns:
        Mean and standard deviation over the subsets.

    Source: Bińkowski et al. 2018, arXiv:1801.01401, sec. 4, in torchmetrics.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET, len(real) // 2, len(drawn) // 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*save all extracted features")  # which are here already
            metric = KernelInceptionDistance(feature=_Given(real.shape[1]), subsets=KID_SUBSETS, subset_size=size)
        mean, spread = _compare(metric, real, drawn)
    return mean.item(), spread.item()


def _compare(metric: Any, real: Tensor, drawn: Tensor) -> Any:
    for features, is_real in ((real, True), (drawn, False)):
        metric.update(features, real=is_real)
    return metric.compute()


def precision_recall(real: Tensor, drawn: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """The share of drawn images that look real, and the share of real ones that are covered.

    An image is within a cloud if it is no further from one of its points than that point's k-th nearest neighbour is.

    Args:
        real: features, shape (N, D).
        drawn: features, shape (M, D).
        neighbours: k, below N and M.

    Returns:
        Precision and recall, in [0, 1].

    Source: Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2.
    """
    return _share_within(drawn, real, neighbours), _share_within(real, drawn, neighbours)


def _share_within(points: Tensor, cloud: Tensor, neighbours: int) -> float:
    cloud, points = cloud.double(), points.double()  # in 32 bits copies of a point would not lie upon one another
    radii = torch.cat([near.kthvalue(neighbours + 1, dim=1).values for near in _distances(cloud, cloud)])  # 1 is itself
    inside = [(near <= radii).any(dim=1) for near in _distances(points, cloud)]
    return torch.cat(inside).double().mean().item()


def _distances(points: Tensor, cloud: Tensor) -> Iterator[Tensor]:
    """Euclidean distances, for some rows of `points` after another: (rows, len(cloud))."""
    for rows in points.split(BLOCK):
        yield torch.cdist(rows, cloud)
