"""Training: build, loop, train_step. Read it from the top; each formula is two hops away.

data/order -> data/reader -> data/loader ──► Batch
train_step: flow/timesteps, flow/path ──► t, noisy_latents, velocity ; conditioning dropout
            engine(noisy_latents, t, context, pooled) ──► velocity ; flow/loss ──► loss per image
            engine.backward ; after the last micro-batch engine.step (clip, AdamW + EMA)
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fmscale.batch import Batch, prefetch
from fmscale.config import TrainConfig
from fmscale.data.loader import build_loader
from fmscale.data.order import Split, split
from fmscale.dataset import Dataset, go_on, open_dataset, read_shards
from fmscale.distributed import World, barrier, same_everywhere, total, world_from_environment
from fmscale.encoders.text import assemble
from fmscale.engine import checkpoint as checkpoints
from fmscale.engine.metrics import MetricsLog, append, keep_before
from fmscale.engine.optim import AdamWEMA, ema_name, learning_rate, parameter_groups
from fmscale.engine.zero import Engine, deepspeed_config, init_process_group
from fmscale.errors import UserError
from fmscale.flow.coupling import COUPLINGS
from fmscale.flow.loss import draw_dropped, velocity_mse
from fmscale.flow.noise import keyed_generator
from fmscale.flow.path import interpolate
from fmscale.flow.timesteps import TIMESTEP_SAMPLERS, shift_timesteps
from fmscale.log import get_logger, progress
from fmscale.runs import DATASET, build_model, check_run_dir, checkpoints_dir, start_run_dir

if TYPE_CHECKING:
    from rich.progress import Progress

log = get_logger(__name__)
BAD_SAMPLES = "bad_samples.jsonl"  # in the run directory: step, key, shard and reason of each
BAD_FROM_IMAGES = 1000  # so that one bad sample in the first batch does not end a run


class Draws(NamedTuple):
    """What is random in a step, for the whole global batch.

    Attributes:
        t: shape (global_batch,).
        dropped: shape (global_batch, encoders), bool: which text encoder is dropped for which image.
    """

    t: Tensor
    dropped: Tensor


class Allowed(NamedTuple):
    """What is refused unless the command line says otherwise.

    Attributes:
        config_change: to go on in a run directory whose config differs.
        append: to take in shards that were added since the run began.
        pipe: to start programs that a `pipe:` dataset names.
    """

    config_change: bool = False
    append: bool = False
    pipe: bool = False


STRICT = Allowed()


class Job(NamedTuple):
    """A run in progress: what every function of the loop works with.

    Attributes:
        config: what is trained.
        dataset: what it learns.
        engine: the model under ZeRO.
        world: this process among the ranks.
        portions: how a global batch falls to ranks and micro-batches.
    """

    config: TrainConfig
    dataset: Dataset
    engine: Engine
    world: World
    portions: Split


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
    init_process_group(world)
    if not same_everywhere(dataset.mixture.fingerprint, world.device):
        raise UserError(
            f"data: the ranks found different indices in {dataset.mixture.name}; start again when it is whole"
        )
    engine = build_engine(config, world.device, portions.micro_batch)
    job = Job(config, dataset.to(world.device), engine, world, portions)
    start = resume(job)
    if world.is_main:
        start_run_dir(config, _device_names(world), shards_seen(config, dataset))
    loop(job, start)


def check_setup(config: TrainConfig, world_size: int, allowed: Allowed = STRICT) -> Dataset:
    """Open the dataset and refuse what cannot work, before anything is made.

    Raises:
        UserError: says which key and which fact of dataset, model, checkpoint or run directory disagree.
    """
    dataset = open_dataset(config, allowed.pipe)
    split(config.global_batch, world_size, config.micro_batch)
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in build_model(config).named_parameters()}
    check_run_dir(config, allowed.config_change)
    if (found := checkpoints.latest(checkpoints_dir(config.run_dir))) is not None:
        shards = config.run_dir / DATASET
        dataset = go_on(dataset, found.index["description"]["dataset"], found.step, shards, allowed.append)
        _check_null(config, dataset, found)
        checkpoints.check_fits(found, shapes, [ema_name(decay) for decay in config.ema.decays])
    return dataset


def _check_null(config: TrainConfig, dataset: Dataset, found: checkpoints.Checkpoint) -> None:
    description = found.index["description"]
    same_null = description["null"] == config.conditioning.null
    if same_null and description["dataset"]["null_sha256"] != dataset.null_sha256:
        raise UserError(
            f"data: the features of the empty caption in {dataset.mixture.name} are not those that {found.path} was "
            "trained with; put the old null.safetensors back, or start another run_dir"
        )


def shards_seen(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """Digests of the shards of each generation of the data, by its fingerprint."""
    seen = read_shards(config.run_dir / DATASET)
    known = {old.fingerprint: seen[old.fingerprint] for old in dataset.generations if old.fingerprint in seen}
    return {**known, dataset.mixture.fingerprint: dataset.mixture.shards()}


def build_engine(config: TrainConfig, device: torch.device, micro_batch: int) -> Engine:
    """The freshly initialised model under ZeRO."""
    torch.manual_seed(config.seed)
    model = build_model(config).to(device)
    options = config.optimizer
    optimizer = AdamWEMA(
        parameter_groups(model, options.weight_decay),
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        ema_decays=config.ema.decays,
    )
    settings = deepspeed_config(config.engine.zero_stage, config.engine.dtype, micro_batch, options.clip_norm)
    return Engine(model, optimizer, settings)


def resume(job: Job) -> int:
    """Restore the newest checkpoint, if there is one; `check_setup` has found it fit.

    Returns:
        The step to go on with: how many are done.

    Raises:
        UserError: the checkpoint is damaged.
    """
    found = checkpoints.latest(checkpoints_dir(job.config.run_dir))
    if found is None:
        return 0
    checkpoints.verify(found, job.world.rank, job.world.world_size)
    checkpoints.restore(found, job.engine.pieces())
    job.engine.updates = found.index["updates"]
    job.engine.refresh()
    log.info("resumed %s", found.path)
    return found.step


def loop(job: Job, start: int) -> None:
    """Steps `start` … `config.steps`, with metrics and checkpoints."""
    config = job.config
    if start >= config.steps:
        log.info("nothing to do: %d of %d steps are done; raise `steps` to train on", start, config.steps)
        return
    announce(job, start)
    if job.world.is_main:
        keep_before(config.run_dir / BAD_SAMPLES, start + 1)
    barrier()  # only then may ranks add to that file
    batches = batches_of(job, start)
    bad = torch.zeros((), device=job.world.device)
    metrics = MetricsLog(config.run_dir, start + 1, config.log.tensorboard) if job.world.is_main else None
    with progress("loss {task.fields[loss]:.4f} · {task.fields[rate]:.1f} images/s") as bar:
        bar.add_task("train", total=config.steps, completed=start, loss=float("nan"), rate=0.0)
        for step in range(start, config.steps):
            began = time.perf_counter()
            result = train_step(job, batches, step)
            done = step + 1
            bad += result.sums[2]
            saving = done == config.steps or done % config.checkpoint.every_steps == 0
            logging = saving or done % config.log.every_steps == 0
            if metrics is not None:
                metrics.add(**step_record(config, result, step, time.perf_counter() - began))
                if logging:
                    report(config, metrics.flush(), bar)
            if logging:
                check_damage(config, int(bad), (done - start) * config.global_batch)
            if saving:
                save(job, done)
    if metrics is not None:
        metrics.close()
    log.info(
        "done: %d steps, %s images, in %s", config.steps, f"{config.steps * config.global_batch:,}", config.run_dir
    )


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
        workers=config.data.workers,
        pin_memory=job.world.device.type == "cuda",
    )
    return prefetch(batches, job.world.device)


def draw_noise(
    coupling: str, seed: int, shape: Sequence[int], step: int, slot: int, read_meta: Callable[[], Mapping[str, Any]]
) -> Tensor:
    """The noise of one slot of a global batch; the loader's workers call it."""
    return COUPLINGS[coupling](shape, read_meta, (seed, step, slot))


