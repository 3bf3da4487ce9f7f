"""The road from step numbers to batches.

    1 work_items    step, micro-batch -> the samples of this rank       (order, split: pure functions of the step)
    2 make_batches  byte ranges       -> tensors, or why not; noise     (reader; raw, for images)

A `webdataset.DataPipeline` in a `WebLoader`: worker i of W makes micro-batches i, i + W, …, and the loader takes
turns among the workers, so their number changes nothing but speed.
"""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.utils.data
import webdataset
from numpy.typing import NDArray
from torch import Tensor

from fmscale.batch import COUNT, BadSample, Batch
from fmscale.data.counts import counts_of
from fmscale.data.mixture import Address, MixedBucket, Mixture
from fmscale.data.order import Order, Split
from fmscale.data.reader import RowReader
from fmscale.data.tar import DamageError
from fmscale.errors import OutageError, UserError

ReadMeta = Callable[[], dict[str, Any]]
Noise = Callable[[tuple[int, ...], int, int, ReadMeta], Tensor]
View = Callable[[dict[str, Tensor], int, Sequence[int]], dict[str, Tensor]]


class WorkItem(NamedTuple):
    """One micro-batch to make: for each slot a sample, or None where the slot is padding."""

    step: int
    bucket: MixedBucket
    slots: NDArray[Any]
    samples: tuple[Address | None, ...]


def as_stored(tensors: dict[str, Tensor], step: int, slots: Sequence[int]) -> dict[str, Tensor]:
    """The view of a step in which nothing is random."""
    return tensors


def build_loader(
    mixture: Mixture,
    order: Order,
    split: Split,
    *,
    rank: int,
    start_step: int,
    stop_step: int,
    noise: Noise,
    view: View = as_stored,
    captions: bool = False,
    counts: Sequence[str] = (),
    workers: int = 0,
    pin_memory: bool = False,
    worker_init: Callable[[int], None] | None = None,
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
        view: (tensors of a micro-batch as they were read, step, its slots) -> the tensors that this step sees, (B, ...)
            each; what it makes of a slot of weight 0 is of no account.
        captions: give the captions too; each costs a second look at its sample.
        counts: text encoders whose tokens of each caption are given too, at the same cost.
        workers: processes that read ahead; 0 reads in this one.
        pin_memory: put batches in page-locked memory.
        worker_init: each worker calls it first, with its number.

    Yields:
        `(stop_step - start_step) * split.accumulation` batches.

    Raises:
        UserError: from `noise` or `counts_of`, or a place that cannot be read as datasets are.
        OutageError: a place cannot be reached.
        RuntimeError: a worker died; its text begins with `DataLoader worker`.
    """
    items = partial(work_items, mixture, order, split, rank, start_step, stop_step)
    make = partial(make_batches, mixture=mixture, noise=noise, view=view, captions=captions, counts=counts)
    pipeline = webdataset.DataPipeline(items, make)
    loader = webdataset.WebLoader(
        pipeline, batch_size=None, num_workers=workers, pin_memory=pin_memory, worker_init_fn=worker_init
    )
    try:
        yield from _started(loader)
    except (UserError, OutageError) as error:  # torch puts a worker's traceback before the text
        traceback.clear_frames(error.__traceback__)  # they hold the loader, and so the workers, until who knows when
        raise type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2].strip()) from None
    except (EOFError, ConnectionError) as error:  # it died while it handed a batch over
        raise RuntimeError(f"DataLoader worker (pid unknown) exited unexpectedly: {type(error).__name__}") from error


def _started(loader: webdataset.WebLoader) -> Iterator[Batch]:
    """The loader's iterator, without the signal handler that torch sets with the first one.

    It raises a worker's death wherever the process happens to be, even while another error is dealt with. Who waits
    for a batch of a dead worker is told within five seconds all the same.
    """
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if threading.current_thread() is threading.main_thread():  # nobody else may, and for nobody else torch does
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return batches


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


def make_batches(
    items: Iterable[WorkItem], mixture: Mixture, noise: Noise, view: View, captions: bool, counts: Sequence[str]
) -> Iterator[Batch]:
    """Read what each item asks for; a slot that is padding, or whose sample is damaged, holds zeros with weight 0."""
    reader = RowReader()
    for item in items:
        mixture.expect([address for address in item.samples if address is not None])
        yield _make_batch(item, mixture, noise, view, captions, counts, reader)


def _make_batch(
    item: WorkItem,
    mixture: Mixture,
    noise: Noise,
    view: View,
    captions: bool,
    counts: Sequence[str],
    reader: RowReader,
) -> Batch:
    count = len(item.samples)
    tensors = mixture.empty(item.bucket, count)
    counted = {role + COUNT: torch.zeros(count, dtype=torch.int64) for role in counts}
    shape = (mixture.channels, item.bucket.height, item.bucket.width)
    drawn, weight = torch.empty(count, *shape), torch.zeros(count)
    keys, words, bad = [""] * count, [""] * count, []
    for row, (slot, address) in enumerate(zip(item.slots.tolist(), item.samples, strict=True)):
        if address is not None:
            keys[row] = mixture.key(address)
            try:
                read_meta = cache(_fill(mixture, reader, address, tensors, row))
                drawn[row] = noise(shape, item.step, slot, read_meta)
                if captions:
                    words[row] = str(read_meta().get("caption", ""))
                for name, number in counts_of(read_meta(), counts, keys[row]).items() if counts else ():
                    counted[name][row] = number
                weight[row] = 1
            except DamageError as damage:
                bad.append(BadSample(keys[row], mixture.location(address).shard, str(damage)))
    tensors = {**view(tensors, item.step, item.slots.tolist()), **counted}
    for row in (weight == 0).nonzero().flatten().tolist():
        for tensor in (drawn, *tensors.values()):
            tensor[row] = 0
    size = (item.bucket.height, item.bucket.width)
    slots, named = torch.from_numpy(item.slots), (tuple(keys), tuple(bad), tuple(words) if captions else ())
    return Batch(item.step, size, slots, weight, tensors, drawn, *named)


def _fill(mixture: Mixture, reader: RowReader, address: Address, tensors: dict[str, Tensor], row: int) -> ReadMeta:
    """Read a sample into its row of a batch; returns what reads its json."""
    if mixture.raw is None:
        reader.read(mixture.storage(address), mixture.location(address), tensors, row)
        return lambda: mixture.sample(address).read_meta()
    sample = mixture.sample(address)
    for name, value in sample.tensors.items():
        if value.shape != tensors[name][row].shape:
            raise DamageError(f"{name} are of shape {tuple(value.shape)}, not of the bucket that the index says")
        tensors[name][row] = value
    return sample.read_meta
