"""A plan in words: lines for a terminal, and data for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fmscale.opening import opening
from fmscale.planning.advice import GIB, Advice
from fmscale.planning.devices import Cluster
from fmscale.planning.memory import BEGIN, END, REDUCE, UPDATE
from fmscale.planning.pace import StepTime, sent_s
from fmscale.planning.plans import BucketPlan, PhasePlan, Plan, Room, Row, room
from fmscale.size import checkpoint_bytes, saves_kept, sheets, snapshot_bytes

BAR = 40  # characters that stand for all of a GPU's memory
MARKS = {"states": "█", "gradients": "▓", "buckets": "▒", "gathered": "▞", "activations": "░", "at work": "·"}
MOMENTS = {
    BEGIN: "as the backward pass begins",
    REDUCE: "as gradients are first reduced",
    END: "as the backward pass ends",
    UPDATE: "as weights are updated",
}
DAY_S = 24 * 3600


def lines_of(plan: Plan, rows: Sequence[Row], advice: Sequence[Sequence[Advice]], price: float | None) -> Iterator[str]:
    """What `fmscale plan` prints.

    Args:
        plan: of the run.
        rows: of the scaling table, of its last phase; none where time is not known.
        advice: for each phase.
        price: of a GPU-hour.
    """
    many = len(plan.phases) > 1
    for phase, said in zip(plan.phases, advice, strict=True):
        if many:
            yield ""
            yield f"phase {phase.phase.number}, steps {phase.phase.start:,} to {phase.phase.until:,}"
        yield from _phase(plan, phase)
        yield from _memory(plan, phase)
        yield from _traffic(plan, phase)
        yield from _time(plan, phase)
        yield from (_advice(each) for each in said)
    yield ""
    yield f"parts    {', '.join(f'{name} {count:,}' for name, count in plan.parts.items())}"
    yield from _whole(plan, price)
    if rows:
        yield ""
        yield from _scaling(plan, rows)


def first_lines(phase: PhasePlan) -> list[str]:
    """Model, data and batch, as `train` says them."""
    config, stock = phase.phase.config, phase.stock
    name = " + ".join(part.name for part in stock.parts)
    lines = opening(config, name, ((shape.name, shape.samples) for shape in stock.shapes), phase.split)
    if not stock.known:
        lines[1] = (
            f"data     {', '.join(stock.missing)} cannot be seen from here; assumed are one bucket, "
            f"{stock.shapes[0].name}, and {stock.text_tokens} text tokens"
        )
    return lines


def _phase(plan: Plan, phase: PhasePlan) -> Iterator[str]:
    yield from first_lines(phase)
    config, stock, (first, last) = phase.phase.config, phase.stock, phase.rates
    rates = f"learning rate {first:.3g} at first, {last:.3g} at last"
    yield f"run      {phase.steps:,} steps, {phase.images:,} images; {rates}"
    for part, weight in zip(stock.parts, _weights(phase), strict=True):
        epochs = phase.images * weight / part.samples
        yield (
            f"         {part.name}: {epochs:.2f} epochs; {part.shards:,} shards of "
            f"{part.size / part.shards / 1e6:.1f} MB, {part.shards / plan.world_size:.2f} for each rank"
        )
    if config.conditioning.text == "masked":
        yield "         text is masked: captions have fewer tokens than these figures say"
    yield "bucket       image+text tokens    TFLOP per image: forward, train step, again       steps"
    for bucket in phase.buckets:
        flops = bucket.flops
        figures = f"{flops.forward / 1e12:.4g}, {flops.train_step / 1e12:.4g}, {flops.recomputation / 1e12:.4g}"
        tokens = f"{bucket.image_tokens}+{stock.text_tokens}"
        yield f"{bucket.shape.name:<12} {tokens:<20} {figures:<51} {100 * bucket.share:5.1f} %"


def _weights(phase: PhasePlan) -> list[float]:
    """Share of each dataset in the images."""
    mixture = phase.phase.config.data.mixture
    given = [part.weight for part in mixture] or [1.0]
    return [weight / sum(given) for weight in given][: len(phase.stock.parts)]


def _memory(plan: Plan, phase: PhasePlan) -> Iterator[str]:
    config, gpu = phase.phase.config, plan.cluster.gpu
    yield f"memory   of a rank, GiB; ZeRO-{config.engine.zero_stage}, offload {config.engine.offload}"
    for held in phase.base.states:
        host = f" + {held.host / GIB:.2f} on the host" if held.host else ""
        if held.device or held.host:
            yield f"  {held.name:<22} {held.device / GIB:8.2f}{host}"
    own = phase.base.gradients
    beside = {
        "gradients, pass begins": own.before,
        "gradients, pass ends": own.after,
        "gradients, update": own.update,
        "reduce buckets": own.buckets,
        "most that ZeRO-3 gathers": max(phase.base.gathered),
    }
    yield from (f"  {name:<22} {size / GIB:8.2f}  for a while" for name, size in beside.items() if size)
    for bucket in phase.buckets:
        yield _bar(bucket, gpu.usable if gpu else None, phase, room(phase, bucket, plan.cluster))
    if gpu is not None:
        marks = ", ".join(f"{mark} {name}" for name, mark in MARKS.items())
        yield f"  {marks}; | what {plan.cluster.name} gives, {gpu.usable / GIB:.1f} GiB"


def _bar(bucket: BucketPlan, usable: float | None, phase: PhasePlan, other: Room) -> str:
    memory = bucket.memory
    end = max(usable or 0, memory.total)
    text, done = "", 0.0
    for name, mark in MARKS.items():
        done += memory.parts.get(name, 0)
        text += mark * (round(BAR * done / end) - len(text))
    edge = "|" if usable is not None else ""
    bar = f"{text:<{BAR}}{edge}" if not usable or memory.total <= usable else _over(text, usable / end)
    fit = "" if other.largest is None else f", at most {other.largest} fit"
    least, most = other.recomputed / GIB, other.kept / GIB
    return (
        f"  {bucket.shape.name:<10} {bar} {memory.total / GIB:6.2f} {MOMENTS[memory.moment]}"
        f" ({least:.2f} with all blocks recomputed, {most:.2f} with none); {phase.split.micro_batch} images{fit}"
    )


def _over(text: str, share: float) -> str:
    place = min(round(BAR * share), len(text) - 1)
    return f"{text[:place]}|{text[place:]}"


def _traffic(plan: Plan, phase: PhasePlan) -> Iterator[str]:
    if plan.world_size == 1:
        yield "traffic  none: one rank"
        return
    yield "traffic  of a step, from each rank"
    for each in phase.sent:
        if not each.payload:
            continue
        time = "" if plan.cluster.rates is None else f", {_ms(sent_s(each, plan.cluster, plan.world_size))}"
        beside = " beside the computing" if each.overlaps else ""
        yield f"  {each.name:<24} {each.what:<14} {each.payload / 1e9:9.3f} GB in {each.calls} calls{time}{beside}"
    if plan.cluster.rates is not None:
        yield f"  at {_bandwidths(plan.cluster)}"


def _bandwidths(cluster: Cluster) -> str:
    link = f"{cluster.link / 1e9:.0f} GB/s within a node of {cluster.per_node}"
    return f"{link}, {cluster.network / 1e9:.0f} GB/s of each rank between nodes, one way"


def _time(plan: Plan, phase: PhasePlan) -> Iterator[str]:
    if phase.step is None:
        yield f"time     not known of {plan.cluster.name}: --calibrate measures this machine, --device names a GPU"
        return
    step, size = phase.step, phase.stock.sample_bytes
    yield (
        f"time     {step.total:.3f} s a step, {phase.images_per_s:,.1f} images/s: computing {_ms(step.compute)}, empty "
        f"slots {_ms(step.empty)}, update {_ms(step.update)}, waiting for traffic {_ms(step.sent)} "
        f"({_ms(step.hidden)} more are hidden)"
    )
    if len(phase.buckets) > 1:
        each = ", ".join(f"{each.shape.name} {each.step.total:.3f} s" for each in phase.buckets if each.step)
        yield f"         {each}"
    yield f"         {phase.seconds / DAY_S:.2f} days for {phase.steps:,} steps"
    rate, reads = phase.images_per_s * size / 1e6, phase.images_per_s / phase.phase.config.data.run
    yield f"storage  {rate:,.1f} MB/s in {reads:,.0f} reads a second, {size / 1e3:.1f} kB a sample, for all ranks"


def _advice(advice: Advice) -> str:
    change = " ".join(f"{key}={_value(value)}" for key, value in advice.change.items())
    return f"advice   {change}{': ' if change else ''}{advice.why}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "[]" if value == () else str(value)


def _whole(plan: Plan, price: float | None) -> Iterator[str]:
    count, snapshots = saves_kept(plan.config)
    size, more = checkpoint_bytes(plan.config), snapshots * snapshot_bytes(plan.config)
    images = sheets(plan.config)
    drawn = f", {images:,} sheets of samples" if images else ""
    beside = f" and {snapshots} snapshots" if snapshots else ""
    yield f"disk     {(count * size + more) / 1e9:,.1f} GB: {count} checkpoints of {size / 1e9:,.1f} GB{beside}{drawn}"
    if plan.cluster.rates is None or plan.cluster.gpu is None:
        return
    watts = plan.cluster.gpu.watts
    energy = f", at most {plan.gpu_hours * watts / 1e3:,.1f} kWh at {watts:g} W of each board" if watts else ""
    money = "" if price is None else f", {price * plan.gpu_hours:,.0f} at {price:g} an hour"
    yield (
        f"cost     {plan.seconds / DAY_S:.2f} days on {plan.world_size} {plan.cluster.name}: {plan.gpu_hours:,.0f} "
        f"GPU-hours{energy}{money}"
    )
    rates = plan.cluster.rates
    products, attention = rates.gemm / 1e12, rates.attention / 1e12
    yield (
        f"rates    {rates.source}: {products:,.1f} TFLOP/s in matrix products, {attention:,.1f} in attention, "
        f"{rates.copy / 1e9:,.0f} GB/s of memory"
    )


def _scaling(plan: Plan, rows: Sequence[Row]) -> Iterator[str]:
    phase = plan.phases[-1]
    total, own = phase.phase.config.global_batch, -(-phase.phase.config.global_batch // plan.world_size)
    yield "scaling  efficiency: images a second of a rank over those of one that did nothing but compute them"
    yield f"                weak: {own} images a rank                      strong: {total} images a step"
    yield "  GPUs    step s   images/s  efficiency  limit        step s   images/s  efficiency  limit"
    for row in rows:
        weak = _pace(row.weak, own * row.world_size, row.weak_efficiency)
        text = f"  {row.world_size:<5} {weak}  {_limit(row.weak.limit, row.fits):<11}"
        if row.strong is None:
            yield f"{text}  fewer images than ranks"
            continue
        strong = _pace(row.strong, total, row.strong_efficiency)
        yield f"{text} {strong}  {_limit(row.strong.limit, row.strong_fits)}"


def _pace(step: StepTime, images: int, efficiency: float) -> str:
    return f"{step.total:8.3f} {images / step.total:10,.0f} {100 * efficiency:9.1f} %"


def _limit(limit: str, fits: bool) -> str:
    return limit if fits else "memory"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def data_of(
    plan: Plan, rows: Sequence[Row], advice: Sequence[Sequence[Advice]], why: Sequence[str], price: float | None
) -> dict[str, Any]:
    """The same as data for JSON: bytes, seconds and FLOP; null for what is not known."""
    cluster = plan.cluster
    known = cluster.rates is not None
    return {
        "world_size": plan.world_size,
        "device": cluster.name,
        "dtype": plan.config.engine.dtype,
        "usable_bytes": None if cluster.gpu is None else cluster.gpu.usable,
        "rates": None if cluster.rates is None else cluster.rates._asdict(),
        "per_node": cluster.per_node,
        "network": cluster.network,
        "parameters": plan.parts,
        "checkpoint_bytes": checkpoint_bytes(plan.config),
        "seconds": plan.seconds if known else None,
        "gpu_hours": plan.gpu_hours if known else None,
        "cost": plan.gpu_hours * price if known and price is not None else None,
        "phases": [_phase_data(*each, cluster) for each in zip(plan.phases, advice, strict=True)],
        "scaling": [_row_data(row) for row in rows],
        "refusals": list(why),
    }


def _phase_data(phase: PhasePlan, advice: Sequence[Advice], cluster: Cluster) -> dict[str, Any]:
    return {
        "start": phase.phase.start,
        "until": phase.phase.until,
        "images": phase.images,
        "datasets": [part._asdict() for part in phase.stock.parts],
        "data_known": phase.stock.known,
        "text_tokens": phase.stock.text_tokens,
        "accumulation": phase.split.accumulation,
        "micro_batch": phase.split.micro_batch,
        "lr": list(phase.rates),
        "states": [held._asdict() for held in phase.base.states],
        "buckets": [
            {**_bucket_data(bucket), "room": room(phase, bucket, cluster)._asdict()} for bucket in phase.buckets
        ],
        "collectives": [each._asdict() for each in phase.sent],
        "step": _step_data(phase.step),
        "images_per_s": None if phase.step is None else phase.images_per_s,
        "advice": [each._asdict() for each in advice],
    }


def _bucket_data(bucket: BucketPlan) -> dict[str, Any]:
    memory = bucket.memory
    return {
        "name": bucket.shape.name,
        "samples": bucket.shape.samples,
        "share": bucket.share,
        "image_tokens": bucket.image_tokens,
        "flops": bucket.flops._asdict(),
        "memory": {**memory.parts, "total": memory.total, "moment": memory.moment},
        "step": _step_data(bucket.step),
    }


def _row_data(row: Row) -> dict[str, Any]:
    return row._asdict() | {"weak": _step_data(row.weak), "strong": _step_data(row.strong)}


def _step_data(step: StepTime | None) -> dict[str, Any] | None:
    return None if step is None else step._asdict() | {"total": step.total, "limit": step.limit}
