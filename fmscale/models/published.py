"""Networks under the names that others give them: tables of modules, applied bit for bit, both ways.

A published form of a family is a table from our modules to theirs. One of ours may hold the rows of several of theirs,
one below the other, as a fused product does; and theirs may have the two halves of their rows the other way round.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fmscale.errors import UserError

SHOWN = 4  # names in a message


class Place(NamedTuple):
    """Rows of one of our modules in a module of theirs.

    Attributes:
        module: its name.
        share: of the rows, against the other places of our module.
        swapped: theirs has the second half of these rows first.
        patch: side of the patches of a convolution, where theirs is one and ours a matrix; 0 elsewhere.
        weight: what theirs calls the weight.
    """

    module: str
    share: int = 1
    swapped: bool = False
    patch: int = 0
    weight: str = "weight"


Table = Mapping[str, Sequence[Place]]
Form = Callable[[Any], Table]  # of a model, which may be on the meta device


class Part(NamedTuple):
    """One parameter of theirs.

    Attributes:
        name: of it.
        shape: of it.
        swapped: as in `Place`.
    """

    name: str
    shape: tuple[int, ...]
    swapped: bool

    def stretches(self) -> tuple[tuple[int, int, int], ...]:
        """Where its flattened values are: first one among ours, first one among theirs, how many."""
        size = prod(self.shape)
        half = size // 2
        return ((0, half, half), (half, 0, size - half)) if self.swapped else ((0, 0, size),)


def layout(model: nn.Module, form: Form) -> dict[str, list[Part]]:
    """Which parameters of theirs each of ours holds, one below the other.

    Args:
        model: of ours; its weights are not looked at.
        form: to be written or read.
    """
    table = form(model)
    return {name: _parts(name, tuple(like.shape), table) for name, like in model.state_dict().items()}


def _parts(name: str, shape: tuple[int, ...], table: Table) -> list[Part]:
    module, _, leaf = name.rpartition(".")
    places, found = table[module], []
    for place in places:
        rows = shape[0] * place.share // sum(each.share for each in places)
        inner = (shape[1] // place.patch**2, place.patch, place.patch) if place.patch and shape[1:] else shape[1:]
        theirs = place.weight if leaf == "weight" else leaf
        found.append(Part(f"{place.module}.{theirs}", (rows, *inner), place.swapped))
    return found


def publish(state: Mapping[str, Tensor], model: nn.Module, form: Form) -> dict[str, Tensor]:
    """Weights under their names.

    Args:
        state: by our names, any dtype.
        model: that they are of; its own weights are not looked at.
        form: to be written.

    Returns:
        Views of the weights, or copies where halves are swapped.

    Raises:
        UserError: a weight is missing, unexpected or of another shape.
    """
    check_state(state, {name: tuple(like.shape) for name, like in model.state_dict().items()})
    published = {}
    for name, parts in layout(model, form).items():
        rows = state[name].split([part.shape[0] for part in parts])
        for part, piece in zip(parts, rows, strict=True):
            published[part.name] = _swap(piece, part).reshape(part.shape)
    return published


def adopt(state: Mapping[str, Tensor], model: nn.Module, form: Form) -> dict[str, Tensor]:
    """Weights under our names: the inverse of `publish`, and raises what that does; copies."""
    parts_of = layout(model, form)
    check_state(state, {part.name: part.shape for parts in parts_of.values() for part in parts})
    return {name: torch.cat([_matrix(state[part.name], part) for part in parts]) for name, parts in parts_of.items()}


def _matrix(theirs: Tensor, part: Part) -> Tensor:
    return _swap(theirs.flatten(1) if theirs.ndim > 1 else theirs, part)


def _swap(rows: Tensor, part: Part) -> Tensor:
    return rows.roll(part.shape[0] // 2, dims=0) if part.swapped else rows


class Shaped(Protocol):
    """A tensor, or what stands for one that was not read."""

    @property
    def shape(self) -> Sequence[int]: ...


def check_state(state: Mapping[str, Shaped], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights that are not those that are expected, by name and shape.

    Raises:
        UserError: names some of each kind.
    """
    faults = {
        "missing": expected.keys() - state.keys(),
        "unexpected": state.keys() - expected.keys(),
        "of another shape": {key for key in expected.keys() & state.keys() if expected[key] != tuple(state[key].shape)},
    }
    found = [f"{what}: {some(names)}" for what, names in faults.items() if names]
    if found:
        raise UserError(
            f"weights do not fit the model: {'; '.join(found)}; compare the model section of the two configs"
        )


def some(names: set[str]) -> str:
    """The first of many names, and how many there are."""
    return f"{', '.join(sorted(names)[:SHOWN])} ({len(names)} in all)"


def arguments_of(network: type[nn.Module], given: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a network, of values that may be more, those that are not given by their defaults."""
    signature = inspect.signature(network)
    bound = signature.bind(**{name: given[name] for name in signature.parameters if name in given})
    bound.apply_defaults()
    return bound.arguments


def check_config(theirs: Mapping[str, Any], ours: Mapping[str, Any], network: str) -> None:
    """Refuse a config.json of another network than that for which we would write `ours`.

    Raises:
        UserError: says what differs.
    """
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in theirs.items()}
    wrong = {key: value for key, value in ours.items() if plain.get(key, "nothing") != value}
    if differing := [f"{key} {plain.get(key, 'nothing')} instead of {value}" for key, value in wrong.items()]:
        raise UserError(f"the transformer's config.json has {', '.join(differing)}: fmscale has no such {network}")
