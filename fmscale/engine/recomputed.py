"""Names of the parts of blocks that may forget their activations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fmscale.errors import UserError


def check_recompute(parts: Iterable[str], known: Sequence[str]) -> None:
    """Refuse names that blocks do not have.

    Args:
        parts: that are asked for.
        known: that there are.

    Raises:
        UserError: names the first, and those there are.
    """
    if unknown := [name for name in parts if name not in known]:
        raise UserError(f"engine.recompute: the blocks have no {unknown[0]!r}, only {', '.join(known)}")
