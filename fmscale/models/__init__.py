"""The networks: noisy latents, time and text in, velocity out; one device, no knowledge of training."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fmscale.models import flux, flux_names, mmdit, mmdit_names
from fmscale.models.flux import Flux
from fmscale.models.initial import row_for
from fmscale.models.mmdit import MMDiT
from fmscale.models.published import Form

MODELS = {"mmdit": MMDiT, "flux": Flux}
INITIALISERS = {"mmdit": mmdit.INITIALISERS, "flux": flux.INITIALISERS}
PARTS = {"mmdit": mmdit.PARTS, "flux": flux.PARTS}
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


def initialise_parameter(family: str, name: str, parameter: Tensor) -> None:
    """Fill one parameter of a network as its constructor does, with torch's own random numbers."""
    row_for(name, INITIALISERS[family])(parameter, None)


def parts_of(family: str, names: Iterable[str]) -> dict[str, str]:
    """The part of the network that each parameter of a model belongs to: `attention`, `mlp` and so on, by its name."""
    return {name: row_for(name, PARTS[family]) for name in names}
