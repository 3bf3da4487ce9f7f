"""One rank of a test: the engine against a plain PyTorch loop over the same images, for many settings.

python plain_loop.py   (under a launcher's variables; rank 0 prints one JSON object per setting)
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fmscale.distributed import World, world_from_environment
from fmscale.engine.optim import AdamWEMA, ema_decay, ema_name, parameter_groups
from fmscale.engine.statistics import Look
from fmscale.engine.zero import WEIGHT, Engine, deepspeed_config, init_process_group
from fmscale.models.mmdit import MMDiT
from fmscale.models.shapes import PARTS, row_for

STEPS = 10
GLOBAL_BATCH = 16
CLIP_NORM = 0.5
DECAYS = (0.9, 0.99)
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Cell(NamedTuple):
    """One setting."""

    stage: int
    dtype: str
    accumulation: int


def make_model() -> nn.Module:
    """A small network whose output is not zero from the start."""
    torch.manual_seed(0)
    model = MMDiT(
        layers=2,
        heads=2,
        head_dim=16,
        latent_channels=4,
        patch_size=2,
        context_dim=24,
        pooled_dim=12,
        pos_embed_max_size=8,
        base_size=4,
        qk_norm=True,
        dual_attention_layers=(0,),
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else nn.init.normal_(parameter, 1, 0.05)
    return model


def inputs(step: int) -> tuple[Tensor, ...]:
    """Latents, t, context, pooled and the velocity to learn, of a whole global batch."""
    generator = torch.Generator().manual_seed(step)
    shapes = ((4, 8, 8), (), (5, 24), (12,), (4, 8, 8))
    latents, t, context, pooled, velocity = (torch.randn((GLOBAL_BATCH, *s), generator=generator) for s in shapes)
    return latents, t.sigmoid(), context, pooled, velocity


def loss_of(model: Any, images: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Sum over images of the mean squared error."""
    latents, t, context, pooled, velocity = images
    predicted = model(latents.to(dtype), t, context.to(dtype), pooled.to(dtype))
    return (predicted.float() - velocity).square().mean(dim=(1, 2, 3)).sum()


