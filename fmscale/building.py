"""What a run is made of, checked before anything is written: dataset, network, engine, checkpoint to go on from."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fmscale import slurm
from fmscale.config import TrainConfig
from fmscale.data.order import Generation, Split, split
from fmscale.dataset import Dataset, go_on, open_dataset, read_shards
from fmscale.distributed import World, everywhere, same_everywhere, world_from_environment
from fmscale.encoders.text import assemble
from fmscale.engine import attention, fp8
from fmscale.engine import checkpoint as checkpoints
from fmscale.engine.attention import Record, Shape
from fmscale.engine.blocks import prepare
from fmscale.engine.optim import EMA_PREFIX, AdamWEMA, averages_of, ema_names, parameter_groups
from fmscale.engine.saver import Retention, Saver
from fmscale.engine.zero import WEIGHT, Engine, deepspeed_config
from fmscale.errors import SharedError, UserError
from fmscale.features import STORAGE
from fmscale.gallery import check_gallery
from fmscale.guards import LossGuard
from fmscale.init_from import open_start
from fmscale.log import get_logger
from fmscale.models.families import initialise_parameter, set_positions
from fmscale.models.layers import patch_grid
from fmscale.objective import check_objective
from fmscale.phases import Phase, changes, phase_of, phases_of
from fmscale.runs import ATTENTION, DATASET, build_model, check_run_dir, checkpoints_dir
from fmscale.validation import open_held_out
from fmscale.watchdog import Limits, Watchdog

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


class Programme(NamedTuple):
    """What is trained when.

    Attributes:
        phases: in order.
        datasets: of each; phases that go on with one order of data share it.
    """

    phases: tuple[Phase, ...]
    datasets: tuple[Dataset, ...]

    def go_on(self, data_start: int, generations: tuple[Generation, ...]) -> Programme:
        """The same, with what was stored when in the data whose order begins with a step."""
        pairs = zip(self.phases, self.datasets, strict=True)
        datasets = [
            replace(dataset, generations=generations) if phase.data_start == data_start else dataset
            for phase, dataset in pairs
        ]
        return self._replace(datasets=tuple(datasets))


def check_setup(config: TrainConfig, world_size: int, allowed: Allowed = STRICT) -> Programme:
    """Open the datasets and refuse what cannot work, before anything is made.

    Raises:
        UserError: says which key and which fact of dataset, model, checkpoint or run directory disagree.
    """
    phases, datasets = phases_of(config), list[Dataset]()
    if config.engine.fp8:
        fp8.check_fp8(config.engine.dtype, world_from_environment().device)
    for phase in phases:
        before = phases[phase.number - 1] if phase.number else None
        shared = before is not None and before.data_start == phase.data_start and _same_data(before, phase)
        with _naming(phase, phases):
            datasets.append(datasets[-1] if shared else _open_dataset(phase, allowed))
    for phase in phases:
        with _naming(phase, phases):
            network = _check_phase(phase, datasets, world_size)
    shapes = {name: tuple(weight.shape) for name, weight in network.named_parameters()}
    check_run_dir(config, allowed.config_change)
    programme = Programme(phases, tuple(datasets))
    if (found := checkpoints.latest(checkpoints_dir(config.run_dir))) is not None:
        return check_checkpoint(programme, found, shapes, allowed)
    if config.model.init_from is not None:
        open_start(config.model.init_from, config.model.model_dump())
    return programme


@contextmanager
def _naming(phase: Phase, phases: Sequence[Phase]) -> Iterator[None]:
    """What is refused meanwhile is a phase's, and says so where there are several."""
    try:
        yield
    except UserError as error:
        if len(phases) == 1:
            raise
        raise type(error)(f"phases.{phase.number}: {error}") from None


def _check_phase(phase: Phase, datasets: Sequence[Dataset], world_size: int) -> nn.Module:
    """Refuse what cannot work in a phase, given the datasets of all; returns its network, on the meta device."""
    config, dataset = phase.config, datasets[phase.number]
    check_gallery(config, dataset)
    if config.validation is not None:
        open_held_out(config, dataset, datasets)
    engine_settings(config, split(config.global_batch, world_size, config.micro_batch).micro_batch)
    check_objective(config)
    with torch.device("meta"):
        return build_network(config)


def _open_dataset(phase: Phase, allowed: Allowed) -> Dataset:
    dataset = open_dataset(phase.config, allowed.pipe)
    return replace(dataset, generations=(dataset.mixture.generation(phase.data_start),))


def _same_data(one: Phase, other: Phase) -> bool:
    """Whether what is opened for one phase serves another that goes on with its order of data."""

    def opened(phase: Phase) -> tuple[object, ...]:
        config = phase.config
        return config.data, config.conditioning.null, config.conditioning.text, config.flow.coupling

    return opened(one) == opened(other)


