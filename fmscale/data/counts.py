"""How many tokens a caption has, as its sample's json tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fmscale.batch import COUNT
from fmscale.errors import UserError


def counts_of(meta: Mapping[str, Any], roles: Sequence[str], sample: str) -> dict[str, Tensor]:
    """The tokens of a sample's caption as text encoders count them, by `ROLE_count`, shape (); they need not all fit.

    Args:
        meta: json of the sample.
        roles: of the text encoders that are asked for.
        sample: its name, for the error.

    Raises:
        UserError: the json does not tell.
    """
    told = meta.get("tokens")
    counts = {role: told.get(role) if isinstance(told, Mapping) else None for role in roles}
    for role, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise UserError(
                f"conditioning.text: `masked` needs the tokens of each caption, and the json of {sample} has no "
                f"tokens.{role}; make the dataset by `fmscale encode`, or set conditioning.text=padded"
            )
    return {role + COUNT: torch.tensor(count) for role, count in counts.items()}
