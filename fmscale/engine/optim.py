"""AdamW that carries averaged copies of the weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fmscale.engine.posthoc import Number, power_decay

EMA_PREFIX = "ema_"
SIGMA_PREFIX = f"{EMA_PREFIX}sigma_"
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
TABLES = (nn.Embedding, nn.EmbeddingBag)


def ema_name(decay: float) -> str:
    """Name of the average with a fixed decay, in optimizer state and checkpoints."""
    return f"{EMA_PREFIX}{decay!r}"


def sigma_name(sigma_rel: float) -> str:
    """Name of the power-function average of a relative width, likewise."""
    return f"{SIGMA_PREFIX}{sigma_rel!r}"


def ema_names(decays: Sequence[float], sigma_rels: Sequence[float]) -> list[str]:
    """Names of a run's averages; the first is the one that is sampled and exported."""
    return [*map(ema_name, decays), *map(sigma_name, sigma_rels)]


def ema_decay(decay: float, updates: Number, warmup: bool = True) -> Number | float:
    """The decay in force at an update: short memory at first, so that the average forgets the initial weights.

    Args:
        decay: the final decay, in (0, 1).
        updates: optimizer updates done so far, this one included, >= 1; a number, or a float64 scalar on a device.
        warmup: False has the final decay in force from the first update on.

    Returns:
        min(decay, (1 + updates) / (10 + updates)).

    Source: `tf.train.ExponentialMovingAverage`, whose `num_updates` argument does the same.
    """
    if not warmup:
        return decay
    rising = (1 + updates) / (10 + updates)
    return rising.clamp(max=decay) if isinstance(rising, Tensor) else min(decay, rising)


def averages_of(decays: Sequence[float], sigma_rels: Sequence[float], warmup: bool) -> dict[str, Callable[[Any], Any]]:
    """The decay of each average as a function of the updates, by its name; arguments as of `AdamWEMA`."""
    fixed = {ema_name(decay): functools.partial(ema_decay, decay, warmup=warmup) for decay in decays}
    power = {sigma_name(sigma): functools.partial(power_decay, sigma) for sigma in sigma_rels}
    return {**fixed, **power}


class AdamWEMA(torch.optim.AdamW):
    """AdamW that keeps exponential moving averages of the weights beside its moments.

    DeepSpeed hands an optimizer the flat fp32 partition that a rank owns. State kept here is therefore sharded,
    offloaded and updated with no communication, in fp32, once for each step that was applied.

    Args:
        params: as for `torch.optim.AdamW`.
        ema_decays: one average for each, kept in `state[p][ema_name(decay)]`.
        ema_sigma_rels: one power-function average for each, kept in `state[p][sigma_name(sigma_rel)]`.
        ema_warmup: the fixed decays rise to their value, see `ema_decay`.
        others: `lr`, `betas`, `eps`, `weight_decay` as for `torch.optim.AdamW`.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101; Polyak & Juditsky 1992 for averaging; `posthoc` for powers.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        ema_decays: Sequence[float] = (),
        ema_sigma_rels: Sequence[float] = (),
        ema_warmup: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(params, fused=True, **others)
        self.averages = averages_of(ema_decays, ema_sigma_rels, ema_warmup)
        self.look: Callable[[Sequence[Tensor]], None] | None = None  # shown what is updated while it has its gradient
        # Read by torch's kernel, on the device: what a gradient is divided by; and 1 where the step is to be dropped.
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    def rename_averages(self, names: Sequence[str], averages: Mapping[str, Callable[[Any], Any]]) -> None:
        """Go on with other decays: each average, in order, keeps its value.

        Args:
            names: as they are now.
            averages: as many, under new names.
        """
        self.averages = dict(averages)
        for state in self.state.values():
            kept = [state.pop(name) for name in names]
            state.update(zip(averages, kept, strict=True))

    def init_state(self, param: Tensor) -> None:
        """Give a parameter its state if it has none: zero moments, averages equal to the weights."""
        state = self.state[param]
        if state:
            return
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        state["exp_avg"] = torch.zeros_like(param)
        state["exp_avg_sq"] = torch.zeros_like(param)
        for name in self.averages:
            state[name] = param.detach().clone()

    def updates(self, param: Tensor) -> int:
        """Updates of a parameter so far, for which the device is waited for: it alone knows which were dropped."""
        return int(self.state[param]["step"].item())

    def set_updates(self, param: Tensor, count: int) -> None:
        """Go on as if a parameter had had so many updates."""
        self.state[param]["step"].fill_(count)

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
        """Move every average of these parameters towards their weights, in place: average += (1 − β)(weight − average).

        With no temporary: for each average the weights are read, and it is read and written.
        (Pieces that stay in the cache for the next average gain nothing, and lose much where threads share cores.)
        """
        for param in params:
            for name in self.averages:
                self.state[param][name].lerp_(param, self._share(param, name))

    def _share(self, param: Tensor, name: str) -> Tensor:
        """1 − β, or 0 where a step is dropped; a fp32 scalar on the device, which alone knows the count of updates."""
        count = self.state[param]["step"].double().clamp(min=1)
        share = torch.ones_like(count) - self.averages[name](count)
        return (share if self.found_inf is None else share * (1 - self.found_inf)).float()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; biases, norms and embeddings without.

    A matrix is a `weight` of two or more dimensions: of a linear layer or a convolution, those that embed patches, text
    and time and those that modulate among them. An embedding is a table of learned rows: an `nn.Embedding`, or a
    parameter that a module holds by another name, such as a table of positions.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decays = {name: _decays(model.get_submodule(name.rpartition(".")[0]), name, p) for name, p in params.items()}
    groups = [
        {"params": [p for name, p in params.items() if decays[name]], "weight_decay": weight_decay, "decays": True},
        {"params": [p for name, p in params.items() if not decays[name]], "weight_decay": 0.0, "decays": False},
    ]
    return [group for group in groups if group["params"]]


def _decays(owner: nn.Module, name: str, param: Tensor) -> bool:
    return param.ndim > 1 and name.endswith("weight") and not isinstance(owner, (*NORMS, *TABLES))
