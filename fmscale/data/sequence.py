"""Endless sequences that are evaluated at any place, with nothing stored and nothing walked through.

permute    a keyed pseudo-random permutation: place in an epoch -> sample
Epochs     epoch after epoch of permutations: place -> sample; an epoch may have more samples than the one before
Rotation   arcs of a circle visited evenly: number -> arc, and how often an arc came before
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from math import gcd, isqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

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


def permute_runs(position: ArrayLike, size: int, key: ArrayLike, run: int) -> NDArray[np.int64]:
    """Like `permute`, but things that are neighbours stay together in runs, of which the order is permuted.

    The `size % run` things that fill no run come last, and under each key they are other ones.

    Args:
        position, size, key: as for `permute`.
        run: things in a run, >= 1; 1 is `permute`.
    """
    runs = size // run
    if run == 1 or runs == 0:
        return permute(position, size, key)
    position = np.array(position, dtype=np.int64, ndmin=1)
    whole = position < runs * run
    out = position.copy()
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), position.shape)
    out[whole] = permute(position[whole] // run, runs, keys[whole]) * run + position[whole] % run
    return (out + (keys % np.uint64(size)).astype(np.int64)) % size


class _Span(NamedTuple):
    """Epochs of one size: the place and the number of the first of them."""

    place: int
    epoch: int
    size: int


class Epochs:
    """An endless sequence of numbers: in each epoch every number below its size once, under a key of its own.

    Args:
        size: of the first epoch, 0 where it has yet to grow.
        name: what the keys are made of, beside the number of the epoch.
        run: neighbouring numbers that stay together, >= 1.
    """

    def __init__(self, size: int, name: tuple[int | str, ...], run: int = 1):
        self._spans = [_Span(0, 0, size)]
        self._name, self._run = name, run

    def resize(self, place: int, size: int) -> None:
        """From the first epoch on that begins at `place` or behind it, epochs are of another size.

        Args:
            place: nothing from here on was used yet; not before that of an earlier call.
            size: > 0.
        """
        last = self._spans[-1]
        if place <= last.place:
            self._spans[-1] = last._replace(size=size)
        elif size != last.size:
            begun = -(-(place - last.place) // last.size)
            self._spans.append(_Span(last.place + begun * last.size, last.epoch + begun, size))

    def numbers(self, first: int, count: int) -> NDArray[np.int64]:
        """Those at places first … first + count - 1, shape (count,), int64; count is at most 2**20."""
        out = np.empty(count, dtype=np.int64)
        ends = [span.place for span in self._spans[1:]] + [first + count]
        for span, end in zip(self._spans, ends, strict=True):
            begin, end = max(first, span.place), min(first + count, end)
            if begin < end:
                out[begin - first : end - first] = self._within(span, begin, end - begin)
        return out

    def _within(self, span: _Span, first: int, count: int) -> NDArray[np.int64]:
        epoch, offset = divmod(first - span.place, span.size)  # Python integers: no overflow at any place
        epochs, offsets = np.divmod(offset + np.arange(count), span.size)
        keys = [stable_hash(*self._name, span.epoch + epoch + i) for i in range(int(epochs[-1]) + 1)]
        return permute_runs(offsets, span.size, np.array(keys, dtype=np.uint64)[epochs], self._run)


class Rotation:
    """An endless even sequence of arcs: its item i is the arc on which i strides around a circle end.

    A stride is about the circle / golden ratio, and shares no divisor with it. So an arc comes about as often as it is
    long in any stretch of the sequence, and exactly so in any stretch as long as the circle.

    Args:
        arcs: lengths, >= 0, of which one at least is positive; together at most 2**40.
        start: where on the circle the sequence begins, any integer >= 0.
    """

    def __init__(self, arcs: Sequence[int], start: int):
        self._arcs = tuple(arcs)
        self._ends = tuple(accumulate(arcs))
        self._circle = self._ends[-1]
        assert 1 <= self._circle <= 2**40, self._circle
        self._stride = _stride(self._circle)
        self._start = start % self._circle

    def items(self, first: int, count: int) -> NDArray[np.int64]:
        """The arcs' numbers at places first … first + count - 1, shape (count,), int64; count is at most 2**20."""
        place = (self._stride * first + self._start) % self._circle  # Python integers: no overflow at any place
        places = (place + self._stride * np.arange(count)) % self._circle
        return np.searchsorted(self._ends, places, side="right")

    def before(self, place: int, arc: int) -> int:
        """How often an arc comes among the items 0 … place - 1."""
        end = self._ends[arc]
        return self._hits_below(end, place) - self._hits_below(end - self._arcs[arc], place)

    def _hits_below(self, bound: int, count: int) -> int:
        """Among the first items, those whose place is below `bound`: [x mod N < b] = x//N - (x-b)//N."""
        turns = floor_sum(count, self._circle, self._stride, self._start)
        return turns + count - floor_sum(count, self._circle, self._stride, self._start + self._circle - bound)


def _stride(circle: int) -> int:
    """The number coprime to `circle` that is nearest to circle / golden ratio."""
    nearest = (isqrt(5 * circle * circle) - circle) // 2
    candidates = (nearest + sign * distance for distance in range(circle + 1) for sign in (1, -1))
    return next(number for number in candidates if number > 0 and gcd(number, circle) == 1)
