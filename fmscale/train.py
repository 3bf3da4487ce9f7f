"""Training: build, loop, train_step. Read it from the top; each formula is two hops away.

data/order -> data/reader -> data/loader ──► Batch
train_step: flow/timesteps, flow/path ──► t, noisy_latents, velocity ; conditioning dropout
            engine(noisy_latents, t, context, pooled) ──► velocity ; flow/loss ──► loss per image
            engine.backward ; after the last micro-batch engine.step (clip, AdamW + EMA)
"""

from __future__ import annotations

import functools
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

from fmscale import slurm
from fmscale.batch import Batch, prefetch
from fmscale.building import (
    STRICT,
    Allowed,
    attention_shapes,
    build_engine,
    check_checkpoint,
    check_setup,
    shards_seen,
    start_from,
)
from fmscale.config import TrainConfig
from fmscale.control import Delayed, Requests, Wish, forget_files, outlive_signals, release_readers
from fmscale.data.loader import build_loader
from fmscale.data.order import Split, split
from fmscale.dataset import Dataset
from fmscale.distributed import World, barrier, everywhere, same_everywhere, world_from_environment
from fmscale.draws import Draws, draw_noise, draw_step, draw_view, drop_text
from fmscale.encoders.text import assemble
from fmscale.engine import attention
from fmscale.engine import checkpoint as checkpoints
from fmscale.engine.metrics import keep_before
from fmscale.engine.optim import SIGMA_PREFIX, learning_rate
from fmscale.engine.saver import Folder, Retention, SaveError, Saver
from fmscale.engine.statistics import Look
from fmscale.engine.zero import Engine, init_process_group
from fmscale.errors import OutageError, SharedError, UserError
from fmscale.files import append
from fmscale.flow.loss import velocity_mse
from fmscale.flow.path import interpolate
from fmscale.guards import BAD_SAMPLES, LossGuard, Stopwatch, check_damage
from fmscale.log import get_logger, progress
from fmscale.reporting import Reporter, announce, device_names, look_at
from fmscale.runs import ATTENTION, checkpoints_dir, snapshots_dir, start_run_dir
from fmscale.starts import Ending, Start, new_start
from fmscale.tally import BINS, Tally
from fmscale.watchdog import Limits, Watchdog, cut_off

log = get_logger(__name__)
SKIPPED = "skipped_steps.jsonl"  # in the run directory: step and sample keys of those that were not applied


