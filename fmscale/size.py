"""How large a network and its checkpoints are, in closed form: nothing is built, and torch stays out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fmscale.config import FluxConfig, MMDiTConfig, TrainConfig

TIMESTEP_FEATURES = 256


def mmdit_parameters(model: MMDiTConfig) -> int:
    """Parameters of an `MMDiT`."""
    width, patch = model.heads * model.head_dim, model.latent_channels * model.patch_size**2
    square = width**2
    attention = 4 * square + 4 * width + (2 * model.head_dim if model.qk_norm else 0)  # queries, keys, values, output
    stream = (6 * square + 6 * width) + attention + (8 * square + 5 * width)  # modulation, attention, MLP
    last = (2 * square + 2 * width) + attention - (square + width)
    dual = (3 * square + 3 * width) + attention
    blocks = (2 * model.layers - 1) * stream + last + len(set(model.dual_attention_layers)) * dual
    told = [TIMESTEP_FEATURES] * (1 + model.leap_embed)
    return blocks + _ends(width, patch, model.context_dim, *told, model.pooled_dim)


def flux_parameters(model: FluxConfig) -> int:
    """Parameters of a `Flux`."""
    width, patch = model.heads * model.head_dim, model.latent_channels * model.patch_size**2
    square, norms = width**2, 2 * model.head_dim
    stream = (6 * square + 6 * width) + (4 * square + 4 * width + norms) + (8 * square + 5 * width)
    single = (3 * square + 3 * width) + (7 * square + 7 * width + norms) + (5 * square + width)
    told = [TIMESTEP_FEATURES] * (1 + model.guidance_embed + model.leap_embed)
    blocks = 2 * model.layers * stream + model.single_layers * single
    return blocks + _ends(width, patch, model.context_dim, *told, model.pooled_dim)


def _ends(width: int, patch: int, context_dim: int, *conditions: int) -> int:
    """Parameters before the blocks and behind them."""
    embeddings = _linear(patch, width) + _linear(context_dim, width)
    embeddings += sum(_linear(given, width) + _linear(width, width) for given in conditions)
    return embeddings + _linear(width, 2 * width) + _linear(width, patch)


def _linear(given: int, out: int) -> int:
    return given * out + out


PARAMETERS: dict[str, Callable[[Any], int]] = {"mmdit": mmdit_parameters, "flux": flux_parameters}


def checkpoint_bytes(config: TrainConfig) -> int:
    """Bytes of a checkpoint: weights, two moments and each average, in fp32."""
    return (3 + len(config.ema.decays)) * _copy_bytes(config) + snapshot_bytes(config)


def snapshot_bytes(config: TrainConfig) -> int:
    """Bytes of a snapshot: each average by relative width, in fp32."""
    return len(config.ema.sigma_rels) * _copy_bytes(config)


def _copy_bytes(config: TrainConfig) -> int:
    return 4 * PARAMETERS[config.model.family](config.model)
