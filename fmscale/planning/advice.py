"""What to change in a run, each with its figure; and why it could not run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

from fmscale.beforehand import check_save, check_time
from fmscale.errors import UserError
from fmscale.planning.devices import Cluster
from fmscale.planning.laid_out import zero_of
from fmscale.planning.plans import PhasePlan, Plan, Row, fits, plan_phase, room
from fmscale.site import Site, processes_per_node
from fmscale.size import checkpoint_bytes

WORTH = 0.02  # less of a step's time is worth no word
GOOD = 0.9  # efficiency down to which more GPUs are recommended
GIB = 2**30


class Advice(NamedTuple):
    """What to change.

    Attributes:
        change: keys of the config and their values, empty where there is nothing to set.
        why: with its figure.
    """

    change: dict[str, Any]
    why: str


def advice_of(plan: Plan, phase: PhasePlan, rows: list[Row]) -> list[Advice]:
    """What to change in a phase.

    Args:
        plan: of the run.
        phase: one of its phases.
        rows: of the scaling table; none where time is not known.
    """
    found = [*_fitting(phase, plan.cluster)] if not fits(phase, plan.cluster) else [*_faster(phase, plan.cluster)]
    found += [*_batch(phase), *_small_buckets(phase), *_nodes(phase, plan.cluster, rows)]
    return [*found, *_uncounted(phase)]


def refusals(plan: Plan, site: Site | None) -> list[str]:
    """Why a run could not go on where it is planned, in one line each.

    Args:
        plan: of the run.
        site: where it would be submitted.
    """
    found = []
    for number, phase in enumerate(plan.phases):
        if plan.cluster.gpu is not None and not fits(phase, plan.cluster):
            where = f"phases.{number}: " if len(plan.phases) > 1 else ""
            total, usable = phase.fullest.memory.total / GIB, plan.cluster.gpu.usable / GIB
            found.append(
                f"{where}a rank needs {total:.1f} GiB in bucket {phase.fullest.shape.name}, of the {usable:.1f} GiB "
                f"that {plan.cluster.name} gives"
            )
    if site is not None:
        host = max(phase.base.host for phase in plan.phases) * processes_per_node(site)
        if site.mem_gb is not None and host > site.mem_gb * GIB:
            found.append(
                f"site.mem_gb: {site.mem_gb:g}, and the ranks of a node hold {host / GIB:.1f} there; give more"
            )
        for check in (lambda: check_time(site), lambda: check_save(site, checkpoint_bytes(plan.config))):
            try:
                check()
            except UserError as error:
                found.append(str(error))
    return found


def changed(phase: PhasePlan, cluster: Cluster, change: Mapping[str, Any]) -> PhasePlan | None:
    """The phase with other settings, or None where there are too few images for the ranks."""
    config = phase.phase.config
    inner = {key.removeprefix("engine."): value for key, value in change.items() if key.startswith("engine.")}
    outer = {key: value for key, value in change.items() if not key.startswith("engine.")}
    config = config.model_copy(update={**outer, "engine": config.engine.model_copy(update=inner)})
    try:
        return plan_phase(phase.phase._replace(config=config), phase.stock, phase.split.world_size, cluster)
    except UserError:
        return None


def _fitting(phase: PhasePlan, cluster: Cluster) -> Iterator[Advice]:
    """The fastest settings that fit: of stage, recomputation and micro-batch; offload where nothing else does."""
    for offload in dict.fromkeys((phase.phase.config.engine.offload, "optimizer")):
        best: tuple[float, dict[str, Any], PhasePlan] | None = None
        own = -(-phase.phase.config.global_batch // phase.split.world_size)
        sizes = [2**power for power in range(own.bit_length())]
        for stage, every, size in product((1, 2, 3), (0, 1), sizes):
            change = _differences(phase, stage, every, size, offload)
            other = changed(phase, cluster, change)
            if other is None or not fits(other, cluster):
                continue
            cost = other.fullest.memory.total if other.step is None else other.step.total
            if best is None or cost < best[0]:
                best = cost, change, other
        if best is not None:
            yield Advice(best[1], f"fits: {_gib(best[2])}{_at_pace(best[2])}")
            return
    yield Advice({}, "nothing fits, with offload and one image at a time either: a smaller network, or more ranks")


def _differences(phase: PhasePlan, stage: int, every: int, size: int, offload: str) -> dict[str, Any]:
    part = phase.phase.config.engine
    wanted = {
        "engine.zero_stage": (part.zero_stage, stage),
        "engine.recompute_every": (part.recompute_every, every),
        "engine.offload": (part.offload, offload),
        "micro_batch": (phase.split.micro_batch, size),
    }
    return {key: value for key, (now, value) in wanted.items() if now != value}


def _faster(phase: PhasePlan, cluster: Cluster) -> Iterator[Advice]:
    """Single changes that fit and save time, the best first."""
    if phase.step is None or cluster.gpu is None:
        return
    part, found = phase.phase.config.engine, []
    most = min(room(phase, bucket, cluster).largest or 0 for bucket in phase.buckets)
    most = min(most, -(-phase.phase.config.global_batch // phase.split.world_size))
    changes: list[dict[str, Any]] = [
        *({"engine.zero_stage": stage} for stage in (1, 2, 3) if stage != part.zero_stage),
        *([{"engine.compile": True}] if not part.compile else []),
        *([{"engine.recompute_every": 0}] if part.recompute_every else []),
        *([{"engine.recompute": ()}] if part.recompute else []),
        *([{"engine.offload": "none"}] if part.offload != "none" else []),
        *([{"micro_batch": most}] if most > phase.split.micro_batch else []),
    ]
    for change in changes:
        other = changed(phase, cluster, change)
        if other is None or other.step is None or not fits(other, cluster):
            continue
        saved = 1 - other.step.total / phase.step.total
        if saved > WORTH:
            why = f"{other.step.total:.3f} s a step instead of {phase.step.total:.3f}, in {_gib(other)}"
            found.append((saved, Advice(change, why)))
    yield from (advice for _, advice in sorted(found, key=lambda pair: pair[0], reverse=True))


def _batch(phase: PhasePlan) -> Iterator[Advice]:
    """A global batch that leaves no slots empty."""
    cut = phase.split
    slots = cut.world_size * cut.accumulation * cut.micro_batch
    if slots > cut.global_batch:
        empty = slots - cut.global_batch
        number = "one empty slot" if empty == 1 else f"{empty} empty slots"
        yield Advice({"global_batch": slots}, f"fills {number}, {100 * empty / slots:.1f} % of each step")


def _small_buckets(phase: PhasePlan) -> Iterator[Advice]:
    batch = phase.phase.config.global_batch
    for bucket in phase.buckets:
        if phase.stock.known and bucket.shape.samples < batch:
            often = batch / bucket.shape.samples
            yield Advice(
                {},
                f"bucket {bucket.shape.name} has {bucket.shape.samples:,} samples, fewer than global_batch {batch:,}: "
                f"each of its steps shows them {often:.1f} times; merge it with another, or take a smaller batch",
            )


def _nodes(phase: PhasePlan, cluster: Cluster, rows: list[Row]) -> Iterator[Advice]:
    good = [row for row in rows if row.strong_fits and row.strong is not None and row.strong_efficiency >= GOOD]
    if good and good[-1].world_size > phase.split.world_size and good[-1].strong is not None:
        row = good[-1]
        ratio = phase.step.total / row.strong.total if phase.step and row.strong else 0
        nodes = -(-row.world_size // cluster.per_node)
        number = "one node" if nodes == 1 else f"{nodes} nodes"
        yield Advice(
            {},
            f"up to {row.world_size} GPUs ({number}) the same batch keeps {100 * row.strong_efficiency:.0f} % of "
            f"each GPU's speed: {ratio:.1f} times as fast as here",
        )


def _uncounted(phase: PhasePlan) -> Iterator[Advice]:
    config = phase.phase.config
    for key in zero_of(config, 1, True).uncounted():
        yield Advice({}, f"engine.deepspeed: {key} is in none of these figures")
    if config.engine.fp8:
        yield Advice({}, "engine.fp8: times are those of bf16, since what it gains depends on the shapes; measure it")


def _gib(phase: PhasePlan) -> str:
    return f"{phase.fullest.memory.total / GIB:.1f} GiB"


def _at_pace(phase: PhasePlan) -> str:
    return "" if phase.step is None else f", {phase.step.total:.3f} s a step"
