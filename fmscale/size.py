"""How large things are: a network's checkpoints, and what ranks tell one another; torch stays out."""

from __future__ import annotations

from fmscale.config import ModelConfig, TrainConfig
from fmscale.models.shapes import weights_of

BINS = 10  # equal parts of t's range
TALLY_HEAD = 5  # what a tally counts beside them


def parameters(model: ModelConfig) -> int:
    """Parameters of a network."""
    return sum(weight.numel for weight in weights_of(model.model_dump()))


def checkpoint_bytes(config: TrainConfig) -> int:
    """Bytes of a checkpoint: weights, two moments and each average, in fp32."""
    return (3 + len(config.ema.decays)) * _copy_bytes(config) + snapshot_bytes(config)


def snapshot_bytes(config: TrainConfig) -> int:
    """Bytes of a snapshot: each average by relative width, in fp32."""
    return len(config.ema.sigma_rels) * _copy_bytes(config)


def saves_kept(config: TrainConfig) -> tuple[int, int]:
    """Checkpoints that lie in a run directory at the most, the one that is being written among them; and snapshots."""
    part, snapshot = config.checkpoint, config.ema.snapshot_every_steps
    saves = -(-config.steps // part.every_steps)
    forever = config.steps // part.keep_every_steps if part.keep_every_steps else 0
    return min(part.keep + forever, saves) + 1, config.steps // snapshot if snapshot else 0


def _copy_bytes(config: TrainConfig) -> int:
    return 4 * parameters(config.model)


def tally_values(world_size: int) -> int:
    """Elements of the vector that ranks sum in each step, a `Tally`."""
    return TALLY_HEAD + 3 * BINS + world_size
