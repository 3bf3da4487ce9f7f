"""Memory of a GPU at its fullest, part by part, in closed form.

A step is fullest at one of two moments: as a backward pass begins, with all activations; or as weights are updated,
with all gradients. In between one goes as the other comes.
"""

from __future__ import annotations

from typing import NamedTuple

from fmscale.config import TrainConfig
from fmscale.data.order import Split
from fmscale.engine.sharding import (
    ITEM_BYTES,
    MASTER_BYTES,
    Held,
    Zero,
    bucket_bytes,
    gathered_bytes,
    states,
)
from fmscale.models.activations import activations
from fmscale.planning.laid_out import average_names, parameters_of
from fmscale.planning.stock import Shape

MOST_IMAGES = 1 << 16  # of a micro-batch that is looked for
BACKWARD, UPDATE = "backward", "update"


class Memory(NamedTuple):
    """A rank's memory at its fullest.

    Attributes:
        parts: bytes by name.
        moment: `backward` or `update`.
    """

    parts: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


class Base(NamedTuple):
    """What does not depend on the bucket.

    Attributes:
        states: between steps.
        buckets: that gradients are reduced through.
        gathered: weights of ZeRO-3 that are whole for a while.
        gradients: beside the states, whole.
        flat: one more copy of a rank's own gradients, in fp32, as weights are updated.
        gpu: ranks have one each.
    """

    states: tuple[Held, ...]
    buckets: int
    gathered: int
    gradients: int
    flat: int
    gpu: bool

    @property
    def device(self) -> int:
        """Bytes of the states that are on the device."""
        return sum(held.device for held in self.states)

    @property
    def host(self) -> int:
        """Bytes of the states that are in the host's memory."""
        return sum(held.host for held in self.states)


def held(config: TrainConfig, zero: Zero, accumulation: int) -> Base:
    """What a rank holds whatever the bucket is.

    Args:
        config: of a phase.
        zero: its settings.
        accumulation: micro-batches in a step.
    """
    parameters = parameters_of(config.model)
    total = sum(parameter.numel for parameter in parameters)
    part = MASTER_BYTES * -(-total // zero.world_size)
    alone = zero.stage < 3 and zero.offload == "none"
    gradients = {1: total * zero.item, 2: part if zero.compact else part * zero.item // MASTER_BYTES, 3: 0}[zero.stage]
    return Base(
        tuple(states(parameters, zero, average_names(config), accumulation)),
        bucket_bytes(zero),
        gathered_bytes(parameters_of(config.model, as_they_run=True), zero, config.engine.compile),
        gradients if alone or zero.stage == 1 else 0,
        part if alone and zero.gpu and not zero.compact else 0,
        zero.gpu,
    )


def memory_of(config: TrainConfig, base: Base, shape: Shape, text_tokens: int, cut: Split) -> Memory:
    """Memory in steps of a bucket.

    Args:
        config: of a phase.
        base: what does not depend on the bucket.
        shape: the bucket.
        text_tokens: of a caption.
        cut: images of a micro-batch, and micro-batches of a step.
    """
    item, part = ITEM_BYTES[config.engine.dtype], config.engine
    sizes = shape.height, shape.width, text_tokens, cut.micro_batch, item
    found = activations(config.model.model_dump(), *sizes, part.recompute_every, part.recompute, fused_norm=base.gpu)
    backward = {
        "states": base.device,
        "gradients": base.gradients if cut.accumulation > 1 else 0,
        "buckets": base.buckets + base.gathered,
        "activations": found.saved,
        "at work": found.transient,
    }
    update = {"states": base.device, "gradients": base.gradients + base.flat}
    if sum(update.values()) > sum(backward.values()):
        return Memory(update, UPDATE)
    return Memory(backward, BACKWARD)


def largest_micro_batch(config: TrainConfig, base: Base, shape: Shape, text_tokens: int, usable: float) -> int:
    """Most images of a micro-batch that fit, with another micro-batch in the step; 0 where none does.

    Args:
        config, base, shape, text_tokens: as of `memory_of`.
        usable: bytes.
    """
    low, high = 0, MOST_IMAGES
    while low < high:
        middle = (low + high + 1) // 2
        fits = memory_of(config, base, shape, text_tokens, Split(2 * middle, 1, middle, 2)).total <= usable
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
