"""The weights of a frozen network on disk: safetensors only, and known by their digest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmscale.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

HUB_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<folder>[\w./-]+))?")
FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model")  # no pickle is fetched, so none can be read


def model_folder(place: Path | str) -> Path:
    """A model folder on this machine, fetched from the Hugging Face hub where it is none yet.

    Args:
        place: a folder; or, where there is no such folder, a name on the hub: OWNER/NAME, or OWNER/NAME/FOLDER for a
            folder of a pipeline. With HF_HUB_OFFLINE=1 only what was fetched before is found.

    Returns:
        The folder, which may not exist where `place` cannot be a name on the hub.

    Raises:
        UserError: there is neither such a folder nor such a name, or the hub cannot be reached.
    """
    name = HUB_NAME.fullmatch(str(place))
    if Path(place).is_dir() or name is None:
        return Path(place)
    from huggingface_hub import snapshot_download

    folder = name["folder"] or ""
    try:
        patterns = [f"{folder}/{kind}" if folder else kind for kind in FETCHED]
        found = Path(snapshot_download(name["repository"], allow_patterns=patterns)) / folder
    except Exception as error:  # its client meets networks with many exceptions
        said = str(error).strip().split("\n")[0]
        raise UserError(
            f"{place}: there is no such folder, and the Hugging Face hub gives no model of that name ({said}); give a "
            "model folder, or fetch the model on a machine that may"
        ) from error
    if not found.is_dir():
        raise UserError(f"{place}: {name['repository']} on the Hugging Face hub has no folder {folder!r} with a model")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` that every model folder of diffusers and transformers holds.

    Args:
        folder: a model folder on this machine.

    Returns:
        The file's content.

    Raises:
        UserError: the folder or the file is missing, or the file is not a JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"{folder}: no model folder, for it holds no config.json; give a folder that save_pretrained wrote"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); download the model again") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a JSON object; download the model again")
    return config


def weight_files(folder: Path, stem: str) -> tuple[Path, ...]:
    """The safetensors files that a model folder's weights are read from.

    Args:
        folder: a model folder on this machine.
        stem: `model` for transformers, `diffusion_pytorch_model` for diffusers.

    Returns:
        One file, or all pieces that the index of a split one names, in order of their names.

    Raises:
        UserError: there are no safetensors weights, or a piece is missing or damaged.
    """
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        check_readable(single)
        return (single,)
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        raise UserError(
            f"{folder}: no {single.name}; only safetensors are read: where you trust the weights that it holds, "
            "load them elsewhere and write them again with save_pretrained(folder, safe_serialization=True)"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: damaged ({error}); download the model again") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: {missing[0]} is missing, which {index.name} names; download the model again")
    for name in names:
        check_readable(folder / name)
    return tuple(folder / name for name in names)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file that a person names.

    Raises:
        UserError: as `check_safetensors`.
    """
    from safetensors.torch import load_file

    check_safetensors(file)
    return load_file(file)


def check_safetensors(file: Path) -> None:
    """Refuse a file that a person names and that holds no weights which can be read.

    Raises:
        UserError: there is no such file, it is not safetensors, or it is damaged.
    """
    if file.suffix == ".safetensors" and not file.is_file():
        raise UserError(f"{file}: no such file; give the weights as one .safetensors file")
    if file.suffix != ".safetensors":
        raise UserError(
            f"{file}: not a .safetensors file; only safetensors are read: where you trust the weights that you have, "
            "load them elsewhere and write state_dict() again with safetensors.torch.save_file"
        )
    check_readable(file)


def check_readable(file: Path) -> None:
    """Open a safetensors file, which checks its header against its length.

    Raises:
        UserError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"{file}: damaged ({error}); download it again") from error


def load_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained(folder, **options)`, from this machine alone.

    Args:
        kind: a class of diffusers or transformers.
        folder: a model's or a tokenizer's.

    Raises:
        UserError: the files in the folder do not make one; libraries meet such files with nearly any exception.
    """
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:
        said = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{folder}: no {kind.__name__} can be loaded from it ({said}); download it again, or give another folder"
        ) from error
