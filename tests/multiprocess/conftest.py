"""Real ranks: processes that find one another over gloo."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from forked import start

from fmscale.config import TrainConfig
from fmscale.distributed import World, free_port, rank_environment

PROGRAM = Path(__file__).parent / "train_many.py"
TIMEOUT_S = 300


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Runs a program on so many ranks, with arguments; returns what each of them printed."""

    def run(world_size: int, program: Path, *arguments: str) -> list[str]:
        port, folder = free_port(), tmp_path_factory.mktemp("ranks")
        outputs = [folder / f"{rank}.txt" for rank in range(world_size)]
        ranks = [
            start(
                program,
                arguments,
                rank_environment(World(rank, rank, world_size), "127.0.0.1", port)
                | {"OMP_NUM_THREADS": "1"},  # ranks that share cores wait for one another at every barrier
                output,
            )
            for rank, output in enumerate(outputs)
        ]
        deadline = time.monotonic() + TIMEOUT_S
        try:
            for rank in ranks:
                rank.join(deadline - time.monotonic())
        finally:
            for rank in ranks:
                rank.kill()
        for rank, output in zip(ranks, outputs, strict=True):
            rank.join()
            assert rank.exitcode == 0, output.read_text()[-3000:]
        return [output.read_text() for output in outputs]

    return run


@pytest.fixture(scope="session")
def train_many(run_ranks: Callable[..., list[str]]) -> Callable[[int, Sequence[TrainConfig]], None]:
    """Trains each config, one after another, on the same processes."""

    def run(world_size: int, configs: Sequence[TrainConfig]) -> None:
        run_ranks(world_size, PROGRAM, json.dumps([config.model_dump(mode="json") for config in configs]))

    return run


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], dict[int, float]]:
    """Reads a run's losses by step, and makes sure that each step stands there once and in order."""

    def read(run_dir: Path) -> dict[int, float]:
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == list(range(1, len(records) + 1))
        return {record["step"]: record["loss"] for record in records}

    return read
