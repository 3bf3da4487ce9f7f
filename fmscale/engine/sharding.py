"""What ZeRO lays where, in closed form: bytes that a rank holds between steps.

DeepSpeed and torch stay out. The figures are those of DeepSpeed's own buffers, as `deepspeed_config` sets it up; tests
compare them with a real engine's, to the byte.

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
    "stage3_prefetch_bucket_size": 5e7,
    "sub_group_size": 1e9,
}
MOST_ELEMENTS = 2**63
OURS = (  # what the loop, the optimizer and the checkpoints rely on
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "amp",
    "zero_optimization.stage",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "zero_optimization.zero_hpz_partition_size",
    "zero_optimization.mics_shard_size",
    "zero_force_ds_cpu_optimizer",
    "data_types",
    "prescale_gradients",
    "gradient_predivide_factor",
)
HARMLESS = {"allgather_bucket_size", "log_trace_cache_warnings"}  # they move no byte


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

    @property
    def alone(self) -> bool:
        """Whether a rank's gradients take no way through buckets, since there is nobody to add them to."""
        return self.stage < 3 and self.world_size == 1 and not self.compact and self.offload == "none"

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
    padded = list(padded_groups(parameters, zero.world_size))
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
            found.append(Held("gradients of micro-batches", 0, touched(parameters, zero.world_size) * zero.item))
    elif not zero.gpu and not zero.compact:
        found.append(Held("gradients", MASTER_BYTES * part))  # `Tail` keeps the vector that it makes of them
    return found


def _states_3(parameters: Sequence[Parameter], zero: Zero, average_names: Sequence[str]) -> list[Held]:
    away = zero.offload == "optimizer"
    part = sum(_share(parameter.numel, zero.world_size) for parameter in parameters)
    counters = sum(_sub_groups(group, zero) for group in _groups(parameters))
    whole = sum(padded(p, zero) for p in persistent(parameters, zero))
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


def padded_groups(parameters: Iterable[Parameter], world_size: int) -> Iterable[int]:
    """Elements of each group of the optimizer, with what is added for equal partitions."""
    step = ALIGNMENT * world_size
    for group in _groups(parameters):
        yield _share(sum(parameter.numel for parameter in group), step) * step


def _groups(parameters: Iterable[Parameter]) -> list[list[Parameter]]:
    """Parameters by group of the optimizer."""
    return [list(members) for _, members in groupby(sorted(parameters, key=_group), key=_group)]


def touched(parameters: Sequence[Parameter], world_size: int) -> int:
    """Most elements of the parameters, whole, of which a rank owns any under stages 1 and 2."""
    found = [0] * world_size
    for group, padded in zip(_groups(parameters), padded_groups(parameters, world_size), strict=True):
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
    return [p for p in parameters if stays(p, zero)]


def stays(parameter: Parameter, zero: Zero) -> bool:
    return bool(parameter.numel <= zero.option("stage3_param_persistence_threshold"))


def padded(parameter: Parameter, zero: Zero) -> int:
    """Elements that are moved where ranks gather a parameter, or reduce its gradient."""
    return _share(parameter.numel, zero.world_size) * zero.world_size


def check_zero(zero: Zero) -> None:
    """Refuse settings of DeepSpeed's that bytes follow from and that make no sense, or are not the user's.

    Raises:
        UserError: names the key.
    """
    check_raw(zero.raw)
    inner = zero.raw.get("zero_optimization", {})
    if not isinstance(inner, Mapping):
        raise UserError(f"engine.deepspeed: zero_optimization is a section; give a mapping, not {inner!r}")
    for key, default in DEFAULTS.items():
        value, least = zero.option(key), 1 if key == "reduce_bucket_size" else 0
        if not isinstance(default, float) and not isinstance(value, bool | None):
            raise UserError(f"engine.deepspeed: zero_optimization.{key} is {value!r}; give true or false")
        number = isinstance(value, int | float) and not isinstance(value, bool) and least <= value < MOST_ELEMENTS
        if isinstance(default, float) and not number:
            raise UserError(
                f"engine.deepspeed: zero_optimization.{key} is {value!r}; give a number of elements from {least} on"
            )


def check_raw(raw: Mapping[str, Any], within: str = "") -> None:
    """Refuse settings of DeepSpeed's that fmscale decides.

    Args:
        raw: as in `engine.deepspeed`.
        within: the section that they are from, with a dot at its end.

    Raises:
        UserError: names the key.
    """
    for key, value in raw.items():
        if within + key in OURS:
            raise UserError(f"engine.deepspeed: {within}{key} is decided by fmscale's own settings; leave it out")
        if isinstance(value, Mapping):
            check_raw(value, f"{within}{key}.")
