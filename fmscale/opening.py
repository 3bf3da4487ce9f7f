"""The first lines that `plan` and `train` say of a run, so that one can lay them beside one another."""

from __future__ import annotations

from collections.abc import Iterable

from fmscale.config import TrainConfig
from fmscale.data.order import Split
from fmscale.size import parameters


def opening(config: TrainConfig, name: str, buckets: Iterable[tuple[str, int]], cut: Split) -> list[str]:
    """Model, data and batch, in a line each.

    Args:
        config: of a phase.
        name: of its data.
        buckets: name and samples of each.
        cut: how a global batch falls to ranks and micro-batches.
    """
    buckets = list(buckets)
    padding = cut.world_size * cut.accumulation * cut.micro_batch - cut.global_batch
    shown, samples = ", ".join(f"{each} ({count:,})" for each, count in buckets), sum(count for _, count in buckets)
    engine = f"{config.engine.dtype}, ZeRO-{config.engine.zero_stage}"
    return [
        f"model    {config.model.family}, {parameters(config.model):,} parameters, {engine}",
        f"data     {name}, {samples:,} samples in buckets {shown}",
        f"batch    {cut.global_batch} images = {cut.world_size} ranks x {cut.accumulation} accumulation x "
        f"{cut.micro_batch} micro-batch{f', {padding} slots empty' if padding else ''}",
    ]