def check_checkpoint(
    programme: Programme, found: checkpoints.Checkpoint, shapes: Mapping[str, Sequence[int]], allowed: Allowed
) -> Programme:
    """Refuse a checkpoint of another model or other data.

    Returns:
        The programme, with what was stored when in the dataset that the checkpoint was trained on.

    Raises:
        UserError: says what differs.
    """
    description, phase = found.index["description"], phase_of(programme.phases, found.step)
    config, dataset = phase.config, programme.datasets[phase.number]
    dataset = go_on(dataset, description["dataset"], found.step, config.run_dir / DATASET, allowed.append)
    same_null = description["null"] == config.conditioning.null
    if same_null and description["dataset"]["null_sha256"] != dataset.null_sha256:
        raise UserError(
            f"data: the features of the empty caption in {dataset.mixture.name} are not those that {found.path} was "
            "trained with; put the old null.safetensors back, or start another run_dir"
        )
    checkpoints.check_fits(found, shapes, ema_names(config.ema.decays, config.ema.sigma_rels))
    return programme.go_on(phase.data_start, dataset.generations)


def shards_seen(config: TrainConfig, datasets: Sequence[Dataset]) -> dict[str, Any]:
    """Digests of the shards of each generation of the data, by its fingerprint."""
    seen = read_shards(config.run_dir / DATASET)
    old = [generation.fingerprint for dataset in datasets for generation in dataset.generations]
    now = {dataset.mixture.fingerprint: dataset.mixture.shards() for dataset in datasets}
    return {**{fingerprint: seen[fingerprint] for fingerprint in old if fingerprint in seen}, **now}


def start_from(place: Path, config: TrainConfig, engine: Engine, world: World) -> None:
    """Begin with published weights, which the averages begin with too; each rank reads what it owns, and no more.

    Raises:
        SharedError: on every rank, if one could not read its part, or they are gone, or do not fit any more.
    """
    source = everywhere(lambda: open_start(place, config.model.model_dump()), world.device)
    if not same_everywhere(source.digest, world.device):
        raise SharedError(f"model.init_from: the ranks found different weights in {place}; put the same there for all")

    def fill() -> None:
        for piece in engine.pieces():
            weight = piece.tensors[WEIGHT]
            if source.holds(piece.name):
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
    model = build_model(config)
    if config.engine.fp8:
        fp8.convert(model.get_submodule("blocks"))
    prepare_blocks(model, config)
    return model


def prepare_blocks(model: nn.Module, config: TrainConfig) -> None:
    """Let the blocks of a network forget and compile as a config says."""
    part = config.engine
    prepare(model.get_submodule("blocks").children(), part.recompute_every, part.recompute, part.compile)


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


def portions_of(phase: Phase, world: World) -> Split:
    """How the global batch of a phase falls to ranks and micro-batches."""
    return split(phase.config.global_batch, world.world_size, phase.config.micro_batch)


def kernels_of(programme: Programme, run_dir: Path, world: World) -> tuple[dict[Hashable, str], Record | None]:
    """What computes the attention, by phase and bucket; and what the run is to note of it: see `attention.agree`."""
    kernels: dict[Hashable, str] = {}
    record = None
    for wanted in dict.fromkeys(phase.config.engine.attention for phase in programme.phases):
        shapes: dict[Hashable, Shape] = {}
        for phase, dataset in zip(*programme, strict=True):
            if phase.config.engine.attention == wanted:
                micro_batch = portions_of(phase, world).micro_batch
                found = attention_shapes(phase.config, dataset, micro_batch, world.device)
                shapes |= {(phase.number, bucket): shape for bucket, shape in found.items()}
        chosen, noted = attention.agree(wanted, shapes, run_dir / ATTENTION, world)
        kernels, record = kernels | chosen, record or noted
    return kernels, record


def retention_of(config: TrainConfig) -> Retention:
    """Which checkpoints stay."""
    return Retention(config.checkpoint.keep, config.checkpoint.keep_every_steps)


def limits_of(config: TrainConfig) -> Limits:
    """When a rank is given up."""
    return Limits(config.guard.silent_s, config.guard.stalled_s, slurm.leave_s(slurm.signal_delay_s()))


def enter(phase: Phase, before: TrainConfig, engine: Engine, saver: Saver, watch: Watchdog, guard: LossGuard) -> None:
    """Let the parts of a run go on with the settings of a phase; weights, moments and averages stay what they are.

    Args:
        phase: that begins.
        before: settings of the phase that has ended.
        engine, saver, watch, guard: of the run.
    """
    config, options = phase.config, phase.config.optimizer
    engine.tune(betas=options.betas, eps=options.eps, weight_decay=options.weight_decay, clip_norm=options.clip_norm)
    names = ema_names(before.ema.decays, before.ema.sigma_rels)
    averages = averages_of(config.ema.decays, config.ema.sigma_rels, config.ema.warmup)
    engine.optimizer.rename_averages(names, averages)
    set_positions(engine.engine.module, config.model.model_dump())
    if before.engine != config.engine:
        prepare_blocks(engine.engine.module, config)
    saver.retain(retention_of(config))
    watch.tune(limits_of(config))
    guard.tune(config.guard.max_loss_ratio)
    if before.flow != config.flow:
        guard.forget()
    for line in changes(before, config):
        log.info("phase %d  %s", phase.number, line)


def engine_settings(config: TrainConfig, micro_batch: int) -> dict[str, Any]:
    """What DeepSpeed is told.

    Raises:
        UserError: `engine.deepspeed` holds a key that is not the user's to set.
    """
    part = config.engine
    return deepspeed_config(part.zero_stage, part.dtype, micro_batch, part.offload, part.deepspeed)
