"""How large things are: a network's checkpoints, and what ranks tell one another; torch stays out."""

from __future__ import annotations

from fmscale.config import ModelConfig, TrainConfig
from fmscale.models.shapes import weights_of
from fmscale.phases import Phase, phases_of

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
    phases = phases_of(config)
    parts = [phase.config.checkpoint for phase in phases]
    saves = sum(_times(phase, part.every_steps) for phase, part in zip(phases, parts, strict=True))
    saves += config.steps % parts[-1].every_steps > 0  # the last step saves too
    forever = sum(_times(phase, part.keep_every_steps) for phase, part in zip(phases, parts, strict=True))
    snapshots = sum(_times(phase, phase.config.ema.snapshot_every_steps) for phase in phases)
    return min(max(part.keep for part in parts) + forever, saves) + 1, snapshots


def sheets(config: TrainConfig) -> int:
    """Images of samples that a run writes."""
    return sum(_times(phase, phase.config.log.images_every_steps) for phase in phases_of(config))


def _times(phase: Phase, every: int | None) -> int:
    """How often something is due that is done after every so many steps of a run."""
    return phase.until // every - phase.start // every if every else 0


def _copy_bytes(config: TrainConfig) -> int:
    return 4 * parameters(config.model)


def tally_values(world_size: int) -> int:
    """Elements of the vector that ranks sum in each step, a `Tally`."""
    return TALLY_HEAD + 3 * BINS + world_size
