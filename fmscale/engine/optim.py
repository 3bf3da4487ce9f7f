"""AdamW that carries averaged copies of the weights, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

EMA_PREFIX = "ema_"


def ema_name(decay: float) -> str:
    """Name of the averaged weights with this decay, in optimizer state and checkpoints."""
    return f"{EMA_PREFIX}{decay!r}"


def ema_decay(decay: float, updates: int) -> float:
    """The decay in force at an update: short memory at first, so that the average forgets the initial weights.

    Args:
        decay: the final decay, in (0, 1).
        updates: optimizer updates done so far, this one included, >= 1.

    Returns:
        min(decay, (1 + updates) / (10 + updates)).

    Source: `tf.train.ExponentialMovingAverage`, whose `num_updates` argument does the same.
    """
    return min(decay, (1 + updates) / (10 + updates))


class AdamWEMA(torch.optim.AdamW):
    """AdamW that keeps exponential moving averages of the weights beside its moments.

    DeepSpeed hands an optimizer the flat fp32 partition that a rank owns. State kept here is therefore sharded,
    offloaded and updated with no communication, in fp32, once for each step that was applied.

    Args:
        params: as for `torch.optim.AdamW`.
        ema_decays: one average for each, kept in `state[p][ema_name(decay)]`.
        others: `lr`, `betas`, `eps`, `weight_decay` as for `torch.optim.AdamW`.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101; Polyak & Juditsky 1992 for averaging.
    """

    def __init__(self, params: Iterable[Any], *, ema_decays: Sequence[float] = (), **others: Any) -> None:
        super().__init__(params, fused=True, **others)
        self.ema_decays = tuple(ema_decays)
        self.look: Callable[[Sequence[Tensor]], None] | None = None  # shown what is updated while it has its gradient

    def init_state(self, param: Tensor) -> None:
        """Give a parameter its state if it has none: zero moments, averages equal to the weights."""
        state = self.state[param]
        if state:
            return
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        state["exp_avg"] = torch.zeros_like(param)
        state["exp_avg_sq"] = torch.zeros_like(param)
        for decay in self.ema_decays:
            state[ema_name(decay)] = param.detach().clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One AdamW update, then one update of every average, for the parameters that have a gradient."""
        assert closure is None, "gradients come from the engine"
        # ZeRO calls this once per partition group, with every other group's parameters out of reach.
        updated = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for param in updated:
            self.init_state(param)
        if self.look is not None:
            self.look(updated)
        super().step()
        self.update_averages(updated)

    @torch.no_grad()
    def update_averages(self, params: Sequence[Tensor]) -> None:
        """Move every average of these parameters towards their weights."""
        for param in params:
            state = self.state[param]
            updates = self._updates(state)
            for decay in self.ema_decays:
                state[ema_name(decay)].lerp_(param, 1 - ema_decay(decay, updates))

    def _updates(self, state: dict[str, Any]) -> int:
        return int(state["step"].item())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; biases, norms and other vectors without."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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
