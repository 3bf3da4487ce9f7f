"""What weights and gradients are like, part by part of the network, from the pieces that each rank owns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from fmscale.distributed import total

_POWERS = tuple(2.0 ** (half / 2) for half in range(-60, 17))
EDGES = (*(-power for power in reversed(_POWERS)), *_POWERS)  # between the bins of a histogram: 1e-9 … 256, and 0


class Look:
    """Sums over all values of each part, added up piece by piece, then over ranks.

    Args:
        parts: parameter name -> part of the network.
        device: of the ranks' collectives.
        histogram: count the values too, which takes longer.

    Attributes:
        names: of the parts, in alphabetical order.
        sums: shape (parts, 2 + bins), float64: sum of squares; for a histogram also the sum, and the count of values
            up to each of `EDGES` and above the last.
    """

    def __init__(self, parts: Mapping[str, str], device: torch.device, histogram: bool = False) -> None:
        self.parts, self.histogram = parts, histogram
        self.names = sorted(set(parts.values()))
        bins = len(EDGES) + 1 if histogram else 0
        self.sums = torch.zeros(len(self.names), 2 + bins, dtype=torch.float64, device=device)

    @torch.no_grad()
    def __call__(self, pieces: Mapping[str, Tensor]) -> None:
        """Add what this rank owns, by parameter name; a second piece of a part may come in another call."""
        for row, part in enumerate(self.names):
            if mine := [piece for name, piece in pieces.items() if self.parts[name] == part]:
                self.sums[row, 0] += get_total_norm(mine).double().square().to(self.sums.device)
                if self.histogram:
                    self._count(row, mine)

    def _count(self, row: int, pieces: list[Tensor]) -> None:
        edges = torch.tensor(EDGES, device=pieces[0].device)
        for piece in pieces:
            self.sums[row, 1] += piece.sum(dtype=torch.float64).to(self.sums.device)
            bins = torch.bucketize(piece, edges, out_int32=True)
            self.sums[row, 2:] += torch.bincount(bins, minlength=len(EDGES) + 1).to(self.sums.device)

    def share(self) -> Look:
        """Sum over ranks; every rank calls it, once."""
        total(self.sums)
        return self

    def norms(self, whole: float | Tensor) -> Tensor:
        """Norm of each part.

        Args:
            whole: norm of all parts together. The parts share it as they share the sum of squares, which is the same
                before and after clipping.

        Returns:
            Shape (parts,), float64; NaN where all values are 0.
        """
        squares = self.sums[:, 0]
        return (squares / squares.sum()).sqrt() * whole