class Job(NamedTuple):
    """A run in progress: what every function of the loop works with.

    Attributes:
        config: what is trained.
        dataset: what it learns.
        engine: the model under ZeRO.
        world: this process among the ranks.
        portions: how a global batch falls to ranks and micro-batches.
        start: this one among all starts of the run.
        saver: writes its checkpoints.
        watch: is told where this rank is.
        guard: drops steps whose loss leaps.
        stopwatch: times this rank's own part of each step.
        kernels: what computes the attention, by bucket.
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
    dataset = check_setup(config, world.world_size, allowed)
    portions = split(config.global_batch, world.world_size, config.micro_batch)
    with slurm.meeting(world, config.run_dir / slurm.FOLDER):
        init_process_group(world)
    if not same_everywhere(dataset.mixture.fingerprint, world.device):
        raise UserError(
            f"data: the ranks found different indices in {dataset.mixture.name}; start again when it is whole"
        )
    begun = new_start(config.run_dir, world)
    if world.is_main:
        forget_files(config.run_dir)  # that were meant for a start before this one
    try:
        ending = run(config, dataset, world, portions, begun, allowed)
    except Exception as error:
        if world.is_main:
            begun.end("failed", why=str(error) or repr(error))
        raise
    if world.is_main:
        begun.end(ending)


def run(config: TrainConfig, dataset: Dataset, world: World, portions: Split, begun: Start, allowed: Allowed) -> Ending:
    """What `train` does once the ranks have found one another; returns how it ended."""
    engine = build_engine(config, world.device, portions.micro_batch)
    guard = LossGuard(BINS, config.guard.max_loss_ratio, world.device)
    start, dataset = resume(config, dataset, engine, guard, world, allowed)
    shapes = attention_shapes(config, dataset, portions.micro_batch, world.device)
    kernels, tried = attention.agree(config.engine.attention, shapes, config.run_dir / ATTENTION, world)
    if world.is_main:
        checkpoints.discard_after(snapshots_dir(config.run_dir), start)  # they are written again
        start_run_dir(config, device_names(world), shards_seen(config, dataset), tried)
    retention = Retention(config.checkpoint.keep, config.checkpoint.keep_every_steps)
    saver = Saver(checkpoints_dir(config.run_dir), world, retention, config.checkpoint.private, begun.name, begun.check)
    limits = Limits(config.guard.silent_s, config.guard.stalled_s, slurm.leave_s(slurm.signal_delay_s()))
    try:
        with Watchdog(world, config.run_dir, limits, lambda: saver.progress, begun) as watch:
            tools = begun, saver, watch, guard, Stopwatch(world.device), kernels
            return loop(Job(config, dataset.to(world.device), engine, world, portions, *tools), start)
    except BaseException as error:
        release_readers()  # else they would hold this process up for a minute
        saver.abandon()
        if isinstance(error, RuntimeError) and cut_off(str(error)):
            raise OutageError(f"another rank does not answer any more ({error})") from error
        raise


def resume(
    config: TrainConfig, dataset: Dataset, engine: Engine, guard: LossGuard, world: World, allowed: Allowed
) -> tuple[int, Dataset]:
    """Restore the newest sound checkpoint, if there is one; else begin with the weights that `model.init_from` names.

    Returns:
        The step to go on with, which is how many are done; and the dataset, with what was stored when.

    Raises:
        UserError: no checkpoint is sound, or the one that is does not fit.
    """
    found = checkpoints.choose(checkpoints_dir(config.run_dir), world)
    if found is None:
        if config.model.init_from is not None:
            start_from(config.model.init_from, config, engine, world)
        return 0, dataset
    dataset = check_checkpoint(config, dataset, found, engine.shapes, allowed)
    load(engine, found, world)
    guard.restore(found.index["description"]["loss_guard"])
    if world.is_main:
        checkpoints.set_aside_after(found)
    log.info("resumed %s", found.path)
    return found.step, dataset


def load(engine: Engine, found: checkpoints.Checkpoint, world: World) -> None:
    """Weights, moments and averages of a checkpoint that fits.

    Raises:
        SharedError: a rank could not read its part.
    """
    everywhere(lambda: checkpoints.restore(found, engine.pieces()), world.device)
    engine.updates = found.index["updates"]
    engine.refresh()


class Streak(NamedTuple):
    """Steps in a row that were not applied.

    Attributes:
        skipped: so many, up to the last one.
        went_back: before them the run went back, and nothing was applied since.
    """

    skipped: int = 0
    went_back: bool = False


def settle(job: Job, recent: Sequence[StepResult], streak: Streak) -> Streak:
    """Name steps that were not applied, for which the device is waited for; go back where too many were in a row."""
    for result in recent:
        if result.applied:
            streak = Streak()
        else:
            streak = streak._replace(skipped=streak.skipped + 1)
            keys = [key for key in result.keys if key]
            job.start.check()
            append(job.config.run_dir / SKIPPED, {"step": result.step + 1, "keys": keys})
    if streak.skipped < job.config.guard.max_skipped_steps:
        return streak
    go_back(job, recent[-1].step + 1, streak)
    return Streak(went_back=True)


def go_back(job: Job, done: int, streak: Streak) -> None:
    """Load the newest sound checkpoint from before the steps that were skipped; the data goes on where it is.

    Args:
        job: the run.
        done: steps done, the skipped ones included.
        streak: of those.

    Raises:
        UserError: there is no such checkpoint, or going back has not helped.
    """
    config, root = job.config, checkpoints_dir(job.config.run_dir)
    job.watch.at(done - 1, "going back to a checkpoint")
    wait_for_save(job)
    found = None if streak.went_back else checkpoints.choose(root, job.world, before=done - streak.skipped + 1)
    if found is None:
        raise SharedError(
            f"guard.max_skipped_steps: the last {streak.skipped} steps were dropped, each for a gradient that was not "
            "finite or a loss that leapt, and there is no checkpoint to go back to that would help; lower "
            f"optimizer.lr, or look at the samples in {config.run_dir / SKIPPED}"
        )
    load(job.engine, found, job.world)
    if job.world.is_main:
        checkpoints.discard_after(snapshots_dir(config.run_dir), found.step)
    log.error("step %d: back to the weights of %s; the data goes on", done, found.path)


def loop(job: Job, start: int) -> Ending:
    """Steps `start` … `config.steps`, with metrics and checkpoints; returns how it ended."""
    config = job.config
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
        for step in range(start, config.steps):
            began = time.perf_counter()
            result = train_step(job, batches, step, requests.heard())
            done = step + 1
            bad += result.tally.bad
            told = agreed.exchange(result.tally.values)
            before = None if told is None else Tally(told)
            wish = Wish() if before is None else before.wish
            saving = any(wish) or done == config.steps or done % config.checkpoint.every_steps == 0
            logging = saving or done % config.log.every_steps == 0
            reporter.take(result, before, time.perf_counter() - began)
            recent.append(result)
            if logging:
                reporter.flush(bar)
                check_damage(config, int(bad), (done - start) * config.global_batch)
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
    log.info("%s: %d steps, %s images, in %s", said, done, f"{done * config.global_batch:,}", config.run_dir)
    return "done" if done == config.steps else "stopped" if requests.for_good else "left"


def batches_of(job: Job, start: int) -> Iterator[Batch]:
    """This rank's micro-batches from step `start` on, on its device."""
    config, mixture = job.config, job.dataset.mixture
    batches = build_loader(
        mixture,
        mixture.order(config.global_batch, config.seed, config.data.run, job.dataset.generations),
        job.portions,
        rank=job.world.rank,
        start_step=start,
        stop_step=config.steps,
        noise=functools.partial(draw_noise, config.flow.coupling, config.seed),
        view=functools.partial(draw_view, config.seed, mixture.raw),
        captions=job.dataset.online is not None,
        counts=job.dataset.counted if job.dataset.online is None else (),
        workers=config.data.workers,
        pin_memory=job.world.device.type == "cuda",
        worker_init=outlive_signals,
    )
    return prefetch(batches, job.world.device)


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


