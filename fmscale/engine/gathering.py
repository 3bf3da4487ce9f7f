"""Which weights ZeRO-3 gathers when, step by step as DeepSpeed does; torch stays out.

Source: DeepSpeed's `PartitionedParameterCoordinator` and `AllGatherCoalescedHandle`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, groupby
from typing import NamedTuple

from fmscale.engine.sharding import Parameter, Zero, padded, stays

LOOKS_AHEAD = 2  # times for each module with weights: modules that hold it do so too


class Gathers(NamedTuple):
    """What ZeRO-3 gathers in a micro-batch, beside what stays.

    Attributes:
        sent: elements, padding included.
        calls: about.
        most: elements that are there at a time, from the middle of the forward pass to that of the backward pass.
        last: the same from when the backward pass has all weights of the largest module.
        elsewhere: the same before, between and after.
    """

    sent: int
    calls: int
    most: int
    last: int
    elsewhere: int


def gathers(parameters: Iterable[Parameter], zero: Zero, compiled: bool) -> Gathers:
    """A forward and a backward pass as ZeRO-3 goes through them once it knows them.

    A module's weights are let go after its forward pass, and gathered again for its backward pass. They stay if that
    comes within `stage3_max_reuse_distance` elements of other weights. So do those that DeepSpeed finds already there
    as it looks ahead for what to gather next, which it does for as long as fewer than `stage3_max_live_parameters`
    elements are gathered.

    Args:
        parameters: in the order of the forward pass.
        zero: settings.
        compiled: blocks are gathered whole.
    """
    modules = [list(members) for _, members in groupby(parameters, key=lambda p: _unit(p.module, compiled))]
    largest = max(range(len(modules)), key=lambda place: elements(modules[place]))
    live, reach = zero.option("stage3_max_live_parameters"), zero.option("stage3_max_reuse_distance")
    numbers = iter(range(sum(map(len, modules))))
    forward = [[(next(numbers), parameter) for parameter in module] for module in modules]
    steps, half = [*forward, *reversed(forward)], len(forward)
    trace = list(chain.from_iterable(steps))
    weights, kept, ends, seen = _Weights(zero, trace), set[int](), 0, 0
    most, last, elsewhere, behind = 0, 0, 0, sum(elements(module) for module in modules)
    for step, members in enumerate(steps):
        ends += len(members)
        seen = max(seen, ends)
        weights.gather(members)
        arriving = weights.take(members)
        for _ in range(LOOKS_AHEAD):
            room, found = min(live - weights.there, zero.option("stage3_prefetch_bucket_size")), dict[int, Parameter]()
            while seen < len(trace) and room > 0:
                number, parameter = trace[seen]
                if number not in weights.here and number not in found:
                    found[number] = parameter
                    room -= parameter.numel
                kept.update({number} if 2 * seen >= len(trace) else ())
                seen += 1
            weights.gather(found.items())
        after, first = weights.there + weights.copied, step < half
        if step >= len(steps) - 1 - largest:
            last, elsewhere = max(last, after), max(elsewhere, arriving)
        elif 0.5 * half <= step < 1.5 * half:
            most = max(most, arriving, after)
        else:
            elsewhere = max(elsewhere, arriving, after)
        behind -= elements(p for _, p in members) if first else 0
        weights.let_go(
            (number, p) for number, p in members if not first or (number not in kept and 2 * behind >= reach)
        )
    return Gathers(weights.sent, weights.calls, most, last, elsewhere)


@dataclass
class _Call:
    """One call's buffer: weights that have yet to be taken from it, elements, and whether they have been copied."""

    waiting: set[int]
    size: int
    copied: bool = False


class _Weights:
    """Whole weights as modules come and go.

    What one call gathers comes in one buffer, unless it is a single weight. As the first of them is needed all are
    copied from it; it goes when the last one is needed.

    Attributes:
        here: numbers of those that are there or on their way.
        there: their elements.
        copied: elements of buffers beside the copies made of them.
        sent: elements that have been gathered, padding included.
        calls: that gathered them.
    """

    def __init__(self, zero: Zero, trace: Iterable[tuple[int, Parameter]]) -> None:
        self.zero, self.there, self.copied, self.sent, self.calls = zero, 0, 0, 0, 0
        self.here = {number for number, p in trace if stays(p, zero)}
        self.buffers: dict[int, _Call] = {}

    def gather(self, members: Iterable[tuple[int, Parameter]]) -> None:
        """Gather what is missing in one call."""
        missing = {number: p for number, p in members if number not in self.here}
        if not missing:
            return
        size = elements(missing.values())
        self.here.update(missing)
        self.there += size
        self.sent += sum(padded(p, self.zero) for p in missing.values())
        self.calls += 1
        if len(missing) > 1:
            self.buffers.update(dict.fromkeys(missing, _Call(set(missing), size)))

    def take(self, members: Iterable[tuple[int, Parameter]]) -> int:
        """A module needs its weights; returns the most elements that are there until it has all."""
        most = self.there + self.copied
        for number, _ in members:
            call = self.buffers.pop(number, None)
            if call is None:
                continue
            self.copied += 0 if call.copied else call.size
            call.copied = True
            most = max(most, self.there + self.copied)
            call.waiting.discard(number)
            self.copied -= 0 if call.waiting else call.size
        return most

    def let_go(self, members: Iterable[tuple[int, Parameter]]) -> None:
        """A module has done with these, and no rank keeps them whole."""
        for number, parameter in members:
            if not stays(parameter, self.zero):
                self.here.discard(number)
                self.there -= parameter.numel


def elements(parameters: Iterable[Parameter]) -> int:
    """Of all of them."""
    return sum(parameter.numel for parameter in parameters)


def _unit(module: str, compiled: bool) -> str:
    """Name of what is gathered at once."""
    parts = module.split(".")
    return ".".join(parts[:2]) if compiled and parts[0] == "blocks" else module
