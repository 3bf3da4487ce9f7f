"""Which samples a step trains on: a pure function of the bucket sizes, the weights, the seed and the step.

Nothing is stored: any step is computed from its number in O(log samples) time and O(global_batch) memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fmscale.data.sequence import Rotation, permute_runs, stable_hash
from fmscale.errors import UserError

WEIGHT_UNITS = 1 << 30  # a mixture's weights are kept to nine digits


class StepPlan(NamedTuple):
    """What one step trains on.

    Attributes:
        bucket: number of the bucket.
        parts: which dataset each slot's sample is from, shape (global_batch,), int64.
        rows: its position within that dataset's share of the bucket, shape (global_batch,), int64.
    """

    bucket: int
    parts: NDArray[np.int64]
    rows: NDArray[np.int64]


class Order:
    """The order of samples: step number in; bucket, datasets and rows out.

    A rotation picks the bucket of each step, another the dataset of each of the bucket's samples; both spread their
    choices evenly. What a dataset gives to a bucket is an endless stream of its own: epoch after epoch of a permutation
    under a new key.

    Args:
        buckets: name of each, and how many samples of it each dataset holds; names are distinct, no bucket is empty.
        global_batch: images per step, at most 2**20.
        seed: any integer.
        weights: share of each dataset in the samples, > 0; None for shares by size.
        run: neighbouring samples that stay together, for storage that reads runs faster.
    """

    def __init__(
        self,
        buckets: Sequence[tuple[str, Sequence[int]]],
        global_batch: int,
        seed: int,
        weights: Sequence[float] | None = None,
        run: int = 1,
    ):
        self.names = tuple(name for name, _ in buckets)
        self.sizes = tuple(tuple(sizes) for _, sizes in buckets)
        self.global_batch, self.seed, self.run = global_batch, seed, run
        assert min(map(sum, self.sizes), default=0) > 0, "there must be a bucket, and a sample in each"
        assert len(set(self.names)) == len(self.names), "bucket names must differ"
        arcs = self.sizes if weights is None else _weighted(self.sizes, weights)
        self._buckets = Rotation([sum(parts) for parts in arcs], stable_hash(seed, "buckets"))
        self._parts = [
            Rotation(parts, stable_hash(seed, name, "parts")) for name, parts in zip(self.names, arcs, strict=True)
        ]

    def batch(self, step: int) -> StepPlan:
        """Bucket, datasets and rows of a step, whatever steps were asked for before.

        Args:
            step: optimizer step, >= 0.
        """
        bucket = int(self._buckets.items(step, 1)[0])
        first = self._buckets.before(step, bucket) * self.global_batch
        parts = self._parts[bucket].items(first, self.global_batch)
        rows = np.empty_like(parts)
        for part in np.unique(parts).tolist():
            chosen = np.flatnonzero(parts == part)
            rows[chosen] = self._rows(bucket, part, self._parts[bucket].before(first, part), len(chosen))
        return StepPlan(bucket, parts, rows)

    def _rows(self, bucket: int, part: int, first: int, count: int) -> NDArray[np.int64]:
        """Places first … first + count - 1 of the stream that a dataset gives to a bucket."""
        size = self.sizes[bucket][part]
        first_epoch, offset = divmod(first, size)  # Python integers: no overflow at any step
        epochs, offsets = np.divmod(offset + np.arange(count), size)
        keys = [stable_hash(self.seed, self.names[bucket], part, first_epoch + i) for i in range(int(epochs[-1]) + 1)]
        return permute_runs(offsets, size, np.array(keys, dtype=np.uint64)[epochs], self.run)


def _weighted(sizes: Sequence[Sequence[int]], weights: Sequence[float]) -> list[list[int]]:
    """Arc of each bucket and dataset: the dataset's weight, spread over its buckets as its samples are."""
    totals = [sum(parts) for parts in zip(*sizes, strict=True)]
    unit = WEIGHT_UNITS / sum(weights)
    return [
        [
            max(1, round(unit * weight * size / total)) if size else 0
            for size, total, weight in zip(parts, totals, weights, strict=True)
        ]
        for parts in sizes
    ]


@dataclass(frozen=True)
class Split:
    """How the slots of a global batch fall to micro-batches and ranks.

    Attributes:
        global_batch: slots that hold an image; higher slots are padding and weigh nothing.
        world_size: number of ranks.
        micro_batch: slots a rank works on at once.
        accumulation: micro-batches per step.
    """

    global_batch: int
    world_size: int
    micro_batch: int
    accumulation: int

    def slots(self, m: int, rank: int) -> NDArray[np.int64]:
        """The slots of a rank's m-th micro-batch, shape (micro_batch,), int64; those >= global_batch are padding."""
        return (m * self.world_size + rank) * self.micro_batch + np.arange(self.micro_batch)


def split(global_batch: int, world_size: int, micro_batch: int) -> Split:
    """Cut a global batch into equal micro-batches, with as little padding as the upper bound allows.

    Args:
        global_batch: images per step, over all ranks.
        world_size: number of ranks.
        micro_batch: the most images a rank works on at once.

    Raises:
        UserError: there are more ranks than images.
    """
    if global_batch < world_size:
        raise UserError(
            f"global_batch {global_batch} cannot be split over {world_size} ranks: "
            f"set global_batch to {world_size} or more, or start fewer ranks"
        )
    accumulation = -(-global_batch // (world_size * micro_batch))
    return Split(global_batch, world_size, -(-global_batch // (world_size * accumulation)), accumulation)
