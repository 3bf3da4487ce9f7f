"""The plan of a run as a record: what runs, in what memory, with what traffic, for how long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from fmscale.config import TrainConfig
from fmscale.data.order import Split, split
from fmscale.engine.collectives import Collective
from fmscale.engine.recomputed import check_recompute
from fmscale.engine.sharding import check_zero
from fmscale.errors import UserError
from fmscale.models.flops import Flops
from fmscale.models.shapes import PARTS, recomputable, row_for, weights_of
from fmscale.phases import Phase, learning_rate_at, phases_of
from fmscale.planning.devices import Cluster
from fmscale.planning.laid_out import parameters_of, zero_of
from fmscale.planning.memory import Base, Memory, held, largest_micro_batch, memory_of
from fmscale.planning.pace import StepTime, flops_of, image_s, step_time, tokens_of, traffic
from fmscale.planning.stock import Shape, Stock, stock_of

WORLDS = tuple(2**power for power in range(11))  # of the scaling table


class BucketPlan(NamedTuple):
    """What a bucket needs.

    Attributes:
        shape: latent pixels and samples.
        share: of the steps.
        image_tokens: of an image.
        flops: of an image.
        memory: of a rank at its fullest.
        step: seconds; None where the device's rates are not known.
    """

    shape: Shape
    share: float
    image_tokens: int
    flops: Flops
    memory: Memory
    step: StepTime | None


class PhasePlan(NamedTuple):
    """What a phase needs.

    Attributes:
        phase: its steps and settings.
        stock: its data.
        split: of its global batch.
        base: memory whatever the bucket is.
        buckets: by height, then width.
        sent: in a step.
        rates: learning rates of its first and its last step.
        step: seconds of the mean step; None where the device's rates are not known.
    """

    phase: Phase
    stock: Stock
    split: Split
    base: Base
    buckets: tuple[BucketPlan, ...]
    sent: tuple[Collective, ...]
    rates: tuple[float, float]
    step: StepTime | None

    @property
    def steps(self) -> int:
        """How many."""
        return self.phase.until - self.phase.start

    @property
    def images(self) -> int:
        """That it draws."""
        return self.steps * self.phase.config.global_batch

    @property
    def seconds(self) -> float:
        """That it takes; not a number where the device's rates are not known."""
        return float("nan") if self.step is None else self.steps * self.step.total

    @property
    def images_per_s(self) -> float:
        """Over all ranks."""
        return self.images / self.seconds

    @property
    def fullest(self) -> BucketPlan:
        """The bucket that needs most memory."""
        return max(self.buckets, key=lambda bucket: bucket.memory.total)


class Room(NamedTuple):
    """How a bucket's memory could be otherwise.

    Attributes:
        largest: images of the largest micro-batch that fits; None where the device's memory is not known.
        recomputed, kept: bytes at the fullest with all blocks recomputed, and with none.
    """

    largest: int | None
    recomputed: int
    kept: int


class Row(NamedTuple):
    """A number of ranks in the scaling table.

    Attributes:
        world_size: of ranks.
        weak, strong: mean steps with as many images for each rank as planned, and with the same global batch; None
            where that has fewer images than ranks.
        weak_efficiency, strong_efficiency: images a second of each rank, over those of a rank that did nothing but
            compute them.
        fits, strong_fits: the memory of a rank suffices, with as many images for each, and with the same global batch.
    """

    world_size: int
    weak: StepTime
    strong: StepTime | None
    weak_efficiency: float
    strong_efficiency: float
    fits: bool
    strong_fits: bool


