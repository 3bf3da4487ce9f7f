"""A trained run -> (noise, latent) pairs, in the same indexed shards; `train` takes them with flow.coupling=paired."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from fmscale.config import ReflowConfig
from fmscale.data.index import Bucket, Index
from fmscale.data.index_build import build_index
from fmscale.data.order import Order
from fmscale.data.reader import OpenShards, read_sample
from fmscale.data.shards import ShardWriter
from fmscale.data.tar import DamageError
from fmscale.distributed import world_from_environment
from fmscale.encode import STORAGE, new_folder
from fmscale.encoders.null import load_null, save_null
from fmscale.encoders.text import ROLES, assemble
from fmscale.flow.coupling import NOISE_KEY
from fmscale.flow.noise import draw_noise
from fmscale.flow.solver import time_grid
from fmscale.log import get_logger, progress
from fmscale.runs import Run, open_run
from fmscale.sample import sample_latents

log = get_logger(__name__)


def reflow(config: ReflowConfig) -> Index:
    """Generate pairs with a run's EMA weights from the captions of a dataset.

    Args:
        config: teacher, captions, solver, and where to write.

    Returns:
        The index of the pairs; the folder `config.out` appears only when it is whole.

    Raises:
        UserError: teacher or dataset cannot be used, or `out` exists.

    Source: Liu et al. 2022, arXiv:2209.03003, sec. 2.2.
    """
    run, source = open_run(config.teacher), Index.open(config.data.path)
    names = [name for name in source.layout if name.removesuffix("_pooled") in ROLES]
    with new_folder(config.out) as folder:
        null = load_null(source.path, names)
        _generate_all(config, run, source, names, null, folder)
        save_null(folder, {name: value.to(STORAGE["fp32"]) for name, value in null.items()})
        made_by = {**(source.made_by or {}), "program": "fmscale reflow", "teacher": _teacher(config, run)}
        build_index(folder, made_by)
    index = Index.open(config.out)
    log.info("%s: %d pairs", config.out, len(index))
    return index


def _teacher(config: ReflowConfig, run: Run) -> dict[str, Any]:
    return {
        "run": str(run.path.absolute()),
        "step": run.checkpoint.step,
        "solver": config.solver,
        "solver_steps": config.solver_steps,
        "guidance_scale": config.guidance_scale,
    }


def _generate_all(
    config: ReflowConfig, run: Run, source: Index, names: list[str], null: dict[str, Tensor], folder: Any
) -> None:
    device = world_from_environment().device
    model = run.model("ema").to(device)
    order = Order([(bucket.name, bucket.count) for bucket in source.buckets], 1, config.seed)
    waiting: dict[Bucket, list[tuple[int, dict[str, Tensor], dict[str, Any]]]] = defaultdict(list)
    with (
        ShardWriter(folder, samples_per_shard=config.shard_samples) as writer,
        OpenShards() as shards,
        progress() as bar,
    ):
        task = bar.add_task("reflow", total=config.pairs)

        def flush(bucket: Bucket) -> None:
            pairs = waiting.pop(bucket)
            shape = (run.config.model.latent_channels, bucket.height, bucket.width)
            keys = [("reflow", config.seed, number) for number, _, _ in pairs]
            noise = torch.stack([draw_noise(shape, *key) for key in keys]).to(device)
            text = {name: torch.stack([tensors[name].float() for _, tensors, _ in pairs]).to(device) for name in names}
            nothing = {name: null[name].to(device).expand_as(value) for name, value in text.items()}
            settings = {"context_dim": run.config.model.context_dim, "t5_length": run.made_by["t5_length"]}
            latents = sample_latents(
                model,
                noise,
                time_grid(config.solver_steps, run.config.flow.shift),
                assemble(text, **settings),
                assemble(nothing, **settings),
                config.guidance_scale,
                config.solver,
            ).to("cpu", STORAGE[config.dtype])
            for key, latent, (number, tensors, meta) in zip(keys, latents, pairs, strict=True):
                stored = {"latents": latent.contiguous(), **{name: tensors[name] for name in names}}
                writer.write(f"pair{number:09d}", stored, {"caption": meta.get("caption", ""), NOISE_KEY: list(key)})
            bar.advance(task, len(pairs))

        for number in range(config.pairs):
            plan = order.batch(number)
            bucket = source.buckets[plan.bucket]
            row = bucket.start + int(plan.rows[0])
            try:
                sample = read_sample(source.location(row), shards)
            except DamageError as error:
                log.warning("skipped %s: %s", source.key(row), error)
                continue
            waiting[bucket].append((number, sample.tensors, sample.meta))
            if len(waiting[bucket]) == config.batch:
                flush(bucket)
        for bucket in list(waiting):
            flush(bucket)
