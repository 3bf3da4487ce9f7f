"""Weights of another run to start from, such as those of the teacher of a round of reflow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fmscale.engine.checkpoint import Fragments
from fmscale.errors import UserError
from fmscale.models.families import blueprint
from fmscale.runs import Run, open_run

# Keys of `model` that do not say which parameters there are.
FREE = {"init_from", "leap_embed", "base_size", "position_origin", "position_step"}


class EarlierRun:
    """Averaged weights of a run, or the raw ones of a run that has no averages; read a little at a time.

    Args:
        run: it is.
    """

    added: tuple[str, ...] = ()

    def __init__(self, run: Run) -> None:
        config = run.config.ema
        self._kind = run.weight_kind("ema" if config.decays or config.sigma_rels else "raw")
        self._fragments = Fragments(run.checkpoint)

    @property
    def digest(self) -> str:
        """By it ranks tell whether they found the same weights."""
        return hashlib.sha256(json.dumps(self._fragments.checkpoint.index, sort_keys=True).encode()).hexdigest()

    def holds(self, name: str) -> bool:
        """Whether it has a parameter of ours; one that it lacks stays as it was initialised."""
        return name in self._fragments.checkpoint.index["parameters"]

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Values start … start + length of a flattened parameter, float32.

        Raises:
            UserError: the checkpoint is damaged, or gone.
        """
        return self._fragments.read(self._kind, name, start, length)


def open_earlier_run(place: Path, values: Mapping[str, Any]) -> EarlierRun:
    """The newest weights of a run; each rank reads what it owns, so they are not looked at as a whole.

    Args:
        place: its directory.
        values: the `model` section of the config that starts from it.

    Raises:
        UserError: it has no checkpoint, or its network is another.
    """
    run = open_run(place, weights=None)
    theirs = run.config.model.model_dump()
    wrong = {key: theirs.get(key) for key in theirs | dict(values) if theirs.get(key) != values.get(key)}
    if wrong := {key: value for key, value in wrong.items() if key not in FREE}:
        said = ", ".join(f"model.{key} {value} (here {values.get(key)})" for key, value in sorted(wrong.items()))
        raise UserError(f"model.init_from: {place} has {said}; set the same")
    if theirs["leap_embed"] and not values["leap_embed"]:
        raise UserError(f"model.init_from: {place} was trained with model.leap_embed; set the same")
    _check_positions(place, theirs, values)
    return EarlierRun(run)


def _check_positions(place: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse to forget positions that weights have learned and a config wrote down; others follow from base_size."""
    keys = ("position_origin", "position_step")
    if any(theirs.get(key) is not None and ours.get(key) is None for key in keys):
        learned = blueprint(theirs["family"], theirs)
        taken = blueprint(ours["family"], {**ours, "leap_embed": theirs["leap_embed"]})
        if any(getattr(learned, key) != getattr(taken, key) for key in keys):
            said = " and ".join(f"model.{key} to {getattr(learned, key):.9g}" for key in keys)
            raise UserError(
                f"model.init_from: {place} learned other positions than those of model.base_size: set {said}"
            )