class Plan(NamedTuple):
    """All of it.

    Attributes:
        config: of the run.
        world_size: ranks.
        cluster: where.
        parts: parameters by part of the network.
        phases: of the run.
    """

    config: TrainConfig
    world_size: int
    cluster: Cluster
    parts: dict[str, int]
    phases: tuple[PhasePlan, ...]

    @property
    def seconds(self) -> float:
        """Of all steps; not a number where the device's rates are not known."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def gpu_hours(self) -> float:
        """Of all ranks."""
        return self.seconds * self.world_size / 3600


def plan_of(
    config: TrainConfig, world_size: int, cluster: Cluster, allow_pipe: bool = False, remote: bool = True
) -> Plan:
    """Plan a run.

    Args:
        config: of `train`.
        world_size: ranks.
        cluster: where.
        allow_pipe, remote: as of `stock_of`.

    Raises:
        UserError: what could not run at all; says which key is wrong.
    """
    phases = phases_of(config)
    found = [plan_phase(phase, stock_of(phase.config, allow_pipe, remote), world_size, cluster) for phase in phases]
    table, parts = PARTS[config.model.family], Counter[str]()
    for weight in weights_of(config.model.model_dump()):
        parts[row_for(weight.name, table)] += weight.numel
    return Plan(config, world_size, cluster, dict(parts), tuple(found))


def plan_phase(phase: Phase, stock: Stock, world_size: int, cluster: Cluster) -> PhasePlan:
    """Plan a phase, whose data are known.

    Raises:
        UserError: as `plan_of`.
    """
    config = phase.config
    cut = split(config.global_batch, world_size, config.micro_batch)
    zero = zero_of(config, world_size, cluster.gpu is not None)
    check_zero(zero)
    check_recompute(config.engine.recompute, recomputable(weights_of(config.model.model_dump())))
    for shape in stock.shapes:
        _check_shape(config, shape)
    base, sent = held(config, zero, cut.accumulation), traffic(config, zero, cut.accumulation)
    total = sum(parameter.numel for parameter in parameters_of(config.model))

    def plan_bucket(shape: Shape, share: float) -> BucketPlan:
        memory = memory_of(config, base, shape, stock.text_tokens, cut.micro_batch)
        step = None
        if cluster.rates is not None:
            step = step_time(image_s(config, shape, stock.text_tokens, cluster), cut, total, sent, zero, cluster)
        return BucketPlan(
            shape, share, tokens_of(config, shape), flops_of(config, shape, stock.text_tokens), memory, step
        )

    buckets = [plan_bucket(*each) for each in zip(stock.shapes, stock.shares, strict=True)]
    rates = learning_rate_at(phase, phase.start), learning_rate_at(phase, phase.until - 1)
    return PhasePlan(phase, stock, cut, base, tuple(buckets), tuple(sent), rates, _mean(buckets))


def _mean(buckets: Sequence[BucketPlan]) -> StepTime | None:
    """Of the steps of all buckets, by their shares."""
    steps = [(bucket.share, bucket.step) for bucket in buckets if bucket.step is not None]
    if not steps:
        return None
    return StepTime(*(sum(share * step[term] for share, step in steps) for term in range(len(StepTime._fields))))


def _check_shape(config: TrainConfig, shape: Shape) -> None:
    """Refuse a bucket that the network cannot take."""
    size = config.model.patch_size
    if shape.height % size or shape.width % size:
        raise UserError(f"data: bucket {shape.name} does not divide into patches of model.patch_size={size}")
    limit = getattr(config.model, "pos_embed_max_size", None)
    if limit is not None and max(shape.height, shape.width) > size * limit:
        raise UserError(
            f"model.pos_embed_max_size {limit} covers latents up to {size * limit} x {size * limit}, not those of "
            f"bucket {shape.name}: raise it, or choose smaller buckets"
        )


def fits(plan: PhasePlan, cluster: Cluster) -> bool:
    """Whether the memory of a GPU suffices, as far as it is known."""
    return cluster.gpu is None or plan.fullest.memory.total <= cluster.gpu.usable


def room(plan: PhasePlan, bucket: BucketPlan, cluster: Cluster) -> Room:
    """How memory in steps of a bucket could be otherwise."""
    config, tokens = plan.phase.config, plan.stock.text_tokens

    def total(every: int) -> int:
        engine = config.engine.model_copy(update={"recompute_every": every, "recompute": ()})
        other = config.model_copy(update={"engine": engine})
        return memory_of(other, plan.base, bucket.shape, tokens, plan.split.micro_batch).total

    usable = None if cluster.gpu is None else cluster.gpu.usable
    most = None if usable is None else largest_micro_batch(config, plan.base, bucket.shape, tokens, usable)
    return Room(most, total(1), total(0))


def scaling(plan: PhasePlan, cluster: Cluster, worlds: Sequence[int] = WORLDS) -> list[Row]:
    """Steps of a phase on other numbers of ranks.

    Args:
        plan: of the phase; the cluster's rates are known.
        cluster: where.
        worlds: numbers of ranks.
    """
    assert plan.step is not None
    total = plan.phase.config.global_batch
    own, alone = -(-total // plan.split.world_size), total / plan.split.world_size / plan.step.compute

    def row(world_size: int) -> Row:
        weak = _on(plan, cluster, world_size, own * world_size)
        strong = _on(plan, cluster, world_size, total) if total >= world_size else None
        assert weak.step is not None
        return Row(
            world_size,
            weak.step,
            None if strong is None else strong.step,
            weak.images_per_s / world_size / alone,
            0.0 if strong is None else strong.images_per_s / world_size / alone,
            fits(weak, cluster),
            strong is not None and fits(strong, cluster),
        )

    return [row(world_size) for world_size in worlds]


def _on(plan: PhasePlan, cluster: Cluster, world_size: int, global_batch: int) -> PhasePlan:
    config = plan.phase.config.model_copy(update={"global_batch": global_batch})
    return plan_phase(plan.phase._replace(config=config), plan.stock, world_size, cluster)
