"""How long a step takes: matrix products, attention and what only moves memory, the update, and what is sent.

Each term is work over a rate of `Rates`. What is sent while a backward pass computes costs only what outlasts it.
Not in the figures: ranks that differ, a network that others use too, and data that come late.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fmscale.config import TrainConfig
from fmscale.data.order import Split
from fmscale.engine.collectives import Collective, collectives
from fmscale.engine.sharding import ITEM_BYTES, Zero
from fmscale.models.activations import activations
from fmscale.models.flops import FLOPS, Flops
from fmscale.planning.devices import CALL_S, HOST_GB_PER_S, Cluster
from fmscale.planning.laid_out import parameters_of
from fmscale.planning.stock import Shape
from fmscale.size import tally_values

# How often a byte that is kept for the backward pass goes through memory outside of matrix products, in both passes
# together: with compiled blocks, a half of an H100's peak at 512 px; without, 1.5 times that time.
COMPILED_PASSES, EAGER_PASSES = 5, 14
UPDATE_BYTES, AVERAGE_BYTES = 44, 12  # that an update reads and writes of each element: AdamW and norm; each average
BACKWARD_SHARE = 2 / 3  # of a micro-batch's time
# Products of a part that recomputes, in squares of the width for each token; the last one of an MLP is not needed.
PARTS = {"mlp": 4, "qkv": 3, "dual": 4}


class StepTime(NamedTuple):
    """Seconds of a step.

    Attributes:
        compute: forward and backward of images.
        empty: the same of slots that hold none.
        update: of weights, moments and averages.
        sent: by what is sent that the device waits for.
        hidden: what is sent while the device computes.
    """

    compute: float
    empty: float
    update: float
    sent: float
    hidden: float

    @property
    def total(self) -> float:
        """All that the device does or waits for."""
        return self.compute + self.empty + self.update + self.sent

    @property
    def limit(self) -> str:
        """What costs most beside the computing, where that is more than a hundredth."""
        rest = {"traffic": self.sent, "update": self.update, "empty slots": self.empty}
        name = max(rest, key=lambda key: rest[key])
        return name if rest[name] > 0.01 * self.total else "compute"


def flops_of(config: TrainConfig, shape: Shape, text_tokens: int) -> Flops:
    """Of an image of a bucket."""
    model = config.model
    every = config.engine.recompute_every
    return FLOPS[model.family](model.model_dump(), shape.height, shape.width, text_tokens, every)


def tokens_of(config: TrainConfig, shape: Shape) -> int:
    """Image tokens of a bucket."""
    return (shape.height // config.model.patch_size) * (shape.width // config.model.patch_size)


def image_s(config: TrainConfig, shape: Shape, text_tokens: int, cluster: Cluster) -> float:
    """Seconds of the forward and backward pass of an image.

    Args:
        config: of a phase.
        shape: its bucket.
        text_tokens: of its caption.
        cluster: with rates.
    """
    assert cluster.rates is not None
    rates, part, model = cluster.rates, config.engine, config.model
    flops, tokens = flops_of(config, shape, text_tokens), tokens_of(config, shape) + text_tokens
    products = (flops.train_step - flops.attention) / rates.gemm
    between = flops.attention / rates.attention
    again = flops.recomputation * (products + between) / flops.train_step
    kept = model.layers - (-(-model.layers // part.recompute_every) if part.recompute_every else 0)
    width = model.heads * model.head_dim
    again += sum(2 * PARTS.get(name, 0) * tokens * kept * width**2 for name in part.recompute) / rates.gemm
    sizes = shape.height, shape.width, text_tokens
    moved = activations(model.model_dump(), *sizes, 1, ITEM_BYTES[part.dtype]).saved
    passes = COMPILED_PASSES if part.compile else EAGER_PASSES
    return products + between + again + passes * moved / rates.copy


def sent_s(collective: Collective, cluster: Cluster, world_size: int) -> float:
    """Seconds that a collective takes, all its calls together."""
    if not collective.payload:
        return 0.0
    latency = cluster.latency_s(world_size)
    # To one rank each: the next begins while the last ranks still wait for the one before.
    waits = CALL_S * collective.calls + latency if collective.name == "reduce" else latency * collective.calls
    return collective.wire(world_size) / cluster.ring(world_size) + waits


def traffic(config: TrainConfig, zero: Zero, accumulation: int) -> list[Collective]:
    """What a step sends.

    Args:
        config: of a phase.
        zero: its settings.
        accumulation: micro-batches in a step.
    """
    parameters = parameters_of(config.model, as_they_run=True)
    return collectives(parameters, zero, accumulation, tally_values(zero.world_size), config.engine.compile)


def step_time(
    seconds: float, split: Split, total: int, sending: Sequence[Collective], zero: Zero, cluster: Cluster
) -> StepTime:
    """How long a step takes.

    Args:
        seconds: of the forward and backward pass of an image, from `image_s`.
        split: of the global batch.
        total: parameters of the network.
        sending: in a step.
        zero: settings.
        cluster: with rates.
    """
    assert cluster.rates is not None
    micro = split.micro_batch * seconds
    slots = split.accumulation * micro
    full = seconds * split.global_batch / split.world_size
    moved = total / zero.world_size * (UPDATE_BYTES + AVERAGE_BYTES * zero.averages)
    host = HOST_GB_PER_S * 1e9 if zero.gpu and zero.offload == "optimizer" else cluster.rates.copy
    times = [sent_s(each, cluster, zero.world_size) for each in sending]
    hidden = sum(time for each, time in zip(sending, times, strict=True) if each.overlaps)
    room = BACKWARD_SHARE * (micro if zero.stage == 1 else slots)
    waited = sum(times) - min(hidden, room)
    return StepTime(full, slots - full, moved / host, waited, min(hidden, room))
