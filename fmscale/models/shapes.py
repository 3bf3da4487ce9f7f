"""Every parameter of a network by name and shape, in the network's own order; nothing is built, and torch stays out.

Dimensions: D width of a token, which is heads · head_dim.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple, TypeVar

TIMESTEP_FEATURES = 256

# Parameter name -> the part of the network that it belongs to, by which gradients and weights are reported.
PARTS: dict[str, dict[str, str]] = {
    "mmdit": {
        r"(patch_embed|context_embed|timestep_mlp|leap_mlp|pooled_mlp)\..*": "embeddings",
        r"modulation\..*": "modulation",
        r"blocks\.\d+\.(image|text)\.(dual\.)?(qkv|out)\..*": "attention",
        r"blocks\.\d+\.(image|text)\.mlp\..*": "mlp",
        r"proj_out\..*": "output",
    },
    "flux": {
        r"(patch_embed|context_embed|timestep_mlp|guidance_mlp|leap_mlp|pooled_mlp)\..*": "embeddings",
        r"modulation\..*": "modulation",
        r"blocks\.\d+\.(image|text)\.(qkv|out)\..*": "attention",
        r"blocks\.\d+\.(image|text)\.mlp\..*": "mlp",
        r"blocks\.\d+\.(enter|leave|norm_[qk])\..*": "single",
        r"proj_out\..*": "output",
    },
}
Row = TypeVar("Row")


class Weight(NamedTuple):
    """A parameter: its name, as in `named_parameters`, and its shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def module(self) -> str:
        """Name of the module that holds it."""
        return self.name.rpartition(".")[0]

    @property
    def decays(self) -> bool:
        """Whether weight decay is applied to it: all matrices of these networks, and no biases and norms."""
        return len(self.shape) > 1


def row_for(name: str, table: Mapping[str, Row]) -> Row:
    """The value of the one row of a table whose regular expression fits a whole parameter name."""
    rows = [value for pattern, value in table.items() if re.fullmatch(pattern, name)]
    assert len(rows) == 1, f"{name} fits {len(rows)} rows of the table, not one"
    return rows[0]


def mmdit_weights(model: Mapping[str, Any]) -> Iterator[Weight]:
    """The parameters of an `MMDiT`.

    Args:
        model: what it is made with, by name.
    """
    width, layers = model["heads"] * model["head_dim"], model["layers"]
    patch_values = model["latent_channels"] * model["patch_size"] ** 2
    norm_dim, rows = model["head_dim"] if model["qk_norm"] else 0, 2
    yield from _linear("patch_embed", patch_values, width)
    yield from _told("timestep_mlp", TIMESTEP_FEATURES, width)
    if model["leap_embed"]:
        yield from _told("leap_mlp", TIMESTEP_FEATURES, width)
    yield from _told("pooled_mlp", model["pooled_dim"], width)
    yield from _linear("context_embed", model["context_dim"], width)
    for layer in range(layers):
        dual, last = layer in model["dual_attention_layers"], layer == layers - 1
        rows += (9 if dual else 6) + (2 if last else 6)
        yield from _stream(f"blocks.{layer}.image", width, norm_dim, dual=dual)
        yield from _stream(f"blocks.{layer}.text", width, norm_dim, read=last)
    yield from _linear("modulation", width, rows * width)
    yield from _linear("proj_out", width, patch_values)


def flux_weights(model: Mapping[str, Any]) -> Iterator[Weight]:
    """The parameters of a `Flux`; argument as of `mmdit_weights`."""
    width, layers, singles = model["heads"] * model["head_dim"], model["layers"], model["single_layers"]
    patch_values, head_dim = model["latent_channels"] * model["patch_size"] ** 2, model["head_dim"]
    yield from _linear("patch_embed", patch_values, width)
    yield from _told("timestep_mlp", TIMESTEP_FEATURES, width)
    for name in ("guidance", "leap"):
        if model[f"{name}_embed"]:
            yield from _told(f"{name}_mlp", TIMESTEP_FEATURES, width)
    yield from _told("pooled_mlp", model["pooled_dim"], width)
    yield from _linear("context_embed", model["context_dim"], width)
    for layer in range(layers):
        for stream in ("image", "text"):
            yield from _stream(f"blocks.{layer}.{stream}", width, head_dim)
    for layer in range(layers, layers + singles):
        yield from _linear(f"blocks.{layer}.enter", width, 7 * width)
        yield from _norms(f"blocks.{layer}", head_dim)
        yield from _linear(f"blocks.{layer}.leave", 5 * width, width)
    yield from _linear("modulation", width, (12 * layers + 3 * singles + 2) * width)
    yield from _linear("proj_out", width, patch_values)


def in_forward_order(weights: Iterable[Weight]) -> list[Weight]:
    """Weights as modules run: what steers all blocks before these, and in a block first what goes to the attention."""

    def place(weight: Weight) -> tuple[int, int, int]:
        first, *rest = weight.module.split(".")
        if first == "blocks":
            return 1, int(rest[0]), 0 if rest[2:3] == ["qkv"] else 1
        return {"modulation": (0, 1, 0), "proj_out": (2, 0, 0)}.get(first, (0, 0, 0))

    return sorted(weights, key=place)


def recomputable(weights: Iterable[Weight]) -> list[str]:
    """Parts of blocks that are made of modules themselves, by the names that `engine.recompute` takes."""
    streams = (weight.module.split(".") for weight in weights if weight.name.startswith("blocks."))
    return sorted({part for _, _, _, *parts in (path for path in streams if len(path) > 3) for part in parts[:-1]})


def _stream(name: str, width: int, norm_dim: int, *, dual: bool = False, read: bool = False) -> Iterator[Weight]:
    """Of a `Stream`, or of a `ReadStream`."""
    yield from _linear(f"{name}.qkv.linear", width, 3 * width)
    yield from _norms(f"{name}.qkv", norm_dim)
    if read:
        return
    yield from _linear(f"{name}.out", width, width)
    if dual:
        yield from _linear(f"{name}.dual.qkv.linear", width, 3 * width)
        yield from _norms(f"{name}.dual.qkv", norm_dim)
        yield from _linear(f"{name}.dual.out", width, width)
    yield from _linear(f"{name}.mlp.up", width, 4 * width)
    yield from _linear(f"{name}.mlp.down", 4 * width, width)


def _told(name: str, given: int, width: int) -> Iterator[Weight]:
    """Of an MLP that what the network is told goes through."""
    yield from _linear(f"{name}.up", given, width)
    yield from _linear(f"{name}.down", width, width)


def _linear(name: str, given: int, out: int) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (out, given))
    yield Weight(f"{name}.bias", (out,))


def _norms(name: str, head_dim: int) -> Iterator[Weight]:
    if head_dim:
        yield Weight(f"{name}.norm_q.weight", (head_dim,))
        yield Weight(f"{name}.norm_k.weight", (head_dim,))


WEIGHTS: dict[str, Callable[[Mapping[str, Any]], Iterator[Weight]]] = {"mmdit": mmdit_weights, "flux": flux_weights}


def weights_of(model: Mapping[str, Any]) -> list[Weight]:
    """The parameters of a network.

    Args:
        model: the `model` section of a config.
    """
    return list(WEIGHTS[model["family"]](model))
