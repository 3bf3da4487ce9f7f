"""Pre-encoding: images and captions -> aspect buckets -> indexed latent shards.

a thread, and processes   which unit (unfinished) -> bytes, caption (data/sources) -> bucket, resize, crop
another thread            -> frozen networks, on the device (features)
the program itself        -> shards of the unit (data/shards) -> the unit is done (unfinished)
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fmscale import inputs
from fmscale.ahead import Processes, ahead
from fmscale.config import EncodeConfig
from fmscale.data import reasons
from fmscale.data.buckets import grouped
from fmscale.data.index import Index
from fmscale.data.prepare import Preparation, Prepared, decode_image
from fmscale.data.shards import ShardWriter
from fmscale.data.sources import Unit
from fmscale.data.transport import is_remote
from fmscale.dataset import making
from fmscale.distributed import STOP_SIGNALS, world_from_environment
from fmscale.features import Encoder, absolute, add_up, check_buckets, describe, summarize
from fmscale.log import get_logger, progress
from fmscale.unfinished import FAILURES, Job, Outcome, check_same, clear_up, is_finished, open_job, read_manifest, tally

log = get_logger(__name__)
BATCHES_AHEAD = 4  # that are decoded and not yet encoded, and that are encoded and not yet written
PADDED = "padded"  # a fact: images that seem to have been padded to squares
# Settings that may differ among workers, and when the work is taken up again.
FREE = {"out", "workers", "claim_timeout_s"}


class Step(NamedTuple):
    """A batch of a unit on its way, or what ends the unit.

    Attributes:
        unit: its name.
        images: of one bucket; empty at the end.
        tensors: that are stored of each, once they are encoded.
        outcome: of the images that did not come so far; at the end alone.
    """

    unit: str
    images: list[Prepared]
    tensors: Sequence[dict[str, Tensor]] = ()
    outcome: Outcome | None = None


class Plan(NamedTuple):
    """What there is to do.

    Attributes:
        preparation: of each image.
        units: of the source, by name.
        description: of the dataset, as far as it is known before the networks are loaded.
    """

    preparation: Preparation
    units: dict[str, Unit]
    description: dict[str, Any]


def encode(config: EncodeConfig) -> Index:
    """Encode a source of images into a dataset, alone or beside others who do the same, or go on where it was left.

    Work is claimed unit by unit: a tar, or a run of the files of a folder. What becomes of a unit depends on the unit
    alone. An image that cannot be used is named, counted by reason, listed in `failures.jsonl`, and skipped.

    Args:
        config: what to encode, with what, and where to.

    Returns:
        The dataset's index, once every unit is done, by whomever.

    Raises:
        UserError: a path is missing, `out` holds something else or was begun otherwise, buckets do not fit the VAE,
            the disk is full, or no image is usable.
    """
    plan = check_setup(config)
    if not is_finished(config.out):
        with interruptible(), decoders(config, plan) as decode:
            encoder = Encoder(config)
            check_buckets(plan.preparation, encoder.vae)
            take_part(config, plan, encoder, decode)
    clear_up(config.out)
    index = Index.open(config.out)
    if world_from_environment().is_main:
        _tell(config.out, index)
    return index


def check_setup(config: EncodeConfig) -> Plan:
    """Find out what there is to do, without the networks.

    Raises:
        UserError: what of `encode`'s can be known so early.
    """
    units = {unit.name: unit for unit in inputs.open_units(config)}
    description = {"config": _settings(config), "units": list(units)}
    check_same(config.out, description)
    return Plan(inputs.preparation(config), units, description)


def _settings(config: EncodeConfig) -> dict[str, Any]:
    """The settings on which the dataset depends, with paths that hold from any folder."""
    settings = config.model_dump(mode="json", exclude=FREE)
    if not is_remote(config.images):
        settings["images"] = str(Path(config.images).absolute())
    sources = {key: absolute(value) if isinstance(value, dict) else value for key, value in settings["text"].items()}
    return settings | {"text": sources, "vae": absolute({"path": settings["vae"]})["path"]}


def _tell(out: Path, index: Index) -> None:
    manifest = read_manifest(out)
    log.info("%s: %s samples in buckets %s", out, f"{len(index):,}", ", ".join(b.name for b in index.buckets))
    for sentence in describe(manifest["captions"]):
        log.info("%s", sentence)
    if skipped := manifest["failures"]:
        log.warning("%d images were skipped (%s); see %s", sum(skipped.values()), tally(skipped), out / FAILURES)
    if padded := manifest["padded"]:
        log.warning("%d images seem to have been padded to squares: their aspect ratio is lost", padded)


@contextmanager
def interruptible() -> Iterator[None]:
    """A signal that asks to stop ends the block like Ctrl-C, once, so that what was begun is cleaned up."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        for other in STOP_SIGNALS:  # a worker may be sent one from the terminal and one from its parent
            signal.signal(other, lambda number, frame: None)  # of SIG_IGN, Python complains if one is on its way
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def decoders(config: EncodeConfig, plan: Plan) -> Processes:
    """The processes that decode images; they start at once, while the networks are loaded."""
    return Processes(config.workers, partial(decode_image, preparation=plan.preparation))


