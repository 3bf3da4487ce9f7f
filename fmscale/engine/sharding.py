"""What ZeRO lays where and sends when, in closed form: bytes that a rank holds, and bytes of a step's collectives.

DeepSpeed and torch stay out. The figures are those of DeepSpeed's own buffers and calls, as `deepspeed_config` sets it
up; tests compare them with a real engine's, to the byte.

Source: Rajbhandari et al. 2020, arXiv:1910.02054, for the stages; DeepSpeed's code for padding, buckets and what
stays gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

from fmscale.errors import UserError

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
MASTER_BYTES = 4  # of weights, moments and averages, which are kept in fp32
COUNTER_BYTES = 4  # of an optimizer's count of updates
ALIGNMENT = 2  # elements to which DeepSpeed pads a partition
# DeepSpeed's keys under `zero_optimization` that bytes follow from, with its defaults.
DEFAULTS: dict[str, Any] = {
    "reduce_bucket_size": 5e8,
    "use_multi_rank_bucket_allreduce": False,  # ours, see `deepspeed_config`
    "overlap_comm": None,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_reuse_distance": 1e9,
    "stage3_max_live_parameters": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
    "sub_group_size": 1e9,
}
MOST_ELEMENTS = 2**63
HARMLESS = {"allgather_bucket_size", "log_trace_cache_warnings"}  # they move no byte
LOOKS_AHEAD = 2  # times for each module with weights: modules that hold it do so too


class Parameter(NamedTuple):
    """What ZeRO sees of a parameter.

    Attributes:
        module: name of the module that holds it; those of a module stand together.
        numel: elements.
        group: of the optimizer.
    """

    module: str
    numel: int
    group: int


class Zero(NamedTuple):
    """What bytes follow from.

    Attributes:
        stage: 1, 2 or 3.
        dtype: of the network, `bf16` or `fp32`.
        offload: `optimizer` or `none`.
        averages: copies of the weights that are averaged.
        world_size: ranks.
        gpu: they have one each.
        raw: DeepSpeed's own settings, as in `engine.deepspeed`.
    """

    stage: int
    dtype: str
    offload: str
    averages: int
    world_size: int
    gpu: bool
    raw: Mapping[str, Any]

    @property
    def item(self) -> int:
        """Bytes of an element of the network's weights and gradients."""
        return ITEM_BYTES[self.dtype]

    @property
    def overlaps(self) -> bool:
        """Whether gradients are reduced while others are still computed."""
        chosen = self.option("overlap_comm")
        return self.gpu and self.world_size > 1 if chosen is None else bool(chosen)

    @property
    def compact(self) -> bool:
        """Whether gradients are added up in fp32, each by its owner, as they are reduced."""
        return self.stage == 2 and self.dtype != "fp32"

    def option(self, key: str) -> Any:
        """One of DeepSpeed's settings, from `DEFAULTS`."""
        return self.raw.get("zero_optimization", {}).get(key, DEFAULTS[key])

    def uncounted(self) -> list[str]:
        """Settings of `raw` that nothing here knows."""
        inner = self.raw.get("zero_optimization", {})
        return [
            *(f"zero_optimization.{key}" for key in inner if key not in {*DEFAULTS, *HARMLESS}),
            *(key for key in self.raw if key != "zero_optimization"),
        ]


class Held(NamedTuple):
    """What a rank holds between steps: bytes of the device's memory, and of the host's."""

    name: str
    device: int
    host: int = 0


class Collective(NamedTuple):
    """What a step sends.

    Attributes:
        name: as in `torch.distributed`.
        what: is sent.
        payload: bytes of all calls of a step, as each call counts them: of what is reduced, or of all that is gathered.
        calls: of a step, about.
        overlaps: happens while the device computes.
    """

    name: str
    what: str
    payload: int
    calls: int
    overlaps: bool

    def wire(self, world_size: int) -> float:
        """Bytes that each rank sends, by the algorithms in rings that NCCL uses for large ones."""
        passes = 2 if self.name == "all_reduce" else 1
        return passes * self.payload * (world_size - 1) / world_size


