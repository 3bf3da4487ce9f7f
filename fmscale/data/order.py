"""Which samples a step trains on: a pure function of the bucket sizes, the seed and the step.

Each bucket is an endless stream, epoch after epoch of a keyed permutation of its samples; each step uses one bucket.
Nothing is stored: any step is computed from its number in O(log samples) time and O(global_batch) memory.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import gcd, isqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fmscale.errors import UserError

FEISTEL_ROUNDS = 8
ROUND_STEP = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: distinct round keys


def permute(position: ArrayLike, size: int, key: ArrayLike) -> NDArray[np.int64]:
    """Send positions through a keyed pseudo-random permutation of `range(size)`, without storing it.

    A balanced Feistel network permutes the smallest square side x side >= size; what falls outside walks on along
    its cycle until it is inside, which keeps the map one to one.

    Args:
        position: shape (n,), integers in [0, size).
        size: number of things permuted, 1 to 2**40.
        key: which permutation: an integer in [0, 2**64), or one per position, shape (n,).

    Returns:
        Their images, shape (n,), int64, in [0, size).

    Source: Luby and Rackoff 1988 (Feistel rounds); Black and Rogaway 2002 (cycle walking).
    """
    assert 1 <= size <= 2**40, size
    side = isqrt(size - 1) + 1
    out = np.array(position, dtype=np.uint64, ndmin=1)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), out.shape)
    out = _feistel(out, keys, side)
    while (outside := np.flatnonzero(out >= size)).size:
        out[outside] = _feistel(out[outside], keys[outside], side)
    return out.astype(np.int64)


def _feistel(value: NDArray[np.uint64], keys: NDArray[np.uint64], side: int) -> NDArray[np.uint64]:
    left, right = np.divmod(value, np.uint64(side))
    for _ in range(FEISTEL_ROUNDS):
        keys = keys + np.uint64(ROUND_STEP)
        # reduced before the sum, which must not wrap around 2**64: it would no longer be one to one
        shift = _mix(right ^ _mix(keys)) % np.uint64(side)
        left, right = right, (left + shift) % np.uint64(side)
    return left * np.uint64(side) + right


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits. Source: Steele, Lea, Flood 2014, SplitMix64's finaliser."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def stable_hash(*parts: int | str) -> int:
    """A 64-bit number that depends on the parts alone: the same in every process and on every machine."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def floor_sum(count: int, modulus: int, factor: int, offset: int) -> int:
    """Sum of floor((factor * i + offset) / modulus) over i in range(count), in O(log modulus).

    Args:
        count: number of terms, >= 0.
        modulus: > 0.
        factor: >= 0.
        offset: >= 0.

    Source: counting lattice points under a line; each pass swaps the axes, as in Euclid's algorithm.
    """
    total = 0
    while count > 0:
        total += (factor // modulus) * (count * (count - 1) // 2) + (offset // modulus) * count
        factor, offset = factor % modulus, offset % modulus
        count, offset = divmod(factor * count + offset, modulus)
        modulus, factor = factor, modulus
    return total


class StepPlan(NamedTuple):
    """What one step trains on.

    Attributes:
        bucket: index into the buckets that the order was made of.
        rows: positions within that bucket, one per slot of the global batch, shape (global_batch,), int64.
    """

    bucket: int
    rows: NDArray[np.int64]


class Order:
    """The order of samples: step number in, bucket and rows out.

    The bucket of a step follows a rotation by about the golden ratio around a circle on which each bucket owns an arc
    as long as it has samples: uses are spread evenly, and over as many steps as there are samples each bucket is used
    exactly as often as it has samples.

    Args:
        buckets: (name, number of samples) of each; names are distinct, numbers positive.
        global_batch: images per step.
        seed: any integer.
    """

    def __init__(self, buckets: Sequence[tuple[str, int]], global_batch: int, seed: int):
        self.names = tuple(name for name, _ in buckets)
        self.sizes = tuple(size for _, size in buckets)
        assert min(self.sizes, default=0) > 0, "there must be a bucket, and a sample in each"
        assert len(set(self.names)) == len(self.names), "bucket names must differ"
        self.global_batch = global_batch
        self.seed = seed
        self._ends = tuple(accumulate(self.sizes))
        self._stride = _stride(self._ends[-1])
        self._start = stable_hash(seed, "buckets") % self._ends[-1]

    def batch(self, step: int) -> StepPlan:
        """Bucket and rows of a step, whatever steps were asked for before.

        Args:
            step: optimizer step, >= 0.
        """
        bucket = bisect_right(self._ends, (self._stride * step + self._start) % self._ends[-1])
        return StepPlan(bucket, self._rows(bucket, self._uses_before(step, bucket)))

    def _uses_before(self, step: int, bucket: int) -> int:
        """How many of the steps 0 .. step-1 used this bucket."""
        end = self._ends[bucket]
        return self._hits_below(end, step) - self._hits_below(end - self.sizes[bucket], step)

    def _hits_below(self, bound: int, steps: int) -> int:
        """Among the first steps, those whose place on the circle is below `bound`: [x mod N < b] = x//N - (x-b)//N."""
        circle = self._ends[-1]
        turns = floor_sum(steps, circle, self._stride, self._start)
        return turns + steps - floor_sum(steps, circle, self._stride, self._start + circle - bound)

    def _rows(self, bucket: int, uses: int) -> NDArray[np.int64]:
        """Places uses * G .. (uses + 1) * G - 1 of the bucket's stream, with G the global batch."""
        size = self.sizes[bucket]
        first_epoch, offset = divmod(uses * self.global_batch, size)  # Python integers: no overflow at any step
        epochs, offsets = np.divmod(offset + np.arange(self.global_batch), size)
        keys = [stable_hash(self.seed, self.names[bucket], first_epoch + i) for i in range(int(epochs[-1]) + 1)]
        return permute(offsets, size, np.array(keys, dtype=np.uint64)[epochs])


def _stride(circle: int) -> int:
    """The number coprime to `circle` that is nearest to circle / golden ratio."""
    nearest = (isqrt(5 * circle * circle) - circle) // 2
    candidates = (nearest + sign * distance for distance in range(circle + 1) for sign in (1, -1))
    return next(number for number in candidates if number > 0 and gcd(number, circle) == 1)


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