def draw_step(config: TrainConfig, step: int, encoders: int) -> Draws:
    """Timesteps and dropped encoders of a global batch: a function of seed and step alone."""
    flow = config.flow
    sampler = TIMESTEP_SAMPLERS[flow.timesteps]
    t = sampler(config.global_batch, keyed_generator("t", config.seed, step), mean=flow.logit_mean, std=flow.logit_std)
    generator = keyed_generator("dropout", config.seed, step)
    dropped = draw_dropped(config.global_batch, encoders, config.conditioning.dropout, generator)
    return Draws(shift_timesteps(t, flow.shift), dropped)


class StepResult(NamedTuple):
    """What a step leaves for the log.

    Attributes:
        sums: over all ranks: loss of the images, images that counted, damaged samples; shape (3,).
        grad_norm: before clipping.
        applied: False where a gradient was not finite, so that nothing was changed.
        bucket: latent (height, width).
        data_wait_s: time spent waiting for the loader.
    """

    sums: Tensor
    grad_norm: float | Tensor
    applied: bool
    bucket: tuple[int, int]
    data_wait_s: float


def train_step(job: Job, batches: Iterator[Batch], step: int) -> StepResult:
    """One optimizer step: this rank's micro-batches forward and backward, then the update.

    The gradient is that of the loss summed over the global batch's sound images, divided by `global_batch`: the same
    for every world size and micro-batch.
    """
    config, device = job.config, job.world.device
    draws = draw_step(config, step, len(job.dataset.encoders))
    scale = job.world.world_size / config.global_batch  # ranks' gradients are averaged
    sums = torch.zeros(3, device=device)
    waited = 0.0
    for micro in range(job.portions.accumulation):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        assert batch.step == step, f"the loader is at step {batch.step}, the trainer at {step}"
        _name_bad(config.run_dir, batch)
        losses = losses_of(job, batch, draws) * batch.weight
        job.engine.backward(losses.sum() * scale, last=micro == job.portions.accumulation - 1)
        sums += torch.stack([losses.detach().sum(), batch.weight.sum(), batch.weight.new_tensor(len(batch.bad))])
    applied = job.engine.step(learning_rate_at(config, step))
    return StepResult(total(sums), job.engine.grad_norm, applied, batch.bucket, waited)


