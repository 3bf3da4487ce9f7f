"""Training: build, loop, train_step. Read it from the top; each formula is two hops away.

data/order -> data/reader -> data/loader ──► Batch
train_step: draws ──► times, conditioning dropout ; objective: flow/path ──► noisy_latents, velocity
            engine(noisy_latents, t, context, pooled) ──► velocity ; flow/loss, flow/weights ──► loss per image
            engine.backward ; after the last micro-batch engine.step (clip, AdamW + EMA)
"""

from __future__ import annotations

import functools
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmscale import slurm
from fmscale.batch import Batch, prefetch
from fmscale.building import (
    STRICT,
    Allowed,
    Programme,
    build_engine,
    check_checkpoint,
    check_setup,
    enter,
    kernels_of,
    limits_of,
    portions_of,
    retention_of,
    shards_seen,
    start_from,
)
from fmscale.config import FlowConfig, TrainConfig
from fmscale.control import Delayed, Requests, Wish, forget_files, outlive_signals, release_readers
from fmscale.data.loader import WorkItem, build_loader, make_batches
from fmscale.data.order import Split
from fmscale.dataset import Dataset
from fmscale.distributed import World, barrier, same_everywhere, world_from_environment
from fmscale.draws import JITTER, Draws, draw_noise, draw_step, draw_view, drop_text
from fmscale.encoders.text import assemble
from fmscale.engine import attention
from fmscale.engine import checkpoint as checkpoints
from fmscale.engine.blocks import backward_at_once
from fmscale.engine.metrics import keep_before
from fmscale.engine.optim import SIGMA_PREFIX
from fmscale.engine.saver import Folder, SaveError, Saver
from fmscale.engine.statistics import Look
from fmscale.engine.zero import Engine, init_process_group
from fmscale.errors import OutageError, SharedError, UserError
from fmscale.files import append
from fmscale.flow.noise import keyed_generator
from fmscale.flow.transport import transport
from fmscale.guards import BAD_SAMPLES, LossGuard, Stopwatch, check_damage
from fmscale.log import get_logger, progress
from fmscale.objective import losses, network_of, weight_of
from fmscale.phases import Phase, learning_rate_at, phase_of
from fmscale.recovery import SKIPPED, Streak, load, settle, wait_for_save
from fmscale.reporting import Reporter, announce, device_names, look_at
from fmscale.runs import checkpoints_dir, snapshots_dir, start_run_dir
from fmscale.starts import Ending, Start, new_start
from fmscale.tally import BINS, Tally
from fmscale.watchdog import Watchdog, cut_off

log = get_logger(__name__)


class Job(NamedTuple):
    """A run in progress: what every function of the loop works with.

    Attributes:
        config: what is trained, as the phase has it.
        dataset: what it learns in the phase.
        engine: the model under ZeRO.
        world: this process among the ranks.
        portions: how a global batch falls to ranks and micro-batches.
        start: this one among all starts of the run.
        saver: writes its checkpoints.
        watch: is told where this rank is.
        guard: drops steps whose loss leaps.
        stopwatch: times this rank's own part of each step.
        programme: phases of the run, and their datasets.
        phase: the one that the next step is in.
        kernels: what computes the attention, by phase and bucket.
    """

    config: TrainConfig
    dataset: Dataset
    engine: Engine
    world: World
    portions: Split
    start: Start
    saver: Saver
    watch: Watchdog
    guard: LossGuard
    stopwatch: Stopwatch
    programme: Programme
    phase: Phase
    kernels: Mapping[Hashable, str]


