"""What a run watches in its own numbers: a loss that leaps, ranks that lag behind, data that is damaged."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fmscale.config import TrainConfig
from fmscale.errors import UserError

BAD_SAMPLES = "bad_samples.jsonl"  # in the run directory: step, key, shard and reason of each
BAD_FROM_IMAGES = 1000  # so that one bad sample in the first batch does not end a run
RATE = 0.05  # of the median's change per step, relative
SETTLED_STEPS = 100  # before which no step is dropped
SLOW = 1.2  # times the median over ranks
LATER = 2  # steps after which a time is told: by then the device has reached it, and nobody waits


class LossGuard:
    """Compares a step's loss with the running median in each timestep bin, so that hard timesteps are no alarm.

    The medians live on the device and follow each step's mean m by sign: log(median) += RATE sign(m - median). One leap
    moves them no further than any other step does.

    Args:
        bins: of t.
        limit: a step is dropped whose loss is more than so many times what its timesteps cost as a rule; None for none.
        device: where the losses are.

    Source: Robbins & Monro 1951, stochastic approximation, of the quantile 1/2.
    """

    def __init__(self, bins: int, limit: float | None, device: torch.device) -> None:
        self.tune(limit)
        self.medians = torch.full((bins,), math.nan, device=device)
        self.forget()

    def tune(self, limit: float | None) -> None:
        """Go on with another limit; argument as of the class."""
        self._limit = math.inf if limit is None else limit

    def forget(self) -> None:
        """Begin anew: what is measured from now on is another loss."""
        self.medians = torch.full_like(self.medians, math.nan)
        self.steps = 0

    def judge(self, losses: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Compare a step with those before, and learn from it.

        Args:
            losses: sum over the global batch's images, by bin, shape (bins,).
            counts: of images, shape (bins,).

        Returns:
            Loss over what was expected, NaN while nothing is known; and a factor for the loss: 1, or NaN where the step
            is to be dropped. Both of shape (), and nothing waits for the device.
        """
        known = (counts > 0) & self.medians.isfinite()
        expected = torch.where(known, counts * self.medians, 0).sum()
        ratio = torch.where(known, losses, 0).sum() / expected
        leaps = (ratio > self._limit) & (self.steps >= SETTLED_STEPS)
        self._learn(losses / counts)
        return ratio, torch.where(leaps, math.nan, 1.0)

    def _learn(self, means: Tensor) -> None:
        moved = self.medians * torch.exp(RATE * torch.sign(means - self.medians))
        told = torch.where(self.medians.isfinite(), moved, means)
        self.medians = torch.where(means.isfinite(), told, self.medians)
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as plain data."""
        return {"steps": self.steps, "medians": [None if math.isnan(m) else m for m in self.medians.tolist()]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state`."""
        self.steps = state["steps"]
        values = [math.nan if m is None else m for m in state["medians"]]
        self.medians = torch.tensor(values, device=self.medians.device)


class Stopwatch:
    """Time that a rank takes for its own part of a step, before the exchange in which all of them wait for the last.

    Where ranks also wait for one another inside that part, as they do in every layer under ZeRO-3, their times differ
    less than their speeds.

    Args:
        device: whose time it is: a GPU's by events in its stream, a CPU's by the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._laps: deque[tuple[Any, Any]] = deque(maxlen=LATER)
        self._began: Any = None
        self.transport_s = 0.0  # of this step, on the host: matching noise with images, the device waited for

    def start(self) -> None:
        """A step begins."""
        self._began, self.transport_s = self._now(), 0.0

    @contextmanager
    def transport(self) -> Iterator[None]:
        """Noise is matched with images meanwhile."""
        began = time.perf_counter()
        yield
        self.transport_s += time.perf_counter() - began

    def stop(self) -> float:
        """The rank's part ends; returns the seconds of the step `LATER` steps ago, 0 while there is none."""
        told = self._seconds(*self._laps[0]) if len(self._laps) == LATER else 0.0
        self._laps.append((self._began, self._now()))
        return told

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, began: Any, ended: Any) -> float:
        return began.elapsed_time(ended) / 1000 if self._on_gpu else ended - began


def slow_ranks(times: Sequence[Sequence[float]]) -> dict[int, float]:
    """Ranks that lag behind, and how many times the median over ranks they take.

    Args:
        times: for each step the seconds of every rank, 0 where not known.
    """
    known = [step for step in times if all(step)]
    if not known or len(known[0]) == 1:
        return {}
    typical = [statistics.median(of_rank) for of_rank in zip(*known, strict=True)]
    median = statistics.median(typical)
    return {rank: seconds / median for rank, seconds in enumerate(typical) if seconds > SLOW * median}


def check_damage(config: TrainConfig, bad: int, drawn: int) -> None:
    """Stop, on every rank alike, where the data is worse than the config allows.

    Args:
        config: says how much is allowed.
        bad: images drawn since the start that were damaged.
        drawn: images drawn since the start.

    Raises:
        UserError: more were damaged than is allowed.
    """
    if bad > config.data.max_bad_fraction * max(drawn, BAD_FROM_IMAGES):
        raise UserError(
            f"data.max_bad_fraction: {bad:,} of {drawn:,} images were damaged, allowed are "
            f"{config.data.max_bad_fraction:.1%}; {config.run_dir / BAD_SAMPLES} lists them, "
            "`fmscale index DATASET --repair` leaves changed bytes out, for a new run_dir"
        )