def take_part(config: EncodeConfig, plan: Plan, encoder: Encoder, decode: Processes) -> Meter:
    """Encode units until all are done, by whomever, and see to it that the dataset is put in place.

    Args:
        config: what to encode, and where to.
        plan: from `check_setup`.
        encoder: of the config.
        decode: from `decoders`.

    Returns:
        How fast it went.
    """
    made_by = encoder.identity()
    same = plan.description | {"made_by": making(made_by)}  # a network may lie elsewhere on another machine
    meter = Meter(len(plan.units))
    with (
        open_job(config.out, same, config.claim_timeout_s) as job,
        meter.shown() as show,
    ):
        batches = _prepared(config, plan, job, decode)
        with (
            ahead(batches, BATCHES_AHEAD) as prepared,
            ahead(_encoded(encoder, prepared, meter), BATCHES_AHEAD) as encoded,
            closing(job),  # first to end, so that neither thread waits for more work
        ):
            for first in encoded:
                unit, steps = first.unit, _to_the_end(first, encoded)
                with job.attempt(unit) as folder:
                    job.commit(unit, folder, _write(folder, unit, steps, config.shard_samples, encoder))
                deque(steps, maxlen=0)  # where another worker has taken the unit over
                show(job.done)
            job.finish(encoder.null, made_by, _about)
    return meter


def _about(facts: Mapping[str, float]) -> dict[str, Any]:
    """What the manifest tells of facts about all images."""
    return {"padded": facts.get(PADDED, 0), "captions": summarize(facts)}


def _prepared(config: EncodeConfig, plan: Plan, job: Job, decode: Processes) -> Iterator[Step]:
    """Claim units, and decode their images: batches of one bucket each, whose members depend on the unit alone."""
    for name in job.claimed():
        outcome = Outcome()
        images = _usable(decode.map(plan.units[name].read()), outcome)
        for batch in grouped(images, lambda image: image.pixels.shape, config.batch):
            yield Step(name, batch)
        yield Step(name, [], outcome=outcome)


def _usable(decoded: Iterable[list[Prepared] | dict[str, str]], outcome: Outcome) -> Iterator[Prepared]:
    """The images that can be used; of the others the outcome is told."""
    for item in decoded:
        if isinstance(item, dict):
            _skip(outcome, **item)
            continue
        add_up(outcome.facts, {PADDED: item[0].padded})
        yield from item


def _encoded(encoder: Encoder, steps: Iterable[Step], meter: Meter) -> Iterator[Step]:
    """The same steps, with the tensors of their images."""
    for step in steps:
        if not step.images:
            yield step
            continue
        with meter.busy(len(step.images)):
            pairs = list(encoder.encode(step.images))
        yield step._replace(images=[image for image, _ in pairs], tensors=[tensors for _, tensors in pairs])


def _to_the_end(step: Step, later: Iterator[Step]) -> Iterator[Step]:
    """The steps of a unit; to ask for one more would be to wait for another unit, which waits for this one."""
    yield step
    while step.outcome is None:
        step = next(later)
        yield step


def _write(folder: Path, unit: str, steps: Iterable[Step], samples_per_shard: int, encoder: Encoder) -> Outcome:
    """Write the shards of a unit; returns what became of its images."""
    written = Outcome()
    with ShardWriter(folder, prefix=f"{unit}-", samples_per_shard=samples_per_shard) as writer:
        for step in steps:
            for image, tensors in zip(step.images, step.tensors, strict=True):
                if all(bool(torch.isfinite(value).all()) for value in tensors.values()):
                    writer.write(image.key, tensors, image.meta)
                    add_up(written.facts, encoder.facts(image.meta))
                else:
                    _skip(written, image.key, reasons.NOT_FINITE)
            if step.outcome:
                written.failures[:0] = step.outcome.failures
                add_up(written.facts, step.outcome.facts)
    return written


def _skip(outcome: Outcome, key: str, reason: str, detail: str = "") -> None:
    if not any(failure["reason"] == reason for failure in outcome.failures):  # one of a kind and unit is enough to read
        log.warning("skipped %s: %s", key, f"{reason}: {detail}" if detail else reason)
    outcome.failures.append({"key": key, "reason": reason, "detail": detail})


class Meter:
    """How fast this worker encodes, and how much of its time the device has nothing to do.

    Attributes:
        images: encoded so far.
        busy_s: seconds of encoding.
        began: when the first batch was there.
    """

    def __init__(self, units: int) -> None:
        self.images, self.busy_s, self.began = 0, 0.0, 0.0
        self._units, self._mine = units, 0

    @contextmanager
    def busy(self, images: int) -> Iterator[None]:
        """Time the encoding of a batch."""
        began = time.perf_counter()
        self.began = self.began or began
        yield
        self.busy_s += time.perf_counter() - began
        self.images += images

    @property
    def rates(self) -> str:
        """Images per second and the share of waiting, in words."""
        elapsed = max(time.perf_counter() - self.began, 1e-9)
        return f"{self.images / elapsed:.1f} images/s, device waits {max(0, 1 - self.busy_s / elapsed):.0%}"

    @contextmanager
    def shown(self) -> Iterator[Callable[[int], None]]:
        """A progress bar in images of all workers, as many as units like those of this one hold.

        Yields:
            What is to be called after each unit, with the number of units that are done.
        """
        with progress("{task.fields[rates]}") as bar:
            task = bar.add_task("encode", total=None, rates="")

            def show(done: int) -> None:
                self._mine += 1
                each = self.images / self._mine
                bar.update(task, completed=round(each * done), total=round(each * self._units), rates=self.rates)

            yield show
        if self.images:
            log.info("%d images encoded by this worker, %s", self.images, self.rates)