def train(config: TrainConfig, allowed: Allowed = STRICT) -> None:
    """Train from the newest checkpoint of the run directory, or from scratch, until `config.steps`.

    Every rank of the job calls it.

    Args:
        config: what to train.
        allowed: what the command line permits.

    Raises:
        UserError: before anything is written, if config, dataset and run directory do not fit together.
    """
    world = world_from_environment()
    programme = check_setup(config, world.world_size, allowed)
    with slurm.meeting(world, config.run_dir / slurm.FOLDER):
        init_process_group(world)
    for dataset in programme.datasets:
        if not same_everywhere(dataset.mixture.fingerprint, world.device):
            raise UserError(
                f"data: the ranks found different indices in {dataset.mixture.name}; start again when it is whole"
            )
    begun = new_start(config.run_dir, world)
    if world.is_main:
        forget_files(config.run_dir)  # that were meant for a start before this one
    try:
        ending = run(config, programme, world, begun, allowed)
    except Exception as error:
        if world.is_main:
            begun.end("failed", why=str(error) or repr(error))
        raise
    if world.is_main:
        begun.end(ending)


def run(config: TrainConfig, programme: Programme, world: World, begun: Start, allowed: Allowed) -> Ending:
    """What `train` does once the ranks have found one another; returns how it ended."""
    found = checkpoints.choose(checkpoints_dir(config.run_dir), world)
    start = 0 if found is None else found.step
    phase = phase_of(programme.phases, start)
    portions = portions_of(phase, world)
    engine = build_engine(phase.config, world.device, portions.micro_batch)
    guard = LossGuard(BINS, phase.config.guard.max_loss_ratio, world.device)
    programme = resume(found, config, programme, engine, guard, world, allowed)
    kernels, tried = kernels_of(programme, config.run_dir, world)
    if world.is_main:
        checkpoints.discard_after(snapshots_dir(config.run_dir), start)  # they are written again
        start_run_dir(config, device_names(world), shards_seen(config, programme.datasets), tried)
    retention, private = retention_of(phase.config), config.checkpoint.private
    saver = Saver(checkpoints_dir(config.run_dir), world, retention, private, begun.name, begun.check)
    try:
        with Watchdog(world, config.run_dir, limits_of(phase.config), lambda: saver.progress, begun) as watch:
            tools = begun, saver, watch, guard, Stopwatch(world.device), programme, phase, kernels
            dataset = programme.datasets[phase.number].to(world.device)
            return loop(Job(phase.config, dataset, engine, world, portions, *tools), start)
    except BaseException as error:
        release_readers()  # else they would hold this process up for a minute
        saver.abandon()
        if isinstance(error, RuntimeError) and cut_off(str(error)):
            raise OutageError(f"another rank does not answer any more ({error})") from error
        raise


def resume(
    found: checkpoints.Checkpoint | None,
    config: TrainConfig,
    programme: Programme,
    engine: Engine,
    guard: LossGuard,
    world: World,
    allowed: Allowed,
) -> Programme:
    """Restore a checkpoint, if there is one; else begin with the weights that `model.init_from` names.

    Returns:
        The programme, with what was stored when.

    Raises:
        UserError: the checkpoint does not fit.
    """
    if found is None:
        if config.model.init_from is not None:
            start_from(config.model.init_from, config, engine, world)
        return programme
    programme = check_checkpoint(programme, found, engine.shapes, allowed)
    load(engine, found, world)
    description = found.index["description"]
    before = FlowConfig().model_dump(mode="json") | description["config"]["flow"]
    if before == phase_of(programme.phases, found.step).config.flow.model_dump(mode="json"):
        guard.restore(description["loss_guard"])  # else it would judge another loss
    if world.is_main:
        checkpoints.set_aside_after(found)
    log.info("resumed %s", found.path)
    return programme