def states(
    parameters: Sequence[Parameter], zero: Zero, average_names: Sequence[str], accumulation: int = 1
) -> list[Held]:
    """What a rank holds between steps, by name; of ranks that differ, the one that holds most.

    Args:
        parameters: of the network, in its own order.
        zero: settings.
        average_names: of each average.
        accumulation: micro-batches in a step.
    """
    assert len(average_names) == zero.averages
    if zero.stage == 3:
        return _states_3(parameters, zero, average_names)
    return _states_12(parameters, zero, average_names, accumulation)


def _states_12(
    parameters: Sequence[Parameter], zero: Zero, average_names: Sequence[str], accumulation: int
) -> list[Held]:
    padded = list(_padded_groups(parameters, zero.world_size))
    part, away = sum(padded) // zero.world_size, zero.offload == "optimizer"
    largest = max(parameter.numel for parameter in parameters)
    copies = ["fp32 weights", "exp_avg", "exp_avg_sq", *average_names]
    found = [Held("weights", sum(padded) * zero.item)]
    found += [_at(name, MASTER_BYTES * part, away) for name in copies]
    found.append(_at("counters", COUNTER_BYTES * len(padded), away))
    if away:
        found.append(Held("gradients", 0, MASTER_BYTES * part))
        found.append(Held("offload buffers", largest * zero.item, (part + largest) * zero.item))
        if zero.stage == 2 and not zero.compact and accumulation > 1:
            found.append(Held("gradients of micro-batches", 0, _touched(parameters, zero.world_size) * zero.item))
    elif not zero.gpu and not zero.compact:
        found.append(Held("gradients", MASTER_BYTES * part))  # `Tail` keeps the vector that it makes of them
    return found


def _states_3(parameters: Sequence[Parameter], zero: Zero, average_names: Sequence[str]) -> list[Held]:
    away = zero.offload == "optimizer"
    part = sum(_share(parameter.numel, zero.world_size) for parameter in parameters)
    counters = sum(_sub_groups(group, zero) for group in _groups(parameters))
    whole = sum(_padded(p, zero) for p in persistent(parameters, zero))
    copies = ["fp32 weights", "exp_avg", "exp_avg_sq", *average_names]
    return [
        Held("weights", part * zero.item),
        Held("small weights, whole", whole * zero.item if zero.world_size > 1 else 0),
        *(_at(name, MASTER_BYTES * part, away) for name in copies),
        _at("counters", COUNTER_BYTES * counters, away),
        _at("gradients", MASTER_BYTES * part * (2 if away else 1), away),  # as they come, and for the update
        Held("reduce buckets", int(zero.option("reduce_bucket_size")) * zero.item),
    ]


def _at(name: str, size: int, away: bool) -> Held:
    return Held(name, 0, size) if away else Held(name, size)


def _padded_groups(parameters: Iterable[Parameter], world_size: int) -> Iterable[int]:
    """Elements of each group of the optimizer, with what is added for equal partitions."""
    step = ALIGNMENT * world_size
    for group in _groups(parameters):
        yield _share(sum(parameter.numel for parameter in group), step) * step


def _groups(parameters: Iterable[Parameter]) -> list[list[Parameter]]:
    """Parameters by group of the optimizer."""
    return [list(members) for _, members in groupby(sorted(parameters, key=_group), key=_group)]


