"""What gradients take on the device beside the states of `sharding`, in closed form; torch stays out.

Source: DeepSpeed's `stage_1_and_2.py` and `stage3.py`, as `deepspeed_config` and `Tail` set them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fmscale.engine.gathering import gathers
from fmscale.engine.sharding import MASTER_BYTES, Parameter, Zero, touched


class Gradients(NamedTuple):
    """Bytes of gradients in a step's last backward pass and after it.

    Attributes:
        buckets: buffers that they are reduced through.
        before: as the pass begins, of earlier micro-batches.
        reduced: as the first are reduced, with the copies that this takes.
        share: of the pass that is done by then.
        after: as it ends, with such copies.
        update: as weights are updated.
    """

    buckets: int
    before: int
    reduced: int
    share: float
    after: int
    update: int


class Gathered(NamedTuple):
    """Bytes of whole weights that ZeRO-3 has, beside those that stay.

    Attributes:
        most: at a time in a backward pass, but for its end.
        after: at its end, beside the gradient that is whole then.
    """

    most: int
    after: int


def gathered(parameters: Sequence[Parameter], zero: Zero, compiled: bool = False) -> Gathered:
    """Weights that ZeRO-3 gathers.

    Args:
        parameters: of the network, in the order of its forward pass.
        zero: settings.
        compiled: blocks are gathered whole.
    """
    if zero.stage != 3 or zero.world_size == 1:
        return Gathered(0, 0)
    found, room = gathers(parameters, zero, compiled), zero.option("reduce_bucket_size")
    whole = max((parameter.numel for parameter in parameters if parameter.numel > room), default=0)
    return Gathered(found.most * zero.item, max(found.last, found.elsewhere - whole) * zero.item)


def gradients(parameters: Sequence[Parameter], zero: Zero, accumulation: int) -> Gradients:
    """What becomes of gradients; of ranks that differ, on the one that holds most.

    Args:
        parameters: of the network, in its own order.
        zero: settings.
        accumulation: micro-batches in a step.
    """
    form = {1: _whole, 2: _compact if zero.compact else _partitioned, 3: _scattered}[zero.stage]
    return form(_Size(parameters, zero, accumulation))


class _Size:
    """Bytes that all stages are made of.

    Attributes:
        item: of an element.
        earlier: 1 where there are micro-batches before the last, else 0.
        total: of all gradients.
        bucket: of the gradients in a full bucket.
        largest: of the largest gradient, if no bucket takes it: it is reduced where it is.
        buckets: of the buffers, with the second one that fills while the first is reduced.
        copies: that reducing a bucket takes.
        part: of a rank's own gradients, in fp32.
        own: of all gradients of which a rank owns any; none where they go to the host.
        flat: of the one vector that `Tail` makes of a rank's own. On a CPU it stays, and is a state.
    """

    def __init__(self, parameters: Sequence[Parameter], zero: Zero, accumulation: int):
        numels, room = [parameter.numel for parameter in parameters], int(zero.option("reduce_bucket_size"))
        total, part = sum(numels), -(-sum(numels) // zero.world_size)
        together = zero.stage == 3 or zero.option("use_multi_rank_bucket_allreduce")
        away = zero.offload == "optimizer"
        self.zero, self.item, self.earlier = zero, zero.item, int(accumulation > 1)
        self.total, self.bucket = total * self.item, min(room, total) * self.item
        self.largest = max((numel for numel in numels if numel > room), default=0) * self.item
        self.buckets = 0 if zero.alone or zero.stage == 3 else (2 if zero.overlaps else 1) * room * self.item
        self.copies = 0 if zero.alone else min(room, total if together else part) * self.item
        self.part = MASTER_BYTES * part
        self.own = 0 if away else touched(parameters, zero.world_size) * self.item
        self.flat = self.part if zero.gpu and not away else 0

    @property
    def share(self) -> float:
        """Of a backward pass, until the first bucket is full."""
        return self.bucket / self.total


def _whole(size: _Size) -> Gradients:
    """Stage 1: micro-batches add up to whole gradients, which are reduced in the last one, or after it."""
    before, update = size.earlier * size.total, size.own + size.flat
    if size.zero.alone:
        return Gradients(0, before, size.total, 1.0, size.total, update)
    first = size.total - size.bucket + size.own + size.copies
    if not size.zero.overlaps:
        return Gradients(size.buckets, before, size.total, 1.0, max(size.total, first), update)
    after = size.own + size.copies + size.largest
    return Gradients(size.buckets, before, first if before else size.own + size.copies, size.share, after, update)


def _partitioned(size: _Size) -> Gradients:
    """Stage 2 in fp32: each micro-batch leaves a rank with its own gradients, beside those of the ones before."""
    before, update = size.earlier * size.own, size.own + size.flat
    after = before + size.own
    if size.zero.alone:
        return Gradients(0, before, after, 1.0, after, update)
    after += size.copies
    return Gradients(size.buckets, before, after, size.share, after + size.largest, update)


def _compact(size: _Size) -> Gradients:
    """Stage 2 in 16 bits: each micro-batch is added to the same vector in fp32, with offload too."""
    widened = min(size.largest * MASTER_BYTES // size.item, size.part)
    reduced, after = size.part + size.copies, size.part + size.largest + max(size.copies, widened)
    return Gradients(size.buckets, size.earlier * size.part, reduced, size.share, after, size.part)


def _scattered(size: _Size) -> Gradients:
    """Stage 3: buffers and a rank's own gradients are states; what is scattered is copied, but for one that divides."""
    divides = size.largest // size.item % size.zero.world_size == 0
    arrived = MASTER_BYTES * size.bucket // size.item // size.zero.world_size  # a rank's share of a bucket
    after = size.largest + max(size.copies + arrived, 0 if divides else size.largest)
    return Gradients(0, 0, size.copies + arrived, size.share, after, 0)