def loop(job: Job, start: int) -> Ending:
    """Steps `start` … `config.steps`, with metrics and checkpoints; returns how it ended."""
    config, drawn = job.config, job.phase.images_seen(start)
    if start >= config.steps:
        log.info("nothing to do: %d of %d steps are done; raise `steps` to train on", start, config.steps)
        return "done"
    announce(job, start)
    if job.world.is_main:
        for name in (BAD_SAMPLES, SKIPPED):
            keep_before(config.run_dir / name, start + 1)
    barrier()  # only then may ranks add to those files
    batches = batches_of(job, start)
    bad = torch.zeros((), device=job.world.device)
    reporter = Reporter(job, start)
    requests, agreed = Requests(config.run_dir, job.world.is_main, job.watch.hurry), Delayed()
    done, streak, recent = start, Streak(), list[StepResult]()
    with progress("loss {task.fields[loss]:.4f} · {task.fields[rate]:.1f} images/s") as bar, requests.listening():
        bar.add_task("train", total=config.steps, completed=start, loss=float("nan"), rate=0.0)
        compile_ahead(job, start)
        for step in range(start, config.steps):
            if step == job.phase.until:
                job = turn(job)
                batches = batches_of(job, step)
                reporter.turn(job, bar)
            began = time.perf_counter()
            result = train_step(job, batches, step, requests.heard())
            done = step + 1
            bad += result.tally.bad
            told = agreed.exchange(result.tally.values)
            before = None if told is None else Tally(told)
            wish = Wish() if before is None else before.wish
            saving = any(wish) or done == config.steps or done % job.config.checkpoint.every_steps == 0
            logging = saving or done % job.config.log.every_steps == 0
            reporter.take(result, before, time.perf_counter() - began)
            recent.append(result)
            if logging:
                reporter.flush(bar)
                check_damage(job.config, int(bad), job.phase.images_seen(done) - drawn)
                streak = settle(job, recent, streak)
                recent.clear()
            reporter.show(result, done)
            if folders := folders_for(job, done, saving):
                save(job, done, folders)
            elif logging and not job.saver.busy:
                wait_for_save(job)  # says so if the last one has failed
            if wish.stop:
                break
        job.watch.at(done - 1, "waiting for the last checkpoint")
        try:
            job.saver.wait()
        except SaveError as error:
            raise SharedError(f"{error}; mend that, then run the same command again") from error
        reporter.close()
        requests.forget_files()
    said = "done" if done == config.steps else "stopped as asked, the same command goes on from here"
    log.info("%s: %d steps, %s images, in %s", said, done, f"{job.phase.images_seen(done):,}", config.run_dir)
    return "done" if done == config.steps else "stopped" if requests.for_good else "left"


def turn(job: Job) -> Job:
    """The next phase begins."""
    phase = job.programme.phases[job.phase.number + 1]
    enter(phase, job.config, job.engine, job.saver, job.watch, job.guard)
    dataset = job.programme.datasets[phase.number].to(job.world.device)
    job = job._replace(config=phase.config, dataset=dataset, portions=portions_of(phase, job.world), phase=phase)
    announce(job, phase.start)
    compile_ahead(job, phase.start)
    return job


def compile_ahead(job: Job, start: int) -> None:
    """Compile the blocks for each bucket of the phase, forward and backward, so that none of its steps has to.

    Every rank calls it. Nothing changes but what is compiled: the batches are empty, and no gradient is kept.
    """
    if not job.config.engine.compile or start == job.phase.until:
        return
    began, mixture, slots = time.perf_counter(), job.dataset.mixture, np.arange(job.portions.micro_batch)
    for bucket in mixture.buckets:
        job.watch.at(start, f"compiling bucket {bucket.name}")
        item = WorkItem(start, bucket, slots, (None,) * len(slots))
        (batch,) = make_batches([item], mixture, **reading(job))
        batch = batch.to(job.world.device)
        draws = draw_step(job.config, start, len(job.dataset.encoders), batch.bucket).of(batch.slots, job.world.device)
        kernel, blocks = job.kernels[job.phase.number, batch.bucket], job.engine.engine.module.blocks
        with attention.using(kernel), backward_at_once(blocks):
            losses_of(job, batch, draws)
    names = ", ".join(bucket.name for bucket in mixture.buckets)
    log.info("compiled for buckets %s in %.0f s", names, time.perf_counter() - began)