def losses_of(job: Job, batch: Batch, draws: Draws) -> Tensor:
    """Loss of each image of a micro-batch, shape (B,)."""
    places = batch.slots.clamp(max=job.config.global_batch - 1)  # padding has weight 0: any draw will do
    t, dropped = (drawn[places].to(job.world.device) for drawn in draws)
    text = drop_text(batch.tensors, job.dataset.encoders, dropped, job.dataset.null)
    given = assemble(text, context_dim=job.config.model.context_dim, t5_length=job.dataset.t5_length)
    noisy_latents, velocity = interpolate(batch.tensors["latents"].float(), batch.noise, t)
    predicted = job.engine(noisy_latents, t, given.context, given.pooled, given.repeats)
    return velocity_mse(predicted, velocity)


def drop_text(
    tensors: Mapping[str, Tensor], encoders: Sequence[str], dropped: Tensor, null: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Text features in which dropped encoders say what they say of the null.

    Args:
        tensors: stored tensors by name, (B, ...) each.
        encoders: in the order of the columns of `dropped`.
        dropped: shape (B, encoders), bool.
        null: per text tensor, without the batch dimension.
    """
    text = {}
    for column, encoder in enumerate(encoders):
        for name in (encoder, f"{encoder}_pooled"):
            if name in null:
                value = tensors[name].float()
                mask = dropped[:, column].reshape(-1, *[1] * (value.ndim - 1))
                text[name] = torch.where(mask, null[name], value)
    return text


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


def step_record(config: TrainConfig, result: StepResult, step: int, seconds: float) -> dict[str, Any]:
    """A step's object in metrics.jsonl; `step` is counted from 0."""
    return {
        "step": step + 1,
        "images_seen": (step + 1) * config.global_batch,
        "phase": 0,
        "bucket": f"{result.bucket[0]}x{result.bucket[1]}",
        "loss": result.sums[0] / result.sums[1],
        "grad_norm": result.grad_norm,
        "lr": learning_rate_at(config, step),
        "applied": result.applied,
        "bad_samples": result.sums[2].int(),
        "images_per_s": config.global_batch / seconds,
        "data_wait_s": result.data_wait_s,
        "step_s": seconds,
        "mfu": None,
    }


def report(config: TrainConfig, records: Sequence[Mapping[str, Any]], bar: Progress) -> None:
    """Show where the run is: on the bar, or as a line where the output is no terminal."""
    for record in records:
        if not record["applied"]:
            log.warning("step %d: a gradient was not finite, so nothing was updated", record["step"])
    last = records[-1]
    loss = float("nan") if last["loss"] is None else last["loss"]
    task = bar.tasks[0]
    bar.update(task.id, completed=last["step"], loss=loss, rate=last["images_per_s"])
    if bar.disable:
        left = "" if task.time_remaining is None else f" · {timedelta(seconds=int(task.time_remaining))} left"
        shown = (last["step"], config.steps, loss, last["images_per_s"], left)
        log.info("step %d of %d · loss %.4f · %.1f images/s%s", *shown)


def check_damage(config: TrainConfig, bad: int, drawn: int) -> None:
    """Stop, on every rank alike, where the data is worse than the config allows.

    Args:
        config: says how much is allowed.
        bad: images drawn since the start that were damaged.
        drawn: images drawn since the start.

    Raises:
        UserError: more were damaged than is allowed.
    """
    if bad > config.data.max_bad_fraction * max(drawn, BAD_FROM_IMAGES):
        raise UserError(
            f"data.max_bad_fraction: {bad:,} of {drawn:,} images were damaged, allowed are "
            f"{config.data.max_bad_fraction:.1%}; {config.run_dir / BAD_SAMPLES} lists them, "
            "`fmscale index DATASET --repair` leaves changed bytes out, for a new run_dir"
        )


def save(job: Job, done: int) -> None:
    """Write a checkpoint of the step."""
    config = job.config
    checkpoints.save(
        checkpoints_dir(config.run_dir),
        job.engine.pieces(),
        step=done,
        updates=job.engine.updates,
        shapes=job.engine.shapes,
        description={
            "images_seen": done * config.global_batch,
            "config": config.model_dump(mode="json"),
            "dataset": job.dataset.identity(),
            "null": config.conditioning.null,
        },
        keep=config.checkpoint.keep,
        rank=job.world.rank,
        world_size=job.world.world_size,
        device=job.world.device,
    )


def announce(job: Job, start: int) -> None:
    """Say in four lines what is about to run."""
    config, mixture, portions = job.config, job.dataset.mixture, job.portions
    padding = portions.world_size * portions.accumulation * portions.micro_batch - portions.global_batch
    count = sum(torch.Size(shape).numel() for shape in job.engine.shapes.values())
    buckets = ", ".join(f"{bucket.name} ({bucket.count:,})" for bucket in mixture.buckets)
    kind = (config.model.family, f"{count:,}", config.engine.dtype, job.engine.stage)
    log.info("model    %s, %s parameters, %s, ZeRO-%d", *kind)
    log.info("data     %s, %s samples in buckets %s", mixture.name, f"{len(mixture):,}", buckets)
    log.info(
        "batch    %d images = %d ranks x %d accumulation x %d micro-batch%s",
        config.global_batch,
        portions.world_size,
        portions.accumulation,
        portions.micro_batch,
        f", {padding} slots empty" if padding else "",
    )
    log.info("run      %s, steps %d to %d", config.run_dir, start, config.steps)


def _name_bad(run_dir: Path, batch: Batch) -> None:
    """Name the damaged samples of a micro-batch, in the log and in the run's list."""
    for sample in batch.bad:
        log.warning("bad sample %s in %s has weight 0: %s", sample.key, sample.shard, sample.reason)
    if batch.bad:
        append(run_dir / BAD_SAMPLES, [{"step": batch.step + 1, **asdict(sample)} for sample in batch.bad])


def _device_names(world: World) -> list[str]:
    if world.device.type == "cuda":
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"cpu, {torch.get_num_threads()} threads"]
