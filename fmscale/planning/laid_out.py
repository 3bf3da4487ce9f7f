"""A config as ZeRO sees it."""

from __future__ import annotations

from functools import lru_cache

from fmscale.config import NetworkConfig, TrainConfig
from fmscale.engine.sharding import Parameter, Zero
from fmscale.models.shapes import in_forward_order, weights_of


def average_names(config: TrainConfig) -> list[str]:
    """Of each copy of the weights that is averaged."""
    part = config.ema
    widths = (f"average of width {width:g}" for width in part.sigma_rels)
    return [*(f"average {decay:g}" for decay in part.decays), *widths]


def zero_of(config: TrainConfig, world_size: int, gpu: bool) -> Zero:
    """What bytes follow from.

    Args:
        config: of a phase.
        world_size: ranks.
        gpu: they have one each.
    """
    part, averages = config.engine, len(average_names(config))
    return Zero(part.zero_stage, part.dtype, part.offload, averages, world_size, gpu, part.deepspeed)


@lru_cache(maxsize=8)
def parameters_of(model: NetworkConfig, as_they_run: bool = False) -> tuple[Parameter, ...]:
    """What ZeRO sees of a network's parameters; those without weight decay are the optimizer's second group.

    Args:
        model: section of a config.
        as_they_run: in the order of the forward pass, and not in the network's own.
    """
    weights = weights_of(model.model_dump())
    weights = in_forward_order(weights) if as_they_run else weights
    return tuple(Parameter(weight.module, weight.numel, int(not weight.decays)) for weight in weights)