def batches_of(job: Job, start: int) -> Iterator[Batch]:
    """This rank's micro-batches from step `start` on, on its device."""
    config, mixture = job.config, job.dataset.mixture
    batches = build_loader(
        mixture,
        mixture.order(config.global_batch, config.seed, config.data.run, job.dataset.generations),
        job.portions,
        rank=job.world.rank,
        start_step=start,
        stop_step=job.phase.until,
        workers=config.data.workers,
        pin_memory=job.world.device.type == "cuda",
        worker_init=outlive_signals,
        **reading(job),
    )
    return prefetch(batches, job.world.device)


def reading(job: Job) -> dict[str, Any]:
    """How samples become batches: arguments of `make_batches` and `build_loader`."""
    config, dataset = job.config, job.dataset
    return {
        "noise": functools.partial(draw_noise, config.flow.coupling, config.seed),
        "view": functools.partial(draw_view, config.seed, dataset.mixture.raw, jitter=config.flow.sigma > 0),
        "captions": dataset.online is not None,
        "counts": dataset.counted if dataset.online is None else (),
    }


class StepResult(NamedTuple):
    """What a step leaves for the log.

    Attributes:
        step: counted from 0.
        keys: of this rank's samples, empty for padding.
        tally: over all ranks.
        loss_ratio: loss over what its timesteps cost as a rule, NaN while that is not known; shape ().
        grad_norm: before clipping.
        gradient: what it is like, part by part, in steps that are to tell.
        lr: learning rate.
        applied: False where a gradient was not finite or the loss leapt, so that nothing was changed; shape (), bool.
        bucket: latent (height, width).
        data_wait_s: time spent waiting for the loader.
        transport_s: time that matching noise with images took, waiting for the device included.
    """

    step: int
    keys: Sequence[str]
    tally: Tally
    loss_ratio: Tensor
    grad_norm: Tensor
    gradient: Look | None
    lr: float
    applied: Tensor
    bucket: tuple[int, int]
    data_wait_s: float
    transport_s: float


def train_step(job: Job, batches: Iterator[Batch], step: int, wish: Wish) -> StepResult:
    """One optimizer step: this rank's micro-batches forward and backward, then the update.

    The gradient is that of the loss summed over the global batch's sound images, divided by `global_batch`: the same
    for every world size and micro-batch.
    """
    config, device = job.config, job.world.device
    job.watch.at(step, "starting a step")
    job.stopwatch.start()
    scale = job.world.world_size / config.global_batch  # ranks' gradients are averaged
    tally, ratio = Tally.begin(job.world, wish), torch.empty(())
    waited, keys = 0.0, list[str]()
    for micro in range(job.portions.accumulation):
        batch, seconds = next_batch(job, batches, step)
        waited, keys = waited + seconds, keys + list(batch.keys)
        if micro == 0:  # all micro-batches of a step are of one bucket
            draws = draw_step(config, step, len(job.dataset.encoders), batch.bucket)
        drawn = draws.of(batch.slots, device)
        kernel = job.kernels[job.phase.number, batch.bucket]
        with attention.using(kernel):  # the backward pass too: it may compute blocks again
            errors = losses_of(job, batch, drawn) * batch.weight
            found = errors * weight_of(config.flow, drawn.times.t)
            tally.add(found.detach(), errors.detach(), drawn.times.t, batch)
            loss, last = found.sum() * scale, micro == job.portions.accumulation - 1
            if last:
                ratio, factor = agree(job, tally)
                loss = loss * factor
            job.engine.backward(loss, last)
    job.watch.at(step, "updating the weights")
    lr, look = learning_rate_at(job.phase, step), look_at(job, step)
    applied = job.engine.step(lr, look)
    gradient = None if look is None else look.share()
    known = ratio, job.engine.grad_norm, gradient, lr, applied, batch.bucket
    return StepResult(step, keys, tally, *known, waited, job.stopwatch.transport_s)


