"""Published weights to start from: diffusers' folders and single files, read a little at a time.

1. `open_source`   finds the tensors, and refuses those of another network
2. `Source.read`   values of one of our parameters, wherever they are in the files
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from math import isqrt, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmscale.data.tar import DamageError
from fmscale.data.tensors import DTYPES, head_bytes, parse_head
from fmscale.earlier_run import EarlierRun, open_earlier_run
from fmscale.encoders.weights import model_folder, read_config, weight_files
from fmscale.engine.fragments import raw
from fmscale.errors import UserError
from fmscale.models.families import FORMS, NAMES, blueprint
from fmscale.models.mmdit_names import DIFFUSERS_POSITIONS, ORIGINAL_POSITIONS, check_axes, positions_of
from fmscale.models.published import Part, check_state, layout, some

PREFIXES = ("", "model.diffusion_model.")  # of single files, the second where text encoders or a VAE are in them too
CLASSES = {"mmdit": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}
SMALL, LOOKED_AT = 1 << 16, 16  # values of tensors that are compared between ranks, and how many tensors
QK_NORMS = (".norm_q.weight", ".norm_k.weight")
FLUX_SIDE = 128  # latent pixels on a side of what FluxPipeline draws unless it is told a size
EXPORT_NOTE = "fmscale.json"  # in an exported folder: what diffusers' own files have no place for
NOTED = {
    "form": (str,),
    "encoders": (list,),
    "made_by": (dict,),
    "t5_length": (int,),
    "base_size": (int,),
    "flow": (dict,),
}
NOTED |= {"null": (str,), "text": (str,), "images_seen": (int,), "dataset_fingerprint": (str,)}
NOT_THEIRS = {"base_size"}  # is not in a config.json


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
        file: where it is.
        dtype: of the values.
        shape: of the tensor.
        offset: of its first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def values(self, low: int, high: int) -> Tensor:
        """Values low … high of the flattened tensor, float32.

        Raises:
            UserError: the file cannot be read.
        """
        size = self.dtype.itemsize
        values = torch.empty(high - low, dtype=self.dtype)
        left, at = raw(values), self.offset + size * low
        try:
            with self.file.open("rb", buffering=0) as file:
                while left:
                    if not (count := os.preadv(file.fileno(), [left], at)):
                        raise UserError(f"{self.file}: cut short; download it again")
                    left, at = left[count:], at + count
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read: {error.strerror}") from error
        return values.float()


class Source:
    """Weights that fit a network of ours.

    Args:
        tensors: by their names.
        parts: where in them each of our parameters is.

    Attributes:
        added: our parameters that they lack, QK norms, which are 1.
    """

    def __init__(self, tensors: Mapping[str, Stored], parts: Mapping[str, list[Part]]) -> None:
        self._tensors, self._parts = tensors, parts
        self.added = [name for name, theirs in parts.items() if theirs[0].name not in tensors]

    @property
    def files(self) -> list[Path]:
        """That hold them."""
        return sorted({stored.file for stored in self._tensors.values()})

    @property
    def digest(self) -> str:
        """Of all names and shapes and of some small tensors: by it ranks tell whether they found the same weights."""
        known = hashlib.sha256(repr(sorted((name, each[1:3]) for name, each in self._tensors.items())).encode())
        small = sorted(name for name, each in self._tensors.items() if prod(each.shape) <= SMALL)
        for name in small[:LOOKED_AT]:
            known.update(raw(self._tensors[name].values(0, prod(self._tensors[name].shape))))
        return known.hexdigest()

    def holds(self, name: str) -> bool:
        """Whether a parameter of ours is theirs too; one that is not stays as it was initialised."""
        return name in self._parts

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Values start … start + length of a flattened parameter of ours, float32.

        Raises:
            UserError: a file cannot be read any more.
        """
        if name in self.added:
            return torch.ones(length)
        return torch.cat([torch.empty(0), *self._stretches(name, start, start + length)])

    def _stretches(self, name: str, low: int, high: int) -> Iterator[Tensor]:
        begin = 0
        for part in self._parts[name]:
            stored, size = self._tensors[part.name], prod(part.shape)
            for ours, theirs, count in part.stretches():
                first, last = max(low - begin - ours, 0), min(high - begin - ours, count)
                if first < last:
                    yield stored.values(theirs + first, theirs + last)
            begin += size


