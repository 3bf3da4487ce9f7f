"""Optimizer state in host memory trains the same run: ZeRO 1, 2, 3 x fp32, bf16 x accumulation 1, 4 x 1, 2 ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "offloaded.py"
TOLERANCE = {"fp32": 1e-6, "bf16": 1e-3}  # relative; DeepSpeed adds micro-batches up in another order and dtype


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_offloaded_state_trains_as_state_on_the_device(run_ranks: Callable[..., list[str]], world_size: int) -> None:
    output = run_ranks(world_size, PROGRAM)[0]
    rows = [json.loads(line.removeprefix("ROW ")) for line in output.splitlines() if line.startswith("ROW ")]
    assert len(rows) == 12
    for row in rows:
        assert row["offloads"], row
        assert row["state"] <= TOLERANCE[row["dtype"]], row
        assert row["output"] <= 2 * TOLERANCE[row["dtype"]], row
        assert row["restored"], row  # a look through averaged weights left no trace
        print(row)
