"""What a run says of itself: before the first step, of each step, and now and then on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from fmscale.config import TrainConfig
from fmscale.distributed import World
from fmscale.log import get_logger

if TYPE_CHECKING:
    from rich.progress import Progress

    from fmscale.train import Job, StepResult

log = get_logger(__name__)


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


def step_record(config: TrainConfig, result: StepResult, step: int, seconds: float) -> dict[str, Any]:
    """A step's object in metrics.jsonl; `step` is counted from 0."""
    return {
        "step": step + 1,
        "images_seen": (step + 1) * config.global_batch,
        "phase": 0,
        "bucket": f"{result.bucket[0]}x{result.bucket[1]}",
        "loss": result.sums[0] / result.sums[1],
        "grad_norm": result.grad_norm,
        "lr": result.lr,
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


def device_names(world: World) -> list[str]:
    if world.device.type == "cuda":
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"cpu, {torch.get_num_threads()} threads"]
