"""One rank of a test: optimizer state in host memory against on the device, for each stage and dtype.

python offloaded.py   (under a launcher's variables; rank 0 prints one JSON object per setting)
"""

from __future__ import annotations

import itertools
import json

import torch
from plain_loop import (
    CLIP_NORM,
    DECAYS,
    DTYPES,
    GLOBAL_BATCH,
    OPTIONS,
    Cell,
    distance,
    gather,
    inputs,
    kinds,
    look_through_averages,
    make_model,
    train_step,
)

from fmscale.distributed import World, world_from_environment
from fmscale.engine.optim import AdamWEMA, parameter_groups
from fmscale.engine.zero import Engine, deepspeed_config, init_process_group

STEPS = 4
POISONED = 2


def trained(cell: Cell, world: World, offload: str) -> Engine:
    """The engine after some steps, one of which was dropped, with every second weight of a parameter written to."""
    model = make_model()
    optimizer = AdamWEMA(parameter_groups(model, 0.1), ema_decays=DECAYS, **OPTIONS)
    micro = GLOBAL_BATCH // world.world_size // cell.accumulation
    engine = Engine(model, optimizer, deepspeed_config(cell.stage, cell.dtype, micro, offload), CLIP_NORM)
    for step in range(STEPS):
        if step == STEPS - 1:
            for piece in engine.pieces():
                piece.tensors["weight"][::2] *= 0.5
            engine.refresh()
        assert train_step(engine, cell, world, step, poison=step == POISONED) == (step != POISONED)
    assert engine.updates == STEPS - 1
    return engine


@torch.no_grad()
def output(engine: Engine, cell: Cell) -> torch.Tensor:
    """What the network says of some images."""
    latents, t, context, pooled, _ = (value.to(DTYPES[cell.dtype]) for value in inputs(99))
    return engine(latents, t.float(), context, pooled).float()


def main() -> None:
    world = world_from_environment()
    init_process_group(world)
    for dtype, stage, accumulation in itertools.product(DTYPES, (1, 2, 3), (1, 4)):
        cell = Cell(stage, dtype, accumulation)
        here, there = trained(cell, world, "none"), trained(cell, world, "optimizer")
        row = {"world": world.world_size, **cell._asdict()}
        row["offloads"] = there.zero.offload_optimizer if stage == 3 else there.zero.cpu_offload
        row["output"] = float((output(here, cell) - output(there, cell)).norm() / output(here, cell).norm())
        row["restored"] = look_through_averages(there, cell)
        ours, theirs = gather(there), gather(here)
        row["state"] = max(distance(ours, theirs, kind) for kind in kinds())
        if world.is_main:
            print("ROW", json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
