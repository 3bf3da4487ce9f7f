"""The learning rate as a function of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, schedule: str, decay_steps: int) -> float:
    """The learning rate of a step.

    Args:
        step: optimizer step, counted from 0.
        peak: the rate after warm-up.
        warmup_steps: steps of linear rise; the first step already has peak / warmup_steps.
        schedule: row of `SCHEDULES`.
        decay_steps: step at which a falling schedule reaches 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, decay_steps - warmup_steps)
    return peak * SCHEDULES[schedule](min(1.0, progress))


def _constant(progress: float) -> float:
    return 1.0


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES = {"constant": _constant, "cosine": _cosine}