def _touched(parameters: Sequence[Parameter], world_size: int) -> int:
    """Most elements of the parameters, whole, of which a rank owns any under stages 1 and 2."""
    found = [0] * world_size
    for group, padded in zip(_groups(parameters), _padded_groups(parameters, world_size), strict=True):
        size, start = padded // world_size, 0
        for parameter in group:
            end = start + parameter.numel
            for rank in range(start // size, _share(end, size)):
                found[rank] += parameter.numel
            start = end
    return max(found)


def _sub_groups(group: Sequence[Parameter], zero: Zero) -> int:
    """Pieces in which ZeRO-3 updates a group of the optimizer."""
    limit, shares = zero.option("sub_group_size"), [_share(p.numel, zero.world_size) for p in group]
    if limit >= sum(shares):
        return 1
    count, filled = 0, 0
    for share in shares:
        filled += share
        if filled >= limit:
            count, filled = count + 1, 0
    return count + (filled > 0)


def _group(parameter: Parameter) -> int:
    return parameter.group


def _share(numel: int, parts: int) -> int:
    return -(-numel // parts)


def persistent(parameters: Iterable[Parameter], zero: Zero) -> list[Parameter]:
    """Small parameters, which ZeRO-3 keeps whole on every rank."""
    return [p for p in parameters if _stays(p, zero)]


def _stays(parameter: Parameter, zero: Zero) -> bool:
    return bool(parameter.numel <= zero.option("stage3_param_persistence_threshold"))


def _padded(parameter: Parameter, zero: Zero) -> int:
    """Elements that are moved where ranks gather a parameter, or reduce its gradient."""
    return _share(parameter.numel, zero.world_size) * zero.world_size


def bucket_bytes(zero: Zero) -> int:
    """Bytes of the buffers that stages 1 and 2 fill with gradients during a backward pass."""
    if zero.stage == 3 or (zero.world_size == 1 and not zero.compact and zero.offload == "none"):
        return 0
    return (2 if zero.overlaps else 1) * int(zero.option("reduce_bucket_size")) * zero.item


def collectives(
    parameters: Sequence[Parameter], zero: Zero, accumulation: int, tally: int, compiled: bool = False
) -> list[Collective]:
    """What a step sends.

    Args:
        parameters: of the network, in the order of its forward pass.
        zero: settings.
        accumulation: micro-batches in a step.
        tally: elements that ranks sum in each step beside gradients.
        compiled: blocks are gathered whole.
    """
    several = zero.world_size > 1
    told = Collective("all_reduce", "tally and norm", 4 * (tally + 1) if several else 0, 2 if several else 0, False)
    sent = (
        _sent_3(parameters, zero, accumulation, compiled)
        if zero.stage == 3
        else _sent_12(parameters, zero, accumulation)
    )
    return [*sent, told]


def _sent_12(parameters: Sequence[Parameter], zero: Zero, accumulation: int) -> list[Collective]:
    several, total = zero.world_size > 1, sum(parameter.numel for parameter in parameters)
    times = accumulation if zero.stage == 2 else 1
    alone = not several and not zero.compact and zero.offload == "none"
    buckets = max(1, round(total / zero.option("reduce_bucket_size")))
    name = "all_reduce" if zero.option("use_multi_rank_bucket_allreduce") else "reduce"
    calls = (buckets + (zero.world_size - 1 if name == "reduce" else 0)) * times
    gathered = sum(_padded_groups(parameters, zero.world_size)) if several else 0
    groups = len({parameter.group for parameter in parameters}) if several else 0
    return [
        Collective(name, "gradients", 0 if alone else total * zero.item * times, 0 if alone else calls, zero.overlaps),
        Collective("all_gather_into_tensor", "weights", gathered * zero.item, groups, False),
    ]


def _sent_3(parameters: Sequence[Parameter], zero: Zero, accumulation: int, compiled: bool) -> list[Collective]:
    several = zero.world_size > 1
    padded, small = sum(_padded(p, zero) for p in parameters), persistent(parameters, zero)
    after = sum(_padded(p, zero) for p in small) if several else 0
    each = gathers(parameters, zero, compiled) if several else Gathers(0, 0, 0)
    buckets = max(1, round(padded / zero.option("reduce_bucket_size")))
    return [
        Collective(
            "reduce_scatter_tensor",
            "gradients",
            padded * zero.item * accumulation,
            buckets * accumulation,
            zero.overlaps,
        ),
        Collective(
            "all_gather_into_tensor",
            "weights",
            each.sent * zero.item * accumulation,
            each.calls * accumulation,
            True,
        ),
        Collective("all_gather_into_tensor", "small weights", after * zero.item, len(small) if several else 0, False),
    ]


class Gathers(NamedTuple):
    """What ZeRO-3 gathers in a micro-batch, beside what stays.

    Attributes:
        sent: elements, padding included.
        calls: about.
        most: elements that are there at a time.
    """

    sent: int
    calls: int
    most: int


def _modules(parameters: Iterable[Parameter], compiled: bool) -> list[list[Parameter]]:
    """What is gathered together."""
    return [list(members) for _, members in groupby(parameters, key=lambda p: _unit(p.module, compiled))]


def gathers(parameters: Iterable[Parameter], zero: Zero, compiled: bool) -> Gathers:
    """A forward and a backward pass as ZeRO-3 goes through them once it knows them.

    A module's weights are let go after its forward pass, and gathered again for its backward pass. They stay if that
    comes within `stage3_max_reuse_distance` elements of other weights. So do those that DeepSpeed finds already there
    as it looks ahead for what to gather next, which it does for as long as fewer than `stage3_max_live_parameters`
    elements are gathered.

    Args:
        parameters: in the order of the forward pass.
        zero: settings.
        compiled: blocks are gathered whole.

    Source: DeepSpeed's `PartitionedParameterCoordinator`.
    """
    modules = _modules(parameters, compiled)
    live, bucket = zero.option("stage3_max_live_parameters"), zero.option("stage3_prefetch_bucket_size")
    numbers = iter(range(sum(map(len, modules))))
    forward = [[(next(numbers), parameter) for parameter in module] for module in modules]
    steps = [*forward, *reversed(forward)]
    trace = list(chain.from_iterable(steps))
    here, kept, sent = {number for number, p in trace if _stays(p, zero)}, set[int](), 0
    ends, seen, there, most, calls = 0, 0, 0, 0, 0
    behind = sum(p.numel for module in modules for p in module)

    def gather(members: Iterable[tuple[int, Parameter]]) -> list[Parameter]:
        missing = {number: p for number, p in members if number not in here}
        here.update(missing)
        return list(missing.values())

    for step, members in enumerate(steps):
        ends += len(members)
        found, seen = gather(members), max(seen, ends)
        for _ in range(LOOKS_AHEAD):
            room, next_ones = min(live - there - _elements(found), bucket), list[Parameter]()
            while seen < len(trace) and _elements(next_ones) < room:
                next_ones += gather(trace[seen : seen + 1])
                kept.update({trace[seen][0]} if 2 * seen >= len(trace) else ())
                seen += 1
            found += next_ones
        sent, there = sent + sum(_padded(p, zero) for p in found), there + _elements(found)
        calls += bool(found)
        most = max(most, there)
        first = step < len(forward)
        behind -= _elements(p for _, p in members) if first else 0
        for number, parameter in members:
            stays = first and (number in kept or 2 * behind < zero.option("stage3_max_reuse_distance"))
            if not stays and not _stays(parameter, zero):
                here.discard(number)
                there -= parameter.numel
    return Gathers(sent, calls, most)


def _elements(parameters: Iterable[Parameter]) -> int:
    return sum(parameter.numel for parameter in parameters)


def _unit(module: str, compiled: bool) -> str:
    """Name of what is gathered at once."""
    parts = module.split(".")
    return ".".join(parts[:2]) if compiled and parts[0] == "blocks" else module


def gathered_bytes(parameters: Sequence[Parameter], zero: Zero, compiled: bool = False) -> int:
    """Most bytes of whole weights that ZeRO-3 has on a rank at a time, beside those that stay."""
    if zero.stage != 3 or zero.world_size == 1:
        return 0
    return zero.item * gathers(parameters, zero, compiled).most


def check_zero(zero: Zero) -> None:
    """Refuse DeepSpeed's settings that are no numbers of elements.

    Raises:
        UserError: names the key.
    """
    inner = zero.raw.get("zero_optimization", {})
    if not isinstance(inner, Mapping):
        raise UserError(f"engine.deepspeed: zero_optimization is a section; give a mapping, not {inner!r}")
    for key, default in DEFAULTS.items():
        value, least = zero.option(key), 1 if key == "reduce_bucket_size" else 0
        number = isinstance(value, int | float) and not isinstance(value, bool) and least <= value < MOST_ELEMENTS
        if isinstance(default, float) and not number:
            raise UserError(
                f"engine.deepspeed: zero_optimization.{key} is {value!r}; give a number of elements from {least} on"
            )
