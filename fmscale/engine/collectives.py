"""What ZeRO sends, in closed form: bytes of a step's collectives; tests compare them with a real step's, to the byte.

Source: as of `sharding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fmscale.engine.gathering import Gathers, gathers
from fmscale.engine.sharding import Parameter, Zero, padded, padded_groups, persistent


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
    buckets = max(1, round(total / zero.option("reduce_bucket_size")))
    name = "all_reduce" if zero.option("use_multi_rank_bucket_allreduce") else "reduce"
    calls = (buckets + (zero.world_size - 1 if name == "reduce" else 0)) * times
    payload, calls = (0, 0) if zero.alone else (total * zero.item * times, calls)
    gathered = sum(padded_groups(parameters, zero.world_size)) if several else 0
    groups = len({parameter.group for parameter in parameters}) if several else 0
    return [
        Collective(name, "gradients", payload, calls, zero.overlaps),
        Collective("all_gather_into_tensor", "weights", gathered * zero.item, groups, False),
    ]


def _sent_3(parameters: Sequence[Parameter], zero: Zero, accumulation: int, compiled: bool) -> list[Collective]:
    several = zero.world_size > 1
    total, small = sum(padded(p, zero) for p in parameters), persistent(parameters, zero)
    after = sum(padded(p, zero) for p in small) if several else 0
    each = gathers(parameters, zero, compiled) if several else Gathers(0, 0, 0, 0, 0)
    buckets = max(1, round(total / zero.option("reduce_bucket_size")))
    return [
        Collective(
            "reduce_scatter_tensor",
            "gradients",
            total * zero.item * accumulation,
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