def train_step(job: Job, batches: Iterator[Batch], step: int, wish: Wish) -> StepResult:
    """One optimizer step: this rank's micro-batches forward and backward, then the update.

    The gradient is that of the loss summed over the global batch's sound images, divided by `global_batch`: the same
    for every world size and micro-batch.
    """
    config, device = job.config, job.world.device
    job.watch.at(step, "starting a step")
    job.stopwatch.start()
    draws = draw_step(config, step, len(job.dataset.encoders))
    scale = job.world.world_size / config.global_batch  # ranks' gradients are averaged
    tally, ratio = Tally.begin(job.world, wish), torch.empty(())
    waited, keys = 0.0, list[str]()
    for micro in range(job.portions.accumulation):
        batch, seconds = next_batch(job, batches, step)
        waited, keys = waited + seconds, keys + list(batch.keys)
        drawn = draws.of(batch.slots, device)
        with attention.using(job.kernels[batch.bucket]):  # the backward pass too: it may compute blocks again
            losses = losses_of(job, batch, drawn) * batch.weight
            tally.add(losses.detach(), drawn.t, batch)
            loss, last = losses.sum() * scale, micro == job.portions.accumulation - 1
            if last:
                ratio, factor = agree(job, tally)
                loss = loss * factor
            job.engine.backward(loss, last)
    job.watch.at(step, "updating the weights")
    lr, look = learning_rate_at(config, step), look_at(job, step)
    applied = job.engine.step(lr, look)
    gradient = None if look is None else look.share()
    return StepResult(step, keys, tally, ratio, job.engine.grad_norm, gradient, lr, applied, batch.bucket, waited)


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
    return job.guard.judge(tally.loss_by_t, tally.images_by_t)


def losses_of(job: Job, batch: Batch, draws: Draws) -> Tensor:
    """Loss of each image of a micro-batch under its draws, shape (B,)."""
    t, dropped = draws
    features = job.dataset.text_of(batch.tensors, batch.captions)
    text = drop_text(features, job.dataset.encoders, dropped, job.dataset.null)
    given = assemble(text, context_dim=job.config.model.context_dim, t5_length=job.dataset.t5_length)
    noisy_latents, velocity = interpolate(job.dataset.latents_of(batch.tensors), batch.noise, t)
    predicted = job.engine(noisy_latents, t, given.context, given.pooled, given.repeats)
    return velocity_mse(predicted, velocity)


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    options = config.optimizer
    return learning_rate(
        step,
        peak=options.lr,
        warmup_steps=options.warmup_steps,
        schedule=options.schedule,
        decay_steps=options.decay_steps or config.steps,
    )


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
            "images_seen": done * config.global_batch,
            "config": config.model_dump(mode="json"),
            "dataset": job.dataset.identity(),
            "null": config.conditioning.null,
            "loss_guard": job.guard.state(),
        },
        folders=folders,
    )


def wait_for_save(job: Job) -> None:
    """Let a save that is being written end; one that has failed is reported, and the run goes on without it."""
    try:
        job.saver.wait()
    except SaveError as error:
        if job.world.is_main:
            log.error("%s; the run goes on", error)


def _name_bad(job: Job, batch: Batch) -> None:
    """Name the damaged samples of a micro-batch, in the log and in the run's list."""
    for sample in batch.bad:
        log.warning("bad sample %s in %s has weight 0: %s", sample.key, sample.shard, sample.reason)
    if batch.bad:
        job.start.check()
        bad = [{"step": batch.step + 1, **asdict(sample)} for sample in batch.bad]
        append(job.config.run_dir / BAD_SAMPLES, *bad)
