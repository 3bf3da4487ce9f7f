"""What is told of weights and gradients, against the same from all values at once."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fmscale.engine.statistics import EDGES, Look

PARTS = {"a.weight": "first", "a.bias": "first", "b.weight": "second"}


@pytest.fixture
def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(count, generator=generator) for name, count in zip(PARTS, (50, 7, 30), strict=True)}


def test_norms_are_those_of_all_values_of_a_part(values: dict[str, torch.Tensor]) -> None:
    whole = torch.cat(list(values.values())).norm()
    look = Look(PARTS, torch.device("cpu"))
    for name, value in values.items():  # clipped to a third, in pieces that come one after another
        look({name: value[:5] / 3})
        look({name: value[5:] / 3})
    first = torch.cat([values["a.weight"], values["a.bias"]]).norm()
    assert look.names == ["first", "second"]
    assert look.norms(whole).tolist() == pytest.approx([first.item(), values["b.weight"].norm().item()], rel=1e-6)


def test_a_histogram_counts_every_value_in_its_bin(values: dict[str, torch.Tensor]) -> None:
    values["a.bias"][:4] = torch.tensor([0.0, 1e9, -1e9, 1e-30])
    look = Look(PARTS, torch.device("cpu"), histogram=True)
    look(values)
    squares, plain, *counts = look.sums[0].tolist()
    found = torch.cat([values["a.weight"], values["a.bias"]]).double()
    limits = [-math.inf, *EDGES, math.inf]
    expected = [((found > low) & (found <= high)).sum().item() for low, high in itertools.pairwise(limits)]
    assert counts == expected
    assert sum(counts) == 57
    assert plain == pytest.approx(found.sum().item())
    assert squares == pytest.approx(found.square().sum().item())