def open_start(place: Path, values: Mapping[str, Any]) -> Source | EarlierRun:
    """The weights that a new run starts from: a run's, or published ones; otherwise as `open_source`."""
    return (open_earlier_run if (place / "config.yaml").is_file() else open_source)(place, values)


def open_source(place: Path, values: Mapping[str, Any]) -> Source:
    """Published weights that a new run starts from.

    Args:
        place: a folder of diffusers, its name on the Hugging Face hub, or a single file.
        values: the `model` section of the config.

    Raises:
        UserError: there are no such weights, they are damaged, or they are of another network: says what differs.
    """
    family = values["family"]
    model = blueprint(family, {**values, "leap_embed": False})  # no published network has that
    try:
        place = exported_file(place) or place
        if place.is_file():
            found = _read_heads((place,))
        else:
            folder = _transformer(place)
            _check_config(folder, family, values)
            found = _read_heads(weight_files(folder, "diffusion_pytorch_model"))
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise UserError(f"model.init_from: {place}: cannot be read: {error.strerror}") from error
    tensors, parts = _choose(found, place, family, model)
    positions = [tensors.pop(name) for name in (DIFFUSERS_POSITIONS, ORIGINAL_POSITIONS) if name in tensors]
    norms = {part.name: part for name, theirs in parts.items() if name.endswith(QK_NORMS) for part in theirs}
    added = norms if values.get("qk_norm") and not norms.keys() & tensors.keys() else {}  # to a network without any
    try:
        check_state({**added, **tensors}, {part.name: part.shape for theirs in parts.values() for part in theirs})
        if whole := {name for name, stored in tensors.items() if not stored.dtype.is_floating_point}:
            raise UserError(f"weights are stored as integers, which say nothing without their scales: {some(whole)}")
        for grid in positions:
            _check_positions(grid, model)
    except UserError as error:
        raise UserError(f"model.init_from: {place}: {error}") from None
    return Source(tensors, parts)


def exported_file(place: Path) -> Path | None:
    """The single file that `fmscale export` wrote into a folder; None where it wrote none.

    Raises:
        UserError: it is not there any more.
    """
    if not (place / EXPORT_NOTE).is_file() or read_note(place).get("form") != "single":
        return None
    files = sorted(place.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"{place}: a single file was exported here, and there are {len(files)}; export the run again")
    return files[0]


def read_note(place: Path) -> dict[str, Any]:
    """What `fmscale export` wrote beside the weights in a folder; nothing where it wrote none.

    Raises:
        UserError: it is damaged.
    """
    file = place / EXPORT_NOTE
    if not file.is_file():
        return {}
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
        wrong = [key for key, kinds in NOTED.items() if not isinstance(note.get(key), (*kinds, type(None)))]
        if wrong:
            raise ValueError(f"{wrong[0]} is {note[wrong[0]]!r}")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); export the run again") from None
    return dict(note)


