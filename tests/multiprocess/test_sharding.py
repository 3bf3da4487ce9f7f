"""What the closed forms say that ranks hold and send, against real engines and real steps, to the byte; and peaks."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fmscale.config import TrainConfig, check
from fmscale.data.order import split
from fmscale.planning.laid_out import zero_of
from fmscale.planning.memory import held, memory_of
from fmscale.planning.pace import traffic
from fmscale.planning.stock import stock_of

PROGRAM = Path(__file__).parent / "held_and_sent.py"
STEPS = 6
MICRO_BATCH = 2
DECAYS = (0.9, 0.99)
BUCKETS = (20_000, 200_000, 50_000)  # elements, by averages: less and more than the network has
GATHER, CALLS = "all_gather_into_tensor", 2  # where ZeRO-3 looks ahead less than a module's weights one may be missed
PEAK = (0.85, 1.35)  # of what is there for a while, planned over real, in networks of few gradients


FLUX = {"family": "flux", "layers": 2, "single_layers": 2, "rope_dims": [4, 6, 6]}


class Cell(NamedTuple):
    """One setting.

    Attributes:
        stage, dtype, averages, accumulation: of the run.
        inner: settings of DeepSpeed's ZeRO.
        offload: `optimizer` keeps its state in host memory.
        family: of the network.
    """

    stage: int
    dtype: str
    averages: int
    accumulation: int
    inner: dict[str, Any]
    offload: str = "none"
    family: str = "mmdit"


GRID = [
    Cell(stage, dtype, averages, 1 + number % 2, {"reduce_bucket_size": BUCKETS[averages]})
    for number, (stage, dtype, averages) in enumerate(itertools.product((1, 2, 3), ("bf16", "fp32"), (0, 1, 2)))
]
OFTEN, ALL_TO_ALL = {"reduce_bucket_size": 20_000}, {"use_multi_rank_bucket_allreduce": True}
NEAR = {"stage3_max_reuse_distance": 40_000, "stage3_prefetch_bucket_size": 0}
AHEAD = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 50_000}
OTHER = [
    *(Cell(stage, dtype, 1, 2, OFTEN) for stage, dtype in ((1, "fp32"), (2, "bf16"))),
    *(Cell(stage, "bf16", 1, 2, OFTEN | ALL_TO_ALL) for stage in (1, 2)),
    *(Cell(3, "bf16", 1, 1, OFTEN | reach, family=family) for reach in (NEAR, AHEAD) for family in ("mmdit", "flux")),
    Cell(3, "bf16", 1, 2, OFTEN | {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}),
    *(Cell(3, "fp32", 1, 1, OFTEN | {"stage3_param_persistence_threshold": size}) for size in (0, 100_000)),
    Cell(3, "fp32", 1, 1, OFTEN | {"sub_group_size": 5_000}),
    *(Cell(stage, dtype, 1, 2, OFTEN, "optimizer") for stage in (1, 2, 3) for dtype in ("bf16", "fp32")),
    Cell(2, "fp32", 1, 1, OFTEN, "optimizer"),
]
WORLDS = {1: GRID, 2: GRID, 3: OTHER, 4: GRID}


def config_of(cell: Cell, make_config: Callable[..., TrainConfig], folder: Path, world_size: int) -> TrainConfig:
    """A short run of a setting."""
    inner = {"stage3_param_persistence_threshold": 1000, **cell.inner} if cell.stage == 3 else cell.inner
    config = make_config(
        folder,
        f"steps={STEPS}",
        f"global_batch={MICRO_BATCH * world_size * cell.accumulation}",
        f"micro_batch={MICRO_BATCH}",
        f"ema.decays={json.dumps(DECAYS[: cell.averages])}",
        f"engine.zero_stage={cell.stage}",
        f"engine.dtype={cell.dtype}",
        f"engine.offload={cell.offload}",
        f"engine.deepspeed={json.dumps({'zero_optimization': inner})}",
        f"checkpoint.every_steps={100 * STEPS}",
        f"log.every_steps={100 * STEPS}",  # nothing is gathered for the log
    )
    if cell.family == "mmdit":
        return config
    data = config.model_dump(mode="json")
    kept = {key: data["model"][key] for key in ("heads", "head_dim", "latent_channels", "context_dim", "pooled_dim")}
    return check(TrainConfig, data | {"model": kept | FLUX}, "test")


def expected(config: TrainConfig, world_size: int) -> tuple[int, dict[str, int], int]:
    """Bytes that a rank holds, bytes that a step sends by function, and calls that gather."""
    zero = zero_of(config, world_size, gpu=False)
    accumulation = split(config.global_batch, world_size, config.micro_batch).accumulation
    sent, calls = Counter[str](), Counter[str]()
    for collective in traffic(config, zero, accumulation):
        sent[collective.name] += collective.payload
        calls[collective.name] += collective.calls
    states = sum(part.device + part.host for part in held(config, zero, accumulation).states)
    return states, dict(+sent), calls[GATHER]


def rows_of(output: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("ROW ")) for line in output.splitlines() if line.startswith("ROW ")]


def differences(config: TrainConfig, world_size: int, ranks: Sequence[dict[str, Any]]) -> list[str]:
    """Where what ranks held and sent is not what the closed form says."""
    held, sent, calls = expected(config, world_size)
    blocks = max((rank["held"] for rank in ranks), key=lambda blocks: sum(block[0] for block in blocks))
    found = []
    if (real := sum(block[0] for block in blocks)) != held:
        found.append(f"held {real:,}, not {held:,}: {blocks}")
    steps = [step for rank in ranks for step in rank["sent"]]
    assert len(steps) == 2 * world_size
    for step in steps:
        moved = {name: size for name, size in step.items() if not name.startswith("calls of ")}
        found += [] if moved == sent else [f"sent {moved}, not {sent}"]
        real = step.get(f"calls of {GATHER}", 0)
        found += [] if abs(real - calls) <= CALLS else [f"gathered in {real} calls, not {calls}"]
    return found


def wrong_peaks(config: TrainConfig, world_size: int, ranks: Sequence[dict[str, Any]]) -> list[str]:
    """Where what came and went in a step is not about what the closed form says, by bucket."""
    cut, stock = split(config.global_batch, world_size, config.micro_batch), stock_of(config)
    base = held(config, zero_of(config, world_size, gpu=False), cut.accumulation)
    most = Counter[tuple[int, int]]()
    for height, width, peak in (peak for rank in ranks for peak in rank["peaks"]):
        most[height, width] = max(most[height, width], peak)
    assert most
    found = []
    for shape in (shape for shape in stock.shapes if shape[:2] in most):
        planned = memory_of(config, base, shape, stock.text_tokens, cut.micro_batch)
        real, told = most[shape[:2]], planned.total - base.device
        if not PEAK[0] < told / real < PEAK[1]:
            found.append(f"{shape.name}: {told:,} of {real:,}: {planned}")
    return found


@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4))])
def test_ranks_hold_and_send_what_the_closed_form_says(
    world_size: int,
    make_config: Callable[..., TrainConfig],
    run_ranks: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    cells = WORLDS[world_size]
    configs = [config_of(cell, make_config, tmp_path / str(n), world_size) for n, cell in enumerate(cells)]
    outputs = run_ranks(world_size, PROGRAM, json.dumps([config.model_dump(mode="json") for config in configs]))
    rows = list(zip(*map(rows_of, outputs), strict=True))
    assert len(rows) == len(cells)
    wrong = [
        f"{cell}: {line}"
        for cell, config, ranks in zip(cells, configs, rows, strict=True)
        for line in (*differences(config, world_size, ranks), *wrong_peaks(config, world_size, ranks))
    ]
    assert not wrong, "\n".join(wrong)
