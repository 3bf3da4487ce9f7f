"""Which samples a step trains on: a pure function of the sizes of the data, the weights, the seed and the step.

Nothing is stored: any step is computed from its number in O(log samples) time and O(global_batch) memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fmscale.data.sequence import Epochs, Rotation, stable_hash
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


class Generation(NamedTuple):
    """The data from a step on; each generation holds what the one before held, and more.

    Attributes:
        step: the first that it is for.
        sizes: by the name of each bucket, how many samples of it each dataset holds; no bucket is empty.
        fingerprint: of the data, for those who compare.
    """

    step: int
    sizes: Mapping[str, Sequence[int]]
    fingerprint: str = ""


class Order:
    """The order of samples: step number in; bucket, datasets and rows out.

    A rotation picks the bucket of each step, another the dataset of each of the bucket's samples; both spread their
    choices evenly. What a dataset gives to a bucket is an endless stream of its own: epoch after epoch of a permutation
    under a new key. Where data was appended, both rotations start anew with that step, and each stream takes the new
    samples in with its next epoch.

    Args:
        generations: by their steps, the first being that with which the order begins; buckets and datasets are
            numbered as in the last.
        global_batch: images per step, at most 2**20.
        seed: any integer.
        weights: share of each dataset in the samples, > 0; None for shares by size.
        run: neighbouring samples that stay together, for storage that reads runs faster.
    """

    def __init__(
        self,
        generations: Sequence[Generation],
        global_batch: int,
        seed: int,
        weights: Sequence[float] | None = None,
        run: int = 1,
    ):
        assert generations, "there must be data"
        self._first = generations[0].step
        self.names = tuple(generations[-1].sizes)
        self.global_batch = global_batch
        datasets = len(generations[-1].sizes[self.names[0]])
        self._streams = [[Epochs(0, (seed, name, part), run) for part in range(datasets)] for name in self.names]
        self._eras: list[_Era] = []
        for generation in generations:
            drawn = [[self._drawn(generation.step, b, p) for p in range(datasets)] for b in range(len(self.names))]
            sizes = [tuple(generation.sizes.get(name, (0,) * datasets)) for name in self.names]
            for b, p in np.ndindex(len(sizes), datasets):
                if sizes[b][p]:
                    self._streams[b][p].resize(drawn[b][p], sizes[b][p])
            self._eras.append(_Era(generation.step, self.names, sizes, weights, seed, drawn))

    def batch(self, step: int) -> StepPlan:
        """Bucket, datasets and rows of a step, whatever steps were asked for before.

        Args:
            step: optimizer step, from the first generation's on.
        """
        era = self._era(step)
        bucket = int(era.buckets.items(step - era.step, 1)[0])
        parts = era.parts[bucket].items(era.steps_before(step, bucket) * self.global_batch, self.global_batch)
        rows = np.empty_like(parts)
        for part in np.unique(parts).tolist():
            chosen = np.flatnonzero(parts == part)
            rows[chosen] = self._streams[bucket][part].numbers(self._drawn(step, bucket, part), len(chosen))
        return StepPlan(bucket, parts, rows)

    def _era(self, step: int) -> _Era:
        return next(era for era in reversed(self._eras) if era.step <= step)

    def _drawn(self, step: int, bucket: int, part: int) -> int:
        """How many samples of a dataset and bucket come before a step."""
        if not self._eras:
            return 0
        era = self._era(step - 1) if step > self._first else self._eras[0]
        images = era.steps_before(step, bucket) * self.global_batch
        return era.drawn[bucket][part] + (era.parts[bucket].before(images, part) if images else 0)


class _Era:
    """The steps of one generation.

    Attributes:
        step: the first of them.
        buckets: which bucket each of them uses.
        parts: per bucket, which dataset each of its images is from; only for buckets that hold samples.
        drawn: per bucket and dataset, how many samples come before the first step.
    """

    def __init__(
        self,
        step: int,
        names: Sequence[str],
        sizes: Sequence[Sequence[int]],
        weights: Sequence[float] | None,
        seed: int,
        drawn: Sequence[Sequence[int]],
    ):
        self.step, self.drawn = step, drawn
        arcs = sizes if weights is None else _weighted(sizes, weights)
        self.buckets = Rotation([sum(parts) for parts in arcs], stable_hash(seed, "buckets"))
        self.parts = {
            number: Rotation(parts, stable_hash(seed, name, "parts"))
            for number, (name, parts) in enumerate(zip(names, arcs, strict=True))
            if sum(parts)
        }

    def steps_before(self, step: int, bucket: int) -> int:
        """How many of these steps, up to a step, use a bucket."""
        return self.buckets.before(step - self.step, bucket)


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


def shares(sizes: Sequence[Sequence[int]], weights: Sequence[float] | None) -> tuple[float, ...]:
    """Share of each bucket in the steps.

    Args:
        sizes: of each bucket, samples by dataset.
        weights: of the datasets; None for shares by size.
    """
    arcs = [sum(parts) for parts in (sizes if weights is None else _weighted(sizes, weights))]
    return tuple(arc / sum(arcs) for arc in arcs)


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
