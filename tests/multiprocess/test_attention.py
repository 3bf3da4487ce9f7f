from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "attend_apart.py"


def test_ranks_that_would_disagree_take_the_kernel_of_the_first(
    tmp_path: Path, run_ranks: Callable[..., list[str]]
) -> None:
    first, second = (json.loads(output.splitlines()[-1]) for output in run_ranks(2, PROGRAM, str(tmp_path)))
    assert first == second
    kernel, refusal = first
    assert kernel == "math"
    assert refusal.startswith("rank 0: engine.attention: cudnn does not take ")
