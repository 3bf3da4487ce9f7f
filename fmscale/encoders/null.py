"""The text features of the empty caption, kept beside a dataset's shards: what a dropped encoder says in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fmscale.batch import COUNT
from fmscale.errors import UserError
from fmscale.files import sync

NULL_FILE = "null.safetensors"


def save_null(folder: Path, features: Mapping[str, Tensor]) -> None:
    """Write features by name, without a batch dimension, as each sample has its own; counts may be among them."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in features.items()}, folder / NULL_FILE)
    sync(folder / NULL_FILE)


def load_null(folder: Path, shapes: Mapping[str, Sequence[int]] | None) -> dict[str, Tensor]:
    """Read the features of these names and shapes, or of None for all but counts, in float32.

    Raises:
        UserError: the dataset has no such file, or it lacks a name, or the samples store another shape.
    """
    path, stored = folder / NULL_FILE, _read(folder)
    for name, shape in (shapes or {}).items():
        if name not in stored or tuple(stored[name].shape) != tuple(shape):
            raise UserError(
                f"{path}: lacks {name} of shape {tuple(shape)}, as the samples store; encode the dataset again"
            )
    names = [name for name in stored if not name.endswith(COUNT)] if shapes is None else list(shapes)
    return {name: stored[name].float() for name in names}


def load_null_counts(folder: Path, roles: Sequence[str]) -> dict[str, Tensor]:
    """Read how many tokens the empty caption has: `ROLE_count` for each role, shape (), in float32.

    Raises:
        UserError: the dataset does not say.
    """
    stored = _read(folder)
    for role in roles:
        if role + COUNT not in stored or stored[role + COUNT].shape:
            raise UserError(
                f"{folder / NULL_FILE}: lacks {role + COUNT}, the tokens of the empty caption, which "
                "conditioning.text=masked needs; encode the dataset again, or set conditioning.null=zeros"
            )
    return {role + COUNT: stored[role + COUNT].float() for role in roles}


def _read(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / NULL_FILE
    if not path.is_file():
        raise UserError(f"{path}: missing, so the encoded empty caption is unknown; set conditioning.null=zeros")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged: {error}; encode the dataset again") from None
