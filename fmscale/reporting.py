"""What a run says of itself: before the first step, of each step, and now and then on the screen."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmscale.config import TrainConfig
from fmscale.distributed import World
from fmscale.engine.metrics import MetricsLog, Named, keep_before
from fmscale.engine.statistics import Look
from fmscale.engine.zero import WEIGHT
from fmscale.errors import UserError
from fmscale.expected import Expectation
from fmscale.files import append
from fmscale.gallery import SAMPLES, Gallery
from fmscale.guards import slow_ranks
from fmscale.log import get_logger
from fmscale.models.families import parts_of
from fmscale.models.flops import FLOPS, peak_flops
from fmscale.opening import opening
from fmscale.phases import Phase
from fmscale.tally import BINS, Tally
from fmscale.validation import VALIDATION, Validation

if TYPE_CHECKING:
    from rich.progress import Progress

    from fmscale.train import Job, StepResult

log = get_logger(__name__)
ENOUGH_STEPS = 10  # whose times tell a slow rank from an accident
BIN_NAMES = tuple(f"{i / BINS:g}-{(i + 1) / BINS:g}" for i in range(BINS))


def announce(job: Job, start: int) -> None:
    """Say in four lines what is about to run."""
    config, mixture = job.config, job.dataset.mixture
    for line in opening(config, mixture.name, ((each.name, each.count) for each in mixture.buckets), job.portions):
        log.info("%s", line)
    many = len(job.programme.phases) > 1
    phase = f", phase {job.phase.number} to step {job.phase.until}" if many else ""
    log.info("run      %s, steps %d to %d%s", config.run_dir, start, config.steps, phase)


def is_measured(config: TrainConfig, done: int) -> bool:
    """Whether the loss on held-out images is measured after so many steps."""
    return config.validation is not None and (due(config.validation.every_steps, done) or done == config.steps)


def due(every: int | None, done: int) -> bool:
    """Whether what happens every so many steps, or never, happens after this one."""
    return every is not None and done % every == 0


def look_at(job: Job, step: int) -> Look | None:
    """What looks at the gradient of a step, counted from 0, if that is to be told of; on every rank alike."""
    logging, counting = job.config.log, due(job.config.log.histogram_every_steps, step + 1)
    if not (counting or due(logging.every_steps, step + 1)):
        return None
    return Look(parts_of(job.config.model.family, job.engine.names), job.world.device, counting)


class Reporter:
    """Takes what each step leaves, and writes it now and then. Every rank has one, rank 0 writes.

    Args:
        job: the run.
        start: steps that are done.
    """

    def __init__(self, job: Job, start: int) -> None:
        self.job, config = job, job.config
        self.metrics = MetricsLog(config.run_dir, start + 1, config.log.tensorboard) if job.world.is_main else None
        self.skipped: int | Tensor = self.metrics.last.get("skipped_steps", 0) if self.metrics else 0
        peak = peak_flops(device_names(job.world)[0], config.engine.dtype)
        self.peak = None if peak is None else peak * job.world.world_size
        self.gallery = None if config.log.images_every_steps is None else Gallery(job)
        self.validation = None if config.validation is None else Validation(job)
        self.expected = self._expect()
        if job.world.is_main:
            keep_before(config.run_dir / VALIDATION, start + 1)
        self.times: list[list[float]] = []
        self.slow: dict[int, float] = {}

    def _expect(self) -> Expectation | None:
        """What the phase should be like, said in a line; rank 0 does."""
        if self.metrics is None:
            return None
        try:
            expected = Expectation(self.job)
        except UserError as error:  # DeepSpeed has taken the settings all the same
            log.warning("plan     none: %s", error)
            return None
        expected.announce()
        return expected

    def turn(self, job: Job, bar: Progress) -> None:
        """Go on with another phase, once all of the one before is written."""
        self.flush(bar)
        self.job = job
        if self.expected is not None:
            self.expected.compare()
        self.expected = self._expect()
        if self.metrics is not None:
            self.metrics.show(job.config.log.tensorboard, job.phase.start + 1)
        self.gallery = None if job.config.log.images_every_steps is None else Gallery(job)
        self.validation = None if job.config.validation is None else Validation(job)

    def take(self, result: StepResult, told: Tally | None, seconds: float) -> None:
        """Note a step, without waiting for the device, and what ranks told in the one before."""
        if self.metrics is not None:
            self.times += [] if told is None else [told.seconds.tolist()]
            self.skipped = self.skipped + (~result.applied).int()
            job = self.job
            record = step_record(job.phase, result)
            fast = speed(job.config, result.bucket, job.dataset.text_tokens, seconds)
            mfu = None if self.peak is None else fast["flops_per_s"] / self.peak
            self.metrics.add(**record, skipped_steps=self.skipped, **fast, mfu=mfu, memory_gb=memory_gb(job.world))

    def flush(self, bar: Progress) -> None:
        """Write the steps that were noted, and show where the run is."""
        if self.metrics is not None:
            self.job.start.check()
            if records := self.metrics.flush():
                report(self.job.config, records, bar)
            if self.expected is not None:
                self.expected.note(records)
            self._name_slow()

    def _name_slow(self) -> None:
        """Say which ranks the others wait for, when these are not the same as before."""
        if len(self.times) < ENOUGH_STEPS:
            return
        slow = slow_ranks(self.times)
        self.times.clear()
        for rank in slow.keys() - self.slow.keys():
            log.warning("rank %d is slow: it takes %.1f times as long as ranks do by the median", rank, slow[rank])
        for rank in self.slow.keys() - slow.keys():
            log.info("rank %d is as fast as the others again", rank)
        self.slow = slow

    def show(self, result: StepResult, done: int) -> None:
        """Write histograms and images where they are due; every rank calls it after every step."""
        if due(self.job.config.log.histogram_every_steps, done):
            self._show_histograms(result, done)
        if self.gallery is not None and due(self.job.config.log.images_every_steps, done):
            self.job.watch.at(done - 1, "drawing images")
            sheet = self.gallery.draw()
            if self.metrics is not None and sheet is not None:
                self.metrics.add_image(SAMPLES, sheet, done)

        if self.validation is not None and is_measured(self.job.config, done):
            self.job.watch.at(done - 1, "validating")
            self._show_validation(self.validation.measure(), done)

    def _show_validation(self, records: Sequence[Mapping[str, Any]], done: int) -> None:
        if self.metrics is None:
            return
        self.job.start.check()
        append(self.job.config.run_dir / VALIDATION, *({"step": done, **record} for record in records))
        for record in records:
            self.metrics.add_scalar(f"validation/{record['weights']}", record["loss"], done)
        told = ", ".join(f"{record['weights']} {record['loss']:.4f}" for record in records)
        log.info("step %d: validation loss on %d images: %s", done, records[0]["images"], told)

    def _show_histograms(self, result: StepResult, done: int) -> None:
        weights = Look(parts_of(self.job.config.model.family, self.job.engine.names), self.job.world.device, True)
        weights({piece.name: piece.tensors[WEIGHT] for piece in self.job.engine.pieces()})
        for kind, look in (("weights", weights.share()), ("gradients", result.gradient)):
            if self.metrics is not None and look is not None:
                for part, sums in zip(look.names, look.sums.tolist(), strict=True):
                    self.metrics.add_histogram(f"{kind}/{part}", sums, done)

    def close(self) -> None:
        """Write what is left, and say how it was beside the plan."""
        if self.metrics is not None:
            self.job.start.check()
            self.metrics.close()
        if self.expected is not None:
            self.expected.compare()


def step_record(phase: Phase, result: StepResult) -> dict[str, Any]:
    """What a step did: the first half of its object in metrics.jsonl."""
    tally, gradient, done = result.tally, result.gradient, result.step + 1
    return {
        "step": done,
        "images_seen": phase.images_seen(done),
        "phase": phase.number,
        "bucket": f"{result.bucket[0]}x{result.bucket[1]}",
        "loss": tally.loss / tally.images,
        "loss_by_t": Named(BIN_NAMES, tally.loss_by_t / tally.images_by_t),
        "loss_ratio": result.loss_ratio,
        "grad_norm": result.grad_norm,
        "grad_norms": None if gradient is None else Named(gradient.names, gradient.norms(result.grad_norm)),
        "lr": result.lr,
        "applied": result.applied,
        "bad_samples": tally.bad.int(),
        "data_wait_s": result.data_wait_s,
        **({} if phase.config.flow.transport == "none" else {"transport_s": result.transport_s}),
    }


def speed(config: TrainConfig, bucket: tuple[int, int], text_tokens: int, seconds: float) -> dict[str, float]:
    """How fast a step was, over all ranks.

    Args:
        config: model and global batch.
        bucket: latent (height, width).
        text_tokens: of a caption, as the network takes them.
        seconds: that the step took.

    Returns:
        `step_s`, `images_per_s`, `tokens_per_s` (of image and text) and `flops_per_s` (of forward and backward; what
        was computed again to save memory does not count).
    """
    model, (height, width) = config.model, bucket
    tokens = (height // model.patch_size) * (width // model.patch_size) + text_tokens
    flops = FLOPS[model.family](model.model_dump(), height, width, text_tokens).train_step
    images = config.global_batch / seconds
    return {
        "step_s": seconds,
        "images_per_s": images,
        "tokens_per_s": images * tokens,
        "flops_per_s": images * flops,
    }


def memory_gb(world: World) -> float:
    """Most gigabytes that were in use: on the GPU since this was last asked, of a process on the CPU since it began."""
    if world.device.type == "cuda":
        most = torch.cuda.max_memory_allocated(world.device)
        torch.cuda.reset_peak_memory_stats(world.device)
        return most / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def report(config: TrainConfig, records: Sequence[Mapping[str, Any]], bar: Progress) -> None:
    """Show where the run is: on the bar, or as a line where the output is no terminal."""
    for record in records:
        if not record["applied"]:
            log.warning("step %d: %s, so nothing was updated", record["step"], why_dropped(config, record))
    last = records[-1]
    loss = float("nan") if last["loss"] is None else last["loss"]
    task = bar.tasks[0]
    bar.update(task.id, completed=last["step"], loss=loss, rate=last["images_per_s"])
    if bar.disable:
        left = "" if task.time_remaining is None else f" · {timedelta(seconds=int(task.time_remaining))} left"
        shown = (last["step"], config.steps, loss, last["images_per_s"], left)
        log.info("step %d of %d · loss %.4f · %.1f images/s%s", *shown)


def why_dropped(config: TrainConfig, record: Mapping[str, Any]) -> str:
    """What was wrong with a step that was not applied, from its object in metrics.jsonl."""
    limit, ratio = config.guard.max_loss_ratio, record["loss_ratio"]
    if limit is not None and ratio is not None and ratio > limit:
        return f"its loss was {ratio:.1f} times what its timesteps cost as a rule"
    return "a gradient was not finite"


def device_names(world: World) -> list[str]:
    if world.device.type == "cuda":
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"cpu, {torch.get_num_threads()} threads"]
