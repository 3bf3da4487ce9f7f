"""The table of networks: how each family is built, filled, named and divided into parts."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fmscale.models import flux, flux_names, mmdit, mmdit_names
from fmscale.models.flux import Flux
from fmscale.models.mmdit import MMDiT
from fmscale.models.published import Form, Part, layout
from fmscale.models.shapes import PARTS, row_for

MODELS = {"mmdit": MMDiT, "flux": Flux}
INITIALISERS = {"mmdit": mmdit.INITIALISERS, "flux": flux.INITIALISERS}
NAMES = {"mmdit": mmdit_names, "flux": flux_names}
FORMS: dict[str, dict[str, Form]] = {
    family: {"diffusers": names.diffusers_form, "original": names.original_form} for family, names in NAMES.items()
}


def build(family: str, values: Mapping[str, Any]) -> nn.Module:
    """A network of a family, from the `model` section of a config, of which it takes what it knows."""
    network = MODELS[family]
    return network(**{name: values[name] for name in inspect.signature(network).parameters if name in values})


def blueprint(family: str, values: Mapping[str, Any]) -> Any:
    """As `build`, without memory for weights."""
    with torch.device("meta"):
        return build(family, values)


def file_layout(family: str, model: Any, form: str) -> dict[str, list[Part]]:
    """What a file of a network holds.

    Args:
        family: of the network.
        model: its weights are not looked at.
        form: row of `FORMS`.

    Returns:
        As `published.layout`; and for the position grid of an MMDiT, which we do not store, `DIFFUSERS_POSITIONS`.
    """
    learned = layout(model, FORMS[family][form])
    if family != "mmdit":
        return learned
    return {mmdit_names.DIFFUSERS_POSITIONS: [mmdit_names.position_part(model, form)]} | learned


def initialise_parameter(family: str, name: str, parameter: Tensor) -> None:
    """Fill one parameter of a network as its constructor does, with torch's own random numbers."""
    row_for(name, INITIALISERS[family])(parameter, None)


def set_positions(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Let a network that counts positions from a base resolution do so as the `model` section of a config says."""
    if isinstance(model, MMDiT):
        model.set_positions(values["base_size"], values["position_origin"], values["position_step"])


def parts_of(family: str, names: Iterable[str]) -> dict[str, str]:
    """The part of the network that each parameter of a model belongs to: `attention`, `mlp` and so on, by its name."""
    return {name: row_for(name, PARTS[family]) for name in names}
