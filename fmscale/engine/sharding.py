"""What ZeRO lays where and sends when, in closed form: bytes that a rank holds, and bytes of a step's collectives.

DeepSpeed and torch stay out. The figures are those of DeepSpeed's own buffers and calls, as `deepspeed_config` sets it
up; tests compare them with a real engine's, to the byte.

Source: Rajbhandari et al. 2020, arXiv:1910.02054, for the stages; DeepSpeed's code for padding, buckets and what
stays gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
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
    "sub_group_size": 1e9,
}
HARMLESS = {"stage3_prefetch_bucket_size", "allgather_bucket_size", "log_trace_cache_warnings"}  # they move no byte


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


def states(parameters: Sequence[Parameter], zero: Zero, average_names: Sequence[str]) -> list[Held]:
    """What a rank holds between steps, by name; of ranks that differ, the one that holds most.

    Args:
        parameters: of the network, in its own order.
        zero: settings.
        average_names: of each average.
    """
    assert len(average_names) == zero.averages
    return (
        _states_3(parameters, zero, average_names) if zero.stage == 3 else _states_12(parameters, zero, average_names)
    )


def _states_12(parameters: Sequence[Parameter], zero: Zero, average_names: Sequence[str]) -> list[Held]:
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
    elif not zero.gpu and not zero.compact:
        found.append(Held("gradients", MASTER_BYTES * part))  # `Tail` keeps the vector that it makes of them
    return found


def _states_3(parameters: Sequence[Parameter], zero: Zero, average_names: Sequence[str]) -> list[Held]:
    away = zero.offload == "optimizer"
    part = sum(_share(parameter.numel, zero.world_size) for parameter in parameters)
    groups = [list(members) for _, members in groupby(sorted(parameters, key=_group), key=_group)]
    counters = sum(_sub_groups(group, zero) for group in groups)
    whole = sum(_share(p.numel, zero.world_size) * zero.world_size for p in persistent(parameters, zero))
    copies = ["fp32 weights", "exp_avg", "exp_avg_sq", *average_names]
    return [
        Held("weights", part * zero.item),
        Held("small weights, whole", whole * zero.item if zero.world_size > 1 else 0),
        *(_at(name, MASTER_BYTES * part, away) for name in copies),
        _at("counters", COUNTER_BYTES * counters, away),
        _at("gradients", MASTER_BYTES * part, away),
        Held("reduce buckets", int(zero.option("reduce_bucket_size")) * zero.item),
    ]


def _at(name: str, size: int, away: bool) -> Held:
    return Held(name, 0, size) if away else Held(name, size)


def _padded_groups(parameters: Iterable[Parameter], world_size: int) -> Iterable[int]:
    """Elements of each group of the optimizer, with what is added for equal partitions."""
    step = ALIGNMENT * world_size
    for _, members in groupby(sorted(parameters, key=_group), key=_group):
        yield _share(sum(parameter.numel for parameter in members), step) * step


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
    return [p for p in parameters if p.numel <= zero.option("stage3_param_persistence_threshold")]


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
    calls = buckets * (zero.world_size if name == "reduce" else 1) * times
    gathered = sum(_padded_groups(parameters, zero.world_size)) if several else 0
    groups = len({parameter.group for parameter in parameters}) if several else 0
    return [
        Collective(name, "gradients", 0 if alone else total * zero.item * times, 0 if alone else calls, zero.overlaps),
        Collective("all_gather_into_tensor", "weights", gathered * zero.item, groups, False),
    ]


def _sent_3(parameters: Sequence[Parameter], zero: Zero, accumulation: int, compiled: bool) -> list[Collective]:
    several = zero.world_size > 1
    padded = sum(_share(p.numel, zero.world_size) for p in parameters) * zero.world_size
    small = persistent(parameters, zero)
    after = sum(_share(p.numel, zero.world_size) for p in small) * zero.world_size if several else 0
    units, twice = gathers(parameters, zero, compiled)
    each = (sum(units) + twice) if several else 0
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
            "all_gather_into_tensor", "weights", each * zero.item * accumulation, 2 * len(units) * accumulation, True
        ),
        Collective("all_gather_into_tensor", "small weights", after * zero.item, len(small) if several else 0, False),
    ]


def gathers(parameters: Sequence[Parameter], zero: Zero, compiled: bool = False) -> tuple[list[int], int]:
    """What ZeRO-3 gathers in a micro-batch.

    A module's weights are let go after its forward pass, and gathered again for its backward pass, unless that comes
    within `stage3_max_reuse_distance` elements of other weights: the last modules, or all of a small network.

    Args:
        parameters: in the order of the forward pass.
        zero: settings.
        compiled: blocks are gathered whole.

    Returns:
        Elements of each gather of the forward pass, padding included; and those that are gathered once more.
    """
    small = {id(p) for p in persistent(parameters, zero)}
    modules = [list(members) for _, members in groupby(parameters, key=lambda p: _unit(p.module, compiled))]
    units = [
        sum(_share(p.numel, zero.world_size) * zero.world_size for p in module if id(p) not in small)
        for module in modules
    ]
    sizes, reach = [sum(p.numel for p in module) for module in modules], zero.option("stage3_max_reuse_distance")
    behind, twice = 0, 0
    for size, unit in zip(reversed(sizes), reversed(units), strict=True):
        if 2 * behind >= reach:  # to the end of the forward pass, and back again
            twice += unit
        behind += size
    return [unit for unit in units if unit], twice


def _unit(module: str, compiled: bool) -> str:
    """Name of what is gathered at once."""
    parts = module.split(".")
    return ".".join(parts[:2]) if compiled and parts[0] == "blocks" else module


def gathered_bytes(parameters: Sequence[Parameter], zero: Zero, compiled: bool = False) -> int:
    """Most bytes of whole weights that ZeRO-3 has on a rank at a time, beside those that stay."""
    if zero.stage != 3 or zero.world_size == 1:
        return 0
    units, _ = gathers(parameters, zero, compiled)
    return zero.item * int(min(sum(units), max(zero.option("stage3_max_live_parameters"), max(units, default=0))))


def check_zero(zero: Zero) -> None:
    """Refuse DeepSpeed's settings that are no numbers.

    Raises:
        UserError: names the key.
    """
    for key, default in DEFAULTS.items():
        value = zero.option(key)
        if isinstance(default, float) and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise UserError(f"engine.deepspeed: zero_optimization.{key} is {value!r}; give a number of elements")
