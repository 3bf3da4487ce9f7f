"""How a network's parameters are filled before training: functions in a table, by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fmscale.models.shapes import row_for

Initialiser = Callable[[Tensor, "torch.Generator | None"], object]


def zeros(tensor: Tensor, generator: torch.Generator | None) -> None:
    """Set to 0."""
    nn.init.zeros_(tensor)


def ones(tensor: Tensor, generator: torch.Generator | None) -> None:
    """Set to 1."""
    nn.init.ones_(tensor)


def normal(tensor: Tensor, generator: torch.Generator | None) -> None:
    """Draw from N(0, 0.02²)."""
    nn.init.normal_(tensor, std=0.02, generator=generator)


def xavier(tensor: Tensor, generator: torch.Generator | None) -> None:
    """Draw uniformly with variance 2 / (rows + columns)."""
    nn.init.xavier_uniform_(tensor, generator=generator)


def initialise(model: nn.Module, table: Mapping[str, Initialiser], generator: torch.Generator | None = None) -> None:
    """Write every parameter of a model, in the order of their creation.

    Args:
        model: any network; on the meta device nothing happens.
        table: regular expression for a whole parameter name -> how to fill it; exactly one row fits each name.
        generator: source of the random draws, on the parameters' device; None is torch's own.
    """
    for name, parameter in model.named_parameters():
        fill = row_for(name, table)
        if not parameter.is_meta:  # to draw nothing there imports much of torch.compile
            fill(parameter, generator)