def published_model(place: Path) -> dict[str, Any]:
    """The `model` section of a config that fits a folder of diffusers, but for positions.

    Raises:
        UserError: it holds no such network.
    """
    folder = _transformer(place)
    config = read_config(folder)
    families = {name: family for family, name in CLASSES.items()}
    if (given := config.get("_class_name")) not in families:
        raise UserError(f"model.init_from: {folder} holds a {given}, which is none of {', '.join(families)}")
    family = families[given]
    values = _their_values(folder, family, config) | {"family": family}
    side = config.get("sample_size", FLUX_SIDE)  # of the latents that a pipeline draws unless it is told otherwise
    if not isinstance(side, int) or side < values["patch_size"] or values["patch_size"] < 1:
        raise UserError(
            f"model.init_from: {folder}: its config.json has sample_size {side!r} and patch_size "
            f"{values['patch_size']!r}; download it again"
        )
    return values | {"base_size": side // values["patch_size"]}


def learned_positions(place: Path, values: Mapping[str, Any]) -> dict[str, float]:
    """`position_origin` and `position_step` of weights with a position grid, which says them; else nothing.

    Args:
        place: a folder of diffusers, or a single file.
        values: the `model` section of the config.

    Raises:
        UserError: there are no weights, or they are damaged.
    """
    files = (place,) if place.is_file() else weight_files(_transformer(place), "diffusion_pytorch_model")
    found = _read_heads(files)
    names = (DIFFUSERS_POSITIONS, *(prefix + ORIGINAL_POSITIONS for prefix in PREFIXES))
    grids = [found[name] for name in names if name in found]
    side, width = values.get("pos_embed_max_size", 0), values["heads"] * values["head_dim"]
    if values["family"] != "mmdit" or not grids or prod(grids[0].shape) != side**2 * width:
        return {}  # the last is refused where the weights are opened
    row = grids[0].values(0, side * width).unflatten(0, (side, width))
    origin, step = positions_of(row[:, : width // 2].double())
    return {"position_origin": origin, "position_step": step}


def _transformer(place: Path) -> Path:
    """The folder of the network, which may be in that of a pipeline."""
    folder = model_folder(place)
    if folder.is_dir() and not (folder / "config.json").is_file() and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    if not folder.is_dir():
        raise UserError(
            f"model.init_from: {place}: neither a folder nor a file; give a folder of diffusers or a .safetensors file"
        )
    return folder


def _check_config(folder: Path, family: str, values: Mapping[str, Any]) -> None:
    """Refuse a folder of another network, by the keys of our config, which say more than names of weights."""
    config = read_config(folder)
    if (given := config.get("_class_name")) != CLASSES[family]:
        raise UserError(f"model.init_from: {folder} holds a {given}; model.family {family} is a {CLASSES[family]}")
    theirs = _their_values(folder, family, config)
    wrong = {name: theirs[name] for name in theirs.keys() - NOT_THEIRS if theirs[name] != values[name]}
    if wrong.get("qk_norm") is False:
        del wrong["qk_norm"]  # it is added
    if wrong:
        said = ", ".join(f"model.{name} {value} (here {values[name]})" for name, value in sorted(wrong.items()))
        raise UserError(f"model.init_from: {folder} has {said}; set the same")


def _their_values(folder: Path, family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of our network for the content of a folder's config.json."""
    try:
        return NAMES[family].model_kwargs_from_diffusers(config)
    except KeyError as error:
        raise UserError(f"model.init_from: {folder}: its config.json lacks {error}; download it again") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"model.init_from: {folder}: its config.json is damaged ({error}); download it again") from None


def _read_heads(files: tuple[Path, ...]) -> dict[str, Stored]:
    """All tensors of some files."""
    found: dict[str, Stored] = {}
    for path in files:
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                prefix = file.read(8)
                length = head_bytes(prefix, size)
                entries = parse_head(file.read(length), size - 8 - length)
        except OSError as error:
            raise UserError(f"model.init_from: {path}: cannot be read: {error.strerror}") from error
        except DamageError as error:
            raise UserError(
                f"model.init_from: {path}: {error}; only safetensors are read, and whole ones: download it again, or "
                "write what you trust with safetensors.torch.save_file"
            ) from error
        for name, entry in entries.items():
            if name in found:
                raise UserError(f"model.init_from: {path} and {found[name].file} both hold {name}; download them again")
            found[name] = Stored(path, DTYPES[entry.dtype], entry.shape, 8 + length + entry.start)
    return found


def _choose(
    found: Mapping[str, Stored], place: Path, family: str, model: nn.Module
) -> tuple[dict[str, Stored], dict[str, list[Part]]]:
    """The network's tensors in a file that may hold other things, under the names that most of them have."""
    best: tuple[int, str, dict[str, list[Part]]] = (0, "", {})
    for form in FORMS[family].values():
        parts = layout(model, form)
        names = {part.name for theirs in parts.values() for part in theirs}
        for prefix in PREFIXES:
            known = sum(prefix + name in found for name in names)
            best = max(best, (known, prefix, parts), key=lambda choice: choice[0])
    known, prefix, parts = best
    if not known:
        raise UserError(f"model.init_from: {place} holds no weights of a {CLASSES[family]}, by no names that are known")
    return {name.removeprefix(prefix): stored for name, stored in found.items() if name.startswith(prefix)}, parts


def _check_positions(grid: Stored, model: Any) -> None:
    """Refuse other positions than the model's, by the first row and the first column of their grid."""
    side, width = model.pos_embed_max_size, model.width
    if prod(grid.shape) != side**2 * width:
        patches = isqrt(prod(grid.shape) // width)
        if not patches or prod(grid.shape) != patches**2 * width:
            raise UserError(f"its position grid has the shape {grid.shape}, which is no square of {width} channels")
        raise UserError(f"its position grid has {patches} patches on a side; set model.pos_embed_max_size to that")
    row = grid.values(0, side * width).unflatten(0, (side, width))
    column = torch.stack([grid.values(p * side * width, p * side * width + width) for p in range(side)])
    check_axes(row, column, model)
