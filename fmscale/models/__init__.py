"""The networks: noisy latents, time and text in, velocity out; one device, no knowledge of training."""

from collections.abc import Iterable

from fmscale.models import mmdit
from fmscale.models.layers import row_for
from fmscale.models.mmdit import MMDiT

MODELS = {"mmdit": MMDiT}
PARTS = {"mmdit": mmdit.PARTS}


def parts_of(family: str, names: Iterable[str]) -> dict[str, str]:
    """The part of the network that each parameter of a model belongs to: `attention`, `mlp` and so on, by its name."""
    return {name: row_for(name, PARTS[family]) for name in names}
