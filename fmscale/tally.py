"""The one small vector of each step in which ranks tell one another what all of them must know."""

from __future__ import annotations

import torch
from torch import Tensor

from fmscale.batch import Batch
from fmscale.control import Wish
from fmscale.distributed import World, total
from fmscale.size import BINS as BINS
from fmscale.size import TALLY_HEAD, tally_values


class Tally:
    """Views of the vector, each rank's own share at first, and after `share` the sum over ranks.

    Args:
        values: shape (5 + 3 BINS + world_size,), float32.

    Attributes:
        loss: of the images, summed.
        images: that counted.
        bad: damaged samples.
        stop, save: ranks that were asked to.
        loss_by_t, images_by_t: loss and images again, by bin of t, shape (BINS,).
        error_by_t: likewise the loss before weights of t, beside which no loss would stand out.
        seconds: what each rank took for its own part of a step, shape (world_size,); 0 where not known yet.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.loss, self.images, self.bad, self.stop, self.save = values[:TALLY_HEAD].unbind()
        self.loss_by_t, self.error_by_t, self.images_by_t = (
            values[TALLY_HEAD : TALLY_HEAD + 3 * BINS].view(3, BINS).unbind()
        )
        self.seconds = values[TALLY_HEAD + 3 * BINS :]

    @classmethod
    def begin(cls, world: World, wish: Wish) -> Tally:
        """What a rank knows when its step begins."""
        values = torch.zeros(tally_values(world.world_size))
        values[TALLY_HEAD - 2 : TALLY_HEAD] = torch.tensor([float(asked) for asked in wish])
        return cls(values.to(world.device, non_blocking=True))

    def add(self, losses: Tensor, errors: Tensor, t: Tensor, batch: Batch) -> None:
        """A micro-batch: the loss of each image, with and without the weight of its t, and t, all of shape (B,).

        Both are 0 for an image that does not count.
        """
        self.loss += losses.sum()
        self.images += batch.weight.sum()
        self.bad += len(batch.bad)
        self.loss_by_t += by_timestep(t, losses)
        self.error_by_t += by_timestep(t, errors)
        self.images_by_t += by_timestep(t, batch.weight)

    def share(self) -> None:
        """Sum over ranks, in place."""
        total(self.values)

    @property
    def wish(self) -> Wish:
        """What any rank was asked for; to be asked of a tally on the host."""
        return Wish(bool(self.stop), bool(self.save))


def by_timestep(t: Tensor, values: Tensor) -> Tensor:
    """Sums of what belongs to each bin of t.

    Args:
        t: shape (B,), in [0, 1].
        values: shape (B,).

    Returns:
        Shape (BINS,). A value that is not finite spoils its own bin alone.
    """
    bins = (t * BINS).long().clamp(max=BINS - 1)
    return torch.where(bins[:, None] == torch.arange(BINS, device=t.device), values[:, None], 0).sum(dim=0)