def next_batch(job: Job, batches: Iterator[Batch], step: int) -> tuple[Batch, float]:
    """The next micro-batch, whose damaged samples are named, and the seconds that it was waited for."""
    job.watch.at(step, "waiting for data")
    asked = time.perf_counter()
    batch = next(batches)
    waited = time.perf_counter() - asked
    job.watch.at(step, "in a micro-batch")
    assert batch.step == step, f"the loader is at step {batch.step}, the trainer at {step}"
    _name_bad(job, batch)
    return batch, waited


def agree(job: Job, tally: Tally) -> tuple[Tensor, Tensor]:
    """Sum the step's tally over ranks, before its last backward pass, and judge the loss.

    Returns:
        The loss over what was expected; and a factor for the loss, 1 or NaN, the same on every rank. NaN makes every
        gradient NaN, and a step whose gradient is not finite is dropped everywhere: nobody waits to be told.
    """
    tally.seconds[job.world.rank] = job.stopwatch.stop()
    tally.share()
    return job.guard.judge(tally.error_by_t, tally.images_by_t)


def losses_of(job: Job, batch: Batch, draws: Draws) -> Tensor:
    """Loss of each image of a micro-batch under its draws, without the weight of its t, shape (B,)."""
    flow, dataset = job.config.flow, job.dataset
    features = dataset.text_of(batch.tensors, batch.captions)
    text = drop_text(features, dataset.encoders, draws.dropped, dataset.null)
    given = assemble(text, context_dim=job.config.model.context_dim, t5_length=dataset.t5_length)
    latents = dataset.latents_of(batch.tensors)
    noise = batch.noise if flow.transport == "none" else matched(job, batch, latents)
    return losses(flow, network_of(job.engine, given, flow), latents, noise, draws.times, batch.tensors.get(JITTER))


def matched(job: Job, batch: Batch, latents: Tensor) -> Tensor:
    """The noise of a micro-batch, given to those of its images that it is nearest to."""
    flow = job.config.flow
    generator = keyed_generator("transport", job.config.seed, batch.step, int(batch.slots[0]))
    with job.stopwatch.transport():
        chosen = transport(flow.transport, latents, batch.noise, batch.weight, generator, blur=flow.transport_blur)
    return batch.noise[chosen]


def folders_for(job: Job, done: int, saving: bool) -> list[Folder]:
    """Where to save after a step; the averages first, so that who goes on from a checkpoint has all those before it."""
    config = job.config
    every = config.ema.snapshot_every_steps
    averages = [Folder(snapshots_dir(config.run_dir), kinds=SIGMA_PREFIX)] if every and done % every == 0 else []
    return averages + ([job.saver.checkpoints] if saving else [])


def save(job: Job, done: int, folders: Sequence[Folder]) -> None:
    """Begin to write what the step has come to."""
    config = job.config
    job.watch.at(done - 1, "saving")
    wait_for_save(job)
    job.saver.start(
        job.engine.pieces(),
        step=done,
        updates=job.engine.updates,
        shapes=job.engine.shapes,
        description={
            "images_seen": job.phase.images_seen(done),
            "config": config.model_dump(mode="json"),
            "dataset": job.dataset.identity(),
            "null": config.conditioning.null,
            "loss_guard": job.guard.state(),
        },
        folders=folders,
    )


def _name_bad(job: Job, batch: Batch) -> None:
    """Name the damaged samples of a micro-batch, in the log and in the run's list."""
    for sample in batch.bad:
        log.warning("bad sample %s in %s has weight 0: %s", sample.key, sample.shard, sample.reason)
    if batch.bad:
        job.start.check()
        bad = [{"step": batch.step + 1, **asdict(sample)} for sample in batch.bad]
        append(job.config.run_dir / BAD_SAMPLES, *bad)
