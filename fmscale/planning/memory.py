"""Memory of a GPU at its fullest, part by part, in closed form.

Activations go as gradients come. So a step is fullest at one of four moments: as a backward pass begins; as its first
gradients are reduced, for which buffers are made; as it ends, with the largest gradients; or as weights are updated.
"""

from __future__ import annotations

from typing import NamedTuple

from fmscale.config import TrainConfig
from fmscale.engine.sharding import ITEM_BYTES, Held, Zero, states
from fmscale.engine.transient import Gathered, Gradients, gathered, gradients
from fmscale.models.activations import activations
from fmscale.planning.laid_out import average_names, parameters_of
from fmscale.planning.stock import Shape

MOST_IMAGES = 1 << 16  # of a micro-batch that is looked for
BEGIN, REDUCE, END, UPDATE = "begin", "reduce", "end", "update"


class Memory(NamedTuple):
    """A rank's memory at its fullest.

    Attributes:
        parts: bytes by name.
        moment: `begin`, `reduce` or `end` of the backward pass, or `update`.
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
        gathered: weights of ZeRO-3.
        gradients: beside the states.
        gpu: ranks have one each.
    """

    states: tuple[Held, ...]
    gathered: Gathered
    gradients: Gradients
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
    return Base(
        tuple(states(parameters, zero, average_names(config), accumulation)),
        gathered(parameters_of(config.model, as_they_run=True), zero, config.engine.compile),
        gradients(parameters, zero, accumulation),
        zero.gpu,
    )


def memory_of(config: TrainConfig, base: Base, shape: Shape, text_tokens: int, images: int) -> Memory:
    """Memory in steps of a bucket.

    Args:
        config: of a phase.
        base: what does not depend on the bucket.
        shape: the bucket.
        text_tokens: of a caption.
        images: of a micro-batch.
    """
    item, part, own = ITEM_BYTES[config.engine.dtype], config.engine, base.gradients
    sizes = shape.height, shape.width, text_tokens, images, item
    found = activations(config.model.model_dump(), *sizes, part.recompute_every, part.recompute, fused_norm=base.gpu)
    left = found.start + round((1 - own.share) * (found.saved - found.start))

    def passing(moment: str, gradients: int, weights: int, activations: int, working: int) -> Memory:
        parts = {"gradients": gradients, "buckets": own.buckets, "gathered": weights, "activations": activations}
        return Memory({"states": base.device, **parts, "at work": working}, moment)

    moments = [
        passing(BEGIN, own.before, base.gathered.most, found.saved, found.transient),
        passing(REDUCE, own.reduced, base.gathered.most, left, found.transient if own.share < 1 else 0),
        passing(END, own.after, base.gathered.after, found.start, 0),
        Memory({"states": base.device, "gradients": own.update}, UPDATE),
    ]
    return max(moments, key=lambda memory: memory.total)


def largest_micro_batch(config: TrainConfig, base: Base, shape: Shape, text_tokens: int, usable: float) -> int:
    """Most images of a micro-batch that fit, with as many micro-batches in the step; 0 where none does.

    Args:
        config, base, shape, text_tokens: as of `memory_of`.
        usable: bytes.
    """
    low, high = 0, MOST_IMAGES
    while low < high:
        middle = (low + high + 1) // 2
        fits = memory_of(config, base, shape, text_tokens, middle).total <= usable
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
