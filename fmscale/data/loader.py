"""The road from step numbers to batches.

    1 work_items    step, micro-batch -> the samples of this rank       (order, split: pure functions of the step)
    2 read_samples  byte ranges       -> decoded samples, or why not    (reader)
    3 collate       samples, noise    -> Batch

A `webdataset.DataPipeline` in a `WebLoader`: worker i of W makes micro-batches i, i + W, …, and the loader takes
turns among the workers, so their number changes nothing but speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.utils.data
import webdataset
from numpy.typing import NDArray
from torch import Tensor

from fmscale.batch import BadSample, Batch
from fmscale.data.mixture import Address, MixedBucket, Mixture
from fmscale.data.order import Order, Split
from fmscale.data.reader import OpenShards, Room, Sample, Scratch, read_sample
from fmscale.data.tar import DamageError

Noise = Callable[[tuple[int, ...], int, int, Callable[[], dict[str, Any]]], Tensor]


class WorkItem(NamedTuple):
    """One micro-batch to make: for each slot a sample, or None where the slot is padding."""

    step: int
    bucket: MixedBucket
    slots: NDArray[Any]
    samples: tuple[Address | None, ...]


class Slot(NamedTuple):
    """What became of one slot: a sample; or none, because it is padding, or damaged (then `bad` says how)."""

    key: str = ""
    sample: Sample | None = None
    bad: BadSample | None = None


def build_loader(
    mixture: Mixture,
    order: Order,
    split: Split,
    *,
    rank: int,
    start_step: int,
    stop_step: int,
    noise: Noise,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The batches of one rank, in order: for each step, each of its micro-batches.

    Args:
        mixture: the datasets.
        order: from `mixture.order`.
        split: how slots fall to ranks.
        rank: in [0, split.world_size).
        start_step: first step.
        stop_step: the step after the last.
        noise: (latents' shape, step, slot, reader of the sample's json) -> standard normal noise of that shape,
            float32, on the CPU.
        workers: processes that read ahead; 0 reads in this one.
        pin_memory: put batches in page-locked memory.

    Returns:
        `(stop_step - start_step) * split.accumulation` batches.
    """
    items = partial(work_items, mixture, order, split, rank, start_step, stop_step)
    pipeline = webdataset.DataPipeline(
        items, partial(read_samples, mixture=mixture), partial(collate, mixture=mixture, noise=noise)
    )
    return iter(webdataset.WebLoader(pipeline, batch_size=None, num_workers=workers, pin_memory=pin_memory))


def work_items(
    mixture: Mixture, order: Order, split: Split, rank: int, start_step: int, stop_step: int
) -> Iterator[WorkItem]:
    """This worker's share of the rank's micro-batches."""
    info = torch.utils.data.get_worker_info()
    worker, workers = (info.id, info.num_workers) if info else (0, 1)
    for number in range(worker, (stop_step - start_step) * split.accumulation, workers):
        steps, m = divmod(number, split.accumulation)
        plan = order.batch(start_step + steps)
        slots = split.slots(m, rank)
        addresses = mixture.addresses(plan)
        samples = tuple(addresses[slot] if slot < len(addresses) else None for slot in slots)
        yield WorkItem(start_step + steps, mixture.buckets[plan.bucket], slots, samples)


def read_samples(items: Iterable[WorkItem], mixture: Mixture) -> Iterator[tuple[WorkItem, list[Slot]]]:
    """Each item with what its slots hold, until the next is asked for: they are read into the same memory."""
    scratch = Scratch()
    with OpenShards() as shards:
        for item in items:
            rooms = [partial(scratch.room, number) for number in range(len(item.samples))]
            yield item, [_read_slot(mixture, *pair, shards) for pair in zip(item.samples, rooms, strict=True)]


def _read_slot(mixture: Mixture, address: Address | None, room: Room, shards: OpenShards) -> Slot:
    if address is None:
        return Slot()
    key, location = mixture.key(address), mixture.location(address)
    try:
        return Slot(key, read_sample(location, shards, room))
    except DamageError as damage:
        return Slot(key, bad=BadSample(key, location.shard.name, str(damage)))


def collate(work: Iterable[tuple[WorkItem, list[Slot]]], mixture: Mixture, noise: Noise) -> Iterator[Batch]:
    """Stack samples to batches; a slot without a sample holds zeros, with weight 0."""
    for item, slots in work:
        whole = all(slot.sample for slot in slots)
        blank = {} if whole else mixture.blank(item.bucket)
        stored = [slot.sample.tensors if slot.sample else blank for slot in slots]
        shape = tuple(stored[0]["latents"].shape)
        drawn = [
            noise(shape, item.step, int(place), slot.sample.read_meta) if slot.sample else torch.zeros(shape)
            for place, slot in zip(item.slots, slots, strict=True)
        ]
        yield Batch(
            step=item.step,
            bucket=(item.bucket.height, item.bucket.width),
            slots=torch.from_numpy(item.slots),
            weight=torch.tensor([float(slot.sample is not None) for slot in slots]),
            tensors={name: torch.stack([tensors[name] for tensors in stored]) for name in mixture.layout},
            noise=torch.stack(drawn),
            keys=tuple(slot.key for slot in slots),
            bad=tuple(slot.bad for slot in slots if slot.bad),
        )