def plain(dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """fp32 weights and averages after a loop without DeepSpeed: master weights, autograd, torch's AdamW.

    Also the norm of the last step's gradient before clipping, part by part of the network in alphabetical order.
    """
    master, worker = make_model().to(dtype).float(), make_model().to(dtype)  # as DeepSpeed begins: rounded once
    optimizer = torch.optim.AdamW(parameter_groups(master, 0.1), **OPTIONS)
    averages = {decay: [p.detach().clone() for p in master.parameters()] for decay in DECAYS}
    for step in range(STEPS):
        (loss_of(worker, inputs(step), dtype) / GLOBAL_BATCH).backward()
        for ours, theirs in zip(master.parameters(), worker.parameters(), strict=True):
            ours.grad, theirs.grad = theirs.grad.float(), None
        norms = norms_by_part(master)
        nn.utils.clip_grad_norm_(master.parameters(), CLIP_NORM)
        optimizer.step()
        for decay, average in averages.items():
            for mean, weight in zip(average, master.parameters(), strict=True):
                mean.lerp_(weight.detach(), 1 - ema_decay(decay, step + 1))
        with torch.no_grad():
            for ours, theirs in zip(master.parameters(), worker.parameters(), strict=True):
                theirs.copy_(ours)
    names = [name for name, _ in master.named_parameters()]
    found = {WEIGHT: list(master.parameters()), **{ema_name(decay): average for decay, average in averages.items()}}
    places = ((f"{kind}/{name}", value) for kind, all in found.items() for name, value in zip(names, all, strict=True))
    return {place: value.detach() for place, value in places}, norms


def norms_by_part(model: nn.Module) -> Tensor:
    """Of the gradient, gathered parameter by parameter."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(row_for(name, PARTS["mmdit"]), []).append(parameter.grad.flatten())
    return torch.stack([torch.cat(parts[part]).double().norm() for part in sorted(parts)])


def make_engine(cell: Cell, world_size: int) -> Engine:
    """The network under ZeRO."""
    model = make_model()
    optimizer = AdamWEMA(parameter_groups(model, 0.1), ema_decays=DECAYS, **OPTIONS)
    micro = GLOBAL_BATCH // world_size // cell.accumulation
    return Engine(model, optimizer, deepspeed_config(cell.stage, cell.dtype, micro), CLIP_NORM)


def train_step(
    engine: Engine, cell: Cell, world: World, step: int, poison: bool = False, look: Look | None = None
) -> bool:
    """One step over this rank's images; with poison, the last rank's loss is NaN. Whether it was applied."""
    micro = GLOBAL_BATCH // world.world_size // cell.accumulation
    for m in range(cell.accumulation):
        start = (m * world.world_size + world.rank) * micro
        images = tuple(value[start : start + micro] for value in inputs(step))
        loss = loss_of(engine, images, DTYPES[cell.dtype]) * world.world_size / GLOBAL_BATCH
        if poison and world.rank == world.world_size - 1:
            loss = loss * float("nan")
        engine.backward(loss, last=m == cell.accumulation - 1)
    return engine.step(OPTIONS["lr"], look)


def sharded(cell: Cell, world: World) -> tuple[Engine, Tensor]:
    """The engine after the same steps as the plain loop's, and the norms of the last gradient's parts."""
    engine = make_engine(cell, world.world_size)
    look = Look({name: row_for(name, PARTS["mmdit"]) for name in engine.names}, world.device, histogram=True)
    for step in range(STEPS):
        assert train_step(engine, cell, world, step, look=look if step == STEPS - 1 else None)
    assert look.share().sums[:, 2:].sum() == sum(parameter.numel() for parameter in make_model().parameters())
    return engine, look.norms(engine.grad_norm)


def drops_poison(cell: Cell, world: World) -> bool:
    """Whether a step in which one rank's loss is NaN leaves no trace: as if its global batch had been left out."""
    poisoned, without = make_engine(cell, world.world_size), make_engine(cell, world.world_size)
    for step in range(5):
        applied = train_step(poisoned, cell, world, step, poison=step == 2)
        assert applied == (step != 2)
        if step != 2:
            train_step(without, cell, world, step)
    assert poisoned.updates == without.updates == 4
    return all(
        torch.equal(tensor, other.tensors[kind])
        for piece, other in zip(poisoned.pieces(), without.pieces(), strict=True)
        for kind, tensor in piece.tensors.items()
    )


@torch.no_grad()
def look_through_averages(engine: Engine, cell: Cell) -> bool:
    """Whether averaged weights change the output, and their absence restores it, and everything else, to the bit."""
    images = inputs(99)
    before = [piece.tensors[WEIGHT].clone() for piece in engine.pieces()]
    output = loss_of(engine, images, DTYPES[cell.dtype])
    with engine.averaged(ema_name(0.99)):
        other = loss_of(engine, images, DTYPES[cell.dtype])
    same = torch.equal(output, loss_of(engine, images, DTYPES[cell.dtype]))
    with suppress(LookupError), engine.averaged(ema_name(0.9)):
        raise LookupError  # as one rank alone might, so that nobody may wait for others here
    with pytest.raises(AssertionError, match="call `refresh` first"):
        engine.step(0.0)
    engine.refresh()
    same = same and torch.equal(output, loss_of(engine, images, DTYPES[cell.dtype]))
    untouched = all(torch.equal(a, p.tensors[WEIGHT]) for a, p in zip(before, engine.pieces(), strict=True))
    return same and untouched and not torch.equal(output, other)


def gather(engine: Engine) -> dict[str, Tensor]:
    """Weights and averages whole, on every rank."""
    whole = {f"{kind}/{n}": torch.zeros(s).flatten() for n, s in engine.shapes.items() for kind in kinds()}
    for piece in engine.pieces():
        for kind in kinds():
            tensor = piece.tensors[kind]
            whole[f"{kind}/{piece.name}"][piece.start : piece.start + len(tensor)] = tensor
    for tensor in whole.values():
        torch.distributed.all_reduce(tensor)
    return whole


def kinds() -> Iterator[str]:
    yield from (WEIGHT, *map(ema_name, DECAYS))


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor], kind: str) -> float:
    """Norm of the difference over the norm, of all parameters together."""
    names = [name for name in theirs if name.startswith(f"{kind}/")]
    difference = sum((ours[name] - theirs[name].flatten()).double().square().sum() for name in names)
    return float((difference / sum(theirs[name].double().square().sum() for name in names)) ** 0.5)


def main() -> None:
    world = world_from_environment()
    init_process_group(world)
    for dtype in DTYPES:
        theirs, their_norms = plain(DTYPES[dtype])
        for stage, accumulation in itertools.product((1, 2, 3), (1, 4)):
            cell = Cell(stage, dtype, accumulation)
            engine, norms = sharded(cell, world)
            restored = look_through_averages(engine, cell)
            dropped = accumulation > 1 or drops_poison(cell, world)  # tried once for each stage and dtype
            ours = gather(engine)
            row = {"world": world.world_size, **cell._asdict(), "restored": restored, "dropped": dropped}
            row["norms"] = float(((norms - their_norms) / their_norms).abs().max())
            row["weights"] = distance(ours, theirs, WEIGHT)
            row["averages"] = max(distance(ours, theirs, ema_name(decay)) for decay in DECAYS)
            if world.is_main:
                print("ROW", json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
