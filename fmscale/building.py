"""What a run is made of, checked before anything is written: dataset, network, engine, checkpoint to go on from."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fmscale.config import TrainConfig
from fmscale.data.order import split
from fmscale.dataset import Dataset, go_on, open_dataset, read_shards
from fmscale.distributed import World, everywhere, same_everywhere, world_from_environment
from fmscale.encoders.text import assemble
from fmscale.engine import checkpoint as checkpoints
from fmscale.engine import fp8
from fmscale.engine.attention import Shape
from fmscale.engine.blocks import prepare
from fmscale.engine.optim import EMA_PREFIX, AdamWEMA, ema_names, parameter_groups
from fmscale.engine.zero import WEIGHT, Engine, deepspeed_config
from fmscale.errors import SharedError, UserError
from fmscale.features import STORAGE
from fmscale.gallery import check_gallery
from fmscale.init_from import open_source
from fmscale.log import get_logger
from fmscale.models import initialise_parameter
from fmscale.models.layers import patch_grid
from fmscale.runs import DATASET, build_model, check_run_dir, checkpoints_dir

log = get_logger(__name__)


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


def check_setup(config: TrainConfig, world_size: int, allowed: Allowed = STRICT) -> Dataset:
    """Open the dataset and refuse what cannot work, before anything is made.

    Raises:
        UserError: says which key and which fact of dataset, model, checkpoint or run directory disagree.
    """
    dataset = open_dataset(config, allowed.pipe)
    check_gallery(config, dataset)
    if config.engine.fp8:
        fp8.check_fp8(config.engine.dtype, world_from_environment().device)
    engine_settings(config, split(config.global_batch, world_size, config.micro_batch).micro_batch)
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in build_network(config).named_parameters()}
    check_run_dir(config, allowed.config_change)
    if (found := checkpoints.latest(checkpoints_dir(config.run_dir))) is not None:
        dataset = check_checkpoint(config, dataset, found, shapes, allowed)
    elif config.model.init_from is not None:
        open_source(config.model.init_from, config.model.model_dump())
    return dataset


def check_checkpoint(
    config: TrainConfig,
    dataset: Dataset,
    found: checkpoints.Checkpoint,
    shapes: Mapping[str, Sequence[int]],
    allowed: Allowed,
) -> Dataset:
    """Refuse a checkpoint of another model or other data.

    Returns:
        The dataset, with what was stored when.

    Raises:
        UserError: says what differs.
    """
    description = found.index["description"]
    dataset = go_on(dataset, description["dataset"], found.step, config.run_dir / DATASET, allowed.append)
    same_null = description["null"] == config.conditioning.null
    if same_null and description["dataset"]["null_sha256"] != dataset.null_sha256:
        raise UserError(
            f"data: the features of the empty caption in {dataset.mixture.name} are not those that {found.path} was "
            "trained with; put the old null.safetensors back, or start another run_dir"
        )
    checkpoints.check_fits(found, shapes, ema_names(config.ema.decays, config.ema.sigma_rels))
    return dataset


def shards_seen(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """Digests of the shards of each generation of the data, by its fingerprint."""
    seen = read_shards(config.run_dir / DATASET)
    known = {old.fingerprint: seen[old.fingerprint] for old in dataset.generations if old.fingerprint in seen}
    return {**known, dataset.mixture.fingerprint: dataset.mixture.shards()}


def start_from(place: Path, config: TrainConfig, engine: Engine, world: World) -> None:
    """Begin with published weights, which the averages begin with too; each rank reads what it owns, and no more.

    Raises:
        SharedError: on every rank, if one could not read its part, or they are gone, or do not fit any more.
    """
    source = everywhere(lambda: open_source(place, config.model.model_dump()), world.device)
    if not same_everywhere(source.digest, world.device):
        raise SharedError(f"model.init_from: the ranks found different weights in {place}; put the same there for all")

    def fill() -> None:
        for piece in engine.pieces():
            weight = piece.tensors[WEIGHT]
            weight.copy_(source.read(piece.name, piece.start, len(weight)))
            for kind, average in piece.tensors.items():
                if kind.startswith(EMA_PREFIX):
                    average.copy_(weight)

    everywhere(fill, world.device)
    engine.refresh()
    added = f"; {len(source.added)} norms of queries and keys are new, and 1" if source.added else ""
    log.info("weights  from %s%s", place, added)


def build_engine(config: TrainConfig, device: torch.device, micro_batch: int) -> Engine:
    """The freshly initialised model under ZeRO; under stage 3 no rank ever holds all of it."""
    torch.manual_seed(config.seed)
    whole = config.engine.zero_stage < 3
    if whole:
        model = build_network(config).to(device)  # drawn on the CPU, whose random numbers are everywhere the same
    else:
        with torch.device("meta"):
            model = build_network(config)
    options = config.optimizer
    optimizer = AdamWEMA(
        parameter_groups(model, options.weight_decay),
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        ema_decays=config.ema.decays,
        ema_sigma_rels=config.ema.sigma_rels,
        ema_warmup=config.ema.warmup,
    )
    fill = None if whole else functools.partial(initialise_parameter, config.model.family)
    return Engine(model, optimizer, engine_settings(config, micro_batch), options.clip_norm, fill)


def build_network(config: TrainConfig) -> nn.Module:
    """The freshly initialised model, with what the config asks of its blocks."""
    part, model = config.engine, build_model(config)
    blocks = model.get_submodule("blocks")
    if part.fp8:
        fp8.convert(blocks)
    prepare(blocks.children(), part.recompute_every, part.recompute, part.compile)
    return model


def attention_shapes(
    config: TrainConfig, dataset: Dataset, micro_batch: int, device: torch.device
) -> dict[Hashable, Shape]:
    """The attention over all tokens of a micro-batch, by bucket: latent (height, width)."""
    model = config.model
    null = {name: value[None] for name, value in dataset.null.items()}
    text = assemble(null, context_dim=model.context_dim, t5_length=dataset.t5_length)
    biases = 0 if text.repeats is None else 1 if text.repeats.ndim == 1 else micro_batch
    kind = (model.head_dim, STORAGE[config.engine.dtype], device, biases)
    shapes: dict[Hashable, Shape] = {}
    for bucket in dataset.mixture.buckets:
        tokens = prod(patch_grid(bucket.height, bucket.width, model.patch_size)) + text.context.shape[1]
        shapes[bucket.height, bucket.width] = Shape(micro_batch, model.heads, tokens, tokens, *kind)
    return shapes


def engine_settings(config: TrainConfig, micro_batch: int) -> dict[str, Any]:
    """What DeepSpeed is told.

    Raises:
        UserError: `engine.deepspeed` holds a key that is not the user's to set.
    """
    part = config.engine
    return deepspeed_config(part.zero_stage, part.dtype, micro_batch, part.offload, part.deepspeed)
