"""What a phase needs is compiled before its first step, and nothing else comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import fmscale.train as train_module
from fmscale.config import TrainConfig
from fmscale.engine.metrics import read_metrics
from fmscale.train import Job, train

Make = Callable[..., TrainConfig]
SHAPES = 2  # of tokens: of three buckets two have equally many


class Compiles:
    """Counts what torch.compile compiles, forward and backward, and lets it run as it was traced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forward = self.backward = 0
        compile_with, backend = torch.compile, aot_autograd(fw_compiler=self._forward, bw_compiler=self._backward)
        monkeypatch.setattr(torch, "compile", lambda what, **how: compile_with(what, backend=backend, **how))
        torch._dynamo.reset()

    def _forward(self, graph: Any, inputs: Any) -> Any:
        self.forward += 1
        return make_boxed_func(graph)

    def _backward(self, graph: Any, inputs: Any) -> Any:
        self.backward += 1
        return make_boxed_func(graph)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "second"), [(1, {"micro_batch": 16, "engine": {"recompute": ["mlp"]}}), (3, {"flow": {"shift": 2.0}})]
)
def test_no_step_compiles_and_the_losses_are_the_same_to_the_bit(
    stage: int, second: dict[str, Any], tmp_path: Path, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiles, counts, train_step = Compiles(monkeypatch), dict[int, tuple[int, int]](), train_module.train_step

    def counted(job: Job, batches: Any, step: int, wish: Any) -> Any:
        counts[step] = compiles.forward, compiles.backward
        result = train_step(job, batches, step, wish)
        assert counts[step] == (compiles.forward, compiles.backward), f"step {step} compiled"
        return result

    phases = json.dumps([{"until_step": 4}, second])
    settings = ("steps=8", "model.layers=1", "engine.compile=true", f"engine.zero_stage={stage}", f"phases={phases}")
    told = []
    for ahead in (True, False):
        config = make_config(tmp_path / str(ahead), *settings)
        with monkeypatch.context() as patch:
            if ahead:
                patch.setattr(train_module, "train_step", counted)
            else:
                patch.setattr(train_module, "compile_ahead", lambda job, start: None)
            train(config)
        records = read_metrics(config.run_dir / "metrics.jsonl")
        told.append([(record["bucket"], record["loss"], record["grad_norm"]) for record in records])
    later = 2 * SHAPES if stage == 1 else SHAPES  # the other phase is of the same shapes
    assert counts == {step: (SHAPES, SHAPES) if step < 4 else (later, later) for step in range(8)}
    assert len({bucket for bucket, *_ in told[0]}) == 3
    assert told[0] == told[1]
