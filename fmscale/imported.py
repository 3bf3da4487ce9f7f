"""Published weights as if they were a run that has saved once: what `import` writes, and `sample` and `reflow` read.

A source is a folder of diffusers, a pipeline's or a network's, its name on the Hugging Face hub, or a single file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmscale.config import TrainConfig, check, load
from fmscale.encoders.text import Pipeline as Text
from fmscale.encoders.text import TextEncoders, assemble, load_text_encoders
from fmscale.encoders.vae import Vae, load_vae
from fmscale.encoders.weights import model_folder
from fmscale.engine.checkpoint import FORMAT, Checkpoint
from fmscale.engine.zero import WEIGHT
from fmscale.errors import UserError
from fmscale.files import sha256
from fmscale.flow.timesteps import FLUX_SHIFT
from fmscale.init_from import (
    EXPORT_NOTE,
    Source,
    exported_file,
    learned_positions,
    open_source,
    published_model,
    read_note,
)
from fmscale.models.families import blueprint
from fmscale.pipelines import PIPELINES, Pipeline
from fmscale.runs import Run, Weights, open_run

NO_DATASET = "none"  # for a config wants to name one
T5_LENGTHS = {"sd3": 256, "flux": 512}  # of stock pipelines, unless they are told otherwise


class Given(NamedTuple):
    """What files do not say, or where it lies.

    Attributes:
        config: train config whose model, flow and conditioning are those of the weights.
        vae: folder of the VAE.
        text_encoders: folders by role.
        t5_length: tokens of T5.
    """

    config: Path | None = None
    vae: str | None = None
    text_encoders: Mapping[str, str] = {}
    t5_length: int | None = None


NOTHING = Given()


@dataclass(frozen=True)
class Published:
    """Published weights, and how they were trained.

    Attributes:
        place: where they are.
        file: the single file that they are in; None for a folder of diffusers.
        config: as a run of them would have it.
        source: reads them.
        note: what fmscale wrote beside them, or nothing.
        vae: folder of the VAE; None where there is none.
        text: by role, what `load_text_encoder` takes.
        t5_length: tokens of T5, or zeros in their place.
    """

    place: Path
    file: Path | None
    config: TrainConfig
    source: Source
    note: Mapping[str, Any]
    vae: Path | None
    text: Mapping[str, Mapping[str, Any]]
    t5_length: int

    @property
    def pipeline(self) -> Text:
        """How its text is encoded."""
        return PIPELINES[self.config.model.family].text

    def load_vae(self, device: torch.device) -> Vae:
        """The VAE that it came with.

        Raises:
            UserError: there is none, or it cannot be loaded.
        """
        self.check_it_draws()
        assert self.vae is not None
        return load_vae(self.vae, device)

    def load_text(self, device: torch.device) -> TextEncoders:
        """The text encoders that it came with.

        Raises:
            UserError: there are none, or others than the network takes.
        """
        self.check_it_draws()
        length = (self.note.get("made_by") or {}).get("clip_length")
        text = load_text_encoders(self.text, self.t5_length, device, clip_length=length, pipeline=self.pipeline)
        model = self.config.model
        pooled = assemble(text.encode([""]), context_dim=model.context_dim, t5_length=self.t5_length).pooled
        if pooled.shape[1] != model.pooled_dim:
            raise UserError(
                f"{self.place}: the network takes {model.pooled_dim} numbers of pooled text, {', '.join(self.text)} "
                f"give {pooled.shape[1]}; give those that it was trained with"
            )
        return text

    def check_it_draws(self) -> None:
        """Refuse a network alone.

        Raises:
            UserError: it has no VAE, or no text encoders.
        """
        if self.vae is None or not self.text:
            raise UserError(f"{self.place}: holds a network alone, without a VAE and text encoders; give a pipeline's")

    def made_by(self) -> dict[str, Any]:
        """What the manifest of a dataset says that these encoders make; what an export's run was trained on says more.

        Raises:
            UserError: VAE or text encoders cannot be loaded.
        """
        cpu, told = torch.device("cpu"), self.note.get("made_by") or {}
        vae, text = self.load_vae(cpu).identity(), self.load_text(cpu).identity()
        made = {
            "program": "fmscale import",
            "vae": {"path": str(self.vae), **_as_told(vae, told.get("vae"))},
            "text": {
                role: {"source": dict(self.text[role]), **_as_told(own, told.get("text", {}).get(role))}
                for role, own in text.items()
            },
            "pipeline": self.pipeline,
            "clip_length": told.get("clip_length"),
            "t5_length": self.t5_length,
        }
        return {**told, **made}


def _as_told(own: Mapping[str, Any], told: Mapping[str, Any] | None) -> dict[str, Any]:
    """The identity of a copy that an export made: by the files of which it is a copy, and by its own."""
    if not told:
        return dict(own)
    return {**told, "copy_sha256": own["sha256"]}


def read_published(place: Path, given: Given = NOTHING) -> Published:
    """Find weights and what there is to know about them; none is read yet.

    Raises:
        UserError: there are none, they are damaged, of a network that is not ours, or do not say enough of themselves.
    """
    place = model_folder(place)
    note = read_note(place)
    file = place if place.is_file() else exported_file(place)
    config = _config(place, file, note, given.config)
    row, brings = PIPELINES[config.model.family], (place / "model_index.json").is_file() and file is None
    text = _text_of(place, note, row) if brings else {}
    return Published(
        place=place.absolute(),
        file=file,
        config=config,
        source=_as_source(lambda: open_source(file or place, config.model.model_dump())),
        note=note,
        vae=Path(given.vae) if given.vae else (place / "vae").absolute() if brings else None,
        text=text | {role: {"path": str(Path(folder).absolute())} for role, folder in given.text_encoders.items()},
        t5_length=given.t5_length or note.get("t5_length") or T5_LENGTHS[row.text],
    )


def _config(place: Path, file: Path | None, note: Mapping[str, Any], like: Path | None) -> TrainConfig:
    """The config of a run that has these weights, as far as anybody knows."""
    settings: dict[str, Any] = {
        "run_dir": str(place),
        "steps": 1,
        "global_batch": 1,
        "micro_batch": 1,
        "data": {"path": NO_DATASET},
    }
    if like is not None:
        theirs = load(TrainConfig, like).model_dump(mode="json")
        settings |= {name: theirs[name] for name in ("model", "flow", "conditioning")}
        settings["model"]["init_from"] = None
    elif place.is_file():
        raise UserError(
            f"{place}: a single file does not say how its network is built; give a train config that does: --config"
        )
    else:
        model = _as_source(lambda: published_model(place))
        model |= _as_source(lambda: learned_positions(file or place, model))
        model |= {"base_size": note["base_size"]} if "base_size" in note else {}
        conditioning = {name: note[name] for name in ("null", "text") if name in note}
        settings |= {"model": model, "flow": note.get("flow") or _scheduled(place), "conditioning": conditioning}
    return check(TrainConfig, settings, str(place))


def _as_source(opened: Callable[[], Any]) -> Any:
    """What was opened; errors do not name the key by which a config gives such weights."""
    try:
        return opened()
    except UserError as error:
        raise UserError(str(error).removeprefix("model.init_from: ")) from None


def _scheduled(place: Path) -> dict[str, Any]:
    """The shift of t, where a pipeline tells it."""
    file = place / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return {}
    scheduler = _read_json(file)
    if not scheduler.get("use_dynamic_shifting"):
        return {"shift": float(scheduler.get("shift", 1.0))}
    (low, base_shift), (high, max_shift) = FLUX_SHIFT
    known = {"base_image_seq_len": low, "max_image_seq_len": high, "base_shift": base_shift, "max_shift": max_shift}
    if wrong := [
        key for key, value in {**known, "time_shift_type": "exponential"}.items() if scheduler.get(key, value) != value
    ]:
        raise UserError(
            f"{file}: shifts t by {wrong[0]} {scheduler[wrong[0]]}, which only FLUX's numbers are known for"
        )
    return {"shift": "flux"}


def _text_of(place: Path, note: Mapping[str, Any], row: Pipeline) -> dict[str, dict[str, str]]:
    """The text encoders that a pipeline names; in one of fmscale's a T5 that says zeros is none.

    Raises:
        UserError: it is another pipeline, or one that it names is not there.
    """
    named, folders = _read_json(place / "model_index.json"), row.folders
    if (given := named.get("_class_name")) != row.name:
        raise UserError(f"{place}: its model_index.json is of a {given}, and its network of a {row.name}")
    found = note.get("encoders") or [
        role
        for role, (model, _) in folders.items()
        if any(named.get(model) or ())  # [null, null] is none
    ]
    for role in found:
        if role not in folders or not all((place / name).is_dir() for name in folders[role]):
            lacking = " and ".join(folders.get(role, (role,)))
            raise UserError(f"{place}: names {role}, and {lacking} are not both there; download or export it again")
    keys = ("path", "tokenizer")
    return {
        role: dict(zip(keys, (str((place / name).absolute()) for name in folders[role]), strict=True)) for role in found
    }


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); export or download it again") from None


@dataclass(frozen=True)
class PublishedRun(Run):
    """Published weights with all that is asked of a run; they are what every kind of its weights is.

    Attributes:
        source: reads them.
    """

    source: Source

    @classmethod
    def of(cls, published: Published, made_by: Mapping[str, Any] | None, weights_sha256: str = "") -> PublishedRun:
        """The run.

        Args:
            published: its weights.
            made_by: of the dataset that it would have been trained on, where that is known.
            weights_sha256: of their files, where one wants to know them again.
        """
        config = published.config
        parameters = blueprint(config.model.family, config.model.model_dump()).state_dict()
        dataset = {"path": NO_DATASET, "generations": [{"fingerprint": published.note.get("dataset_fingerprint")}]}
        description = {
            "imported": {"from": str(published.place), "sha256": weights_sha256},
            "images_seen": published.note.get("images_seen"),
            "config": config.model_dump(mode="json"),
            "dataset": dataset | {"null_sha256": None, "made_by": made_by},
            "null": config.conditioning.null,
            "loss_guard": None,
        }
        index = {
            "format": FORMAT,
            "step": 0,
            "updates": 0,
            "world_size": 1,
            "parameters": {name: list(value.shape) for name, value in parameters.items()},
            "kinds": [WEIGHT],
            "description": description,
        }
        return cls(published.place, config, Checkpoint(published.place, index), published.source)

    def state(self, weights: Weights) -> dict[str, Tensor]:
        """As of a run; `weights` makes no difference."""
        shapes = self.checkpoint.index["parameters"]
        return {name: self.source.read(name, 0, prod(shape)).view(shape) for name, shape in shapes.items()}

    def parts(self, weights: Weights) -> Callable[[str], Iterable[tuple[int, Tensor]]]:
        """As of a run, each parameter as a whole."""
        shapes = self.checkpoint.index["parameters"]
        return lambda name: [(0, self.source.read(name, 0, prod(shapes[name])))]


def open_run_or_published(place: Path, weights: Weights = "ema", step: int | None = None) -> Run:
    """A run directory for reading; or a published pipeline with its encoders, as if it were one.

    Raises:
        UserError: it is neither, is damaged, or has no such weights.
    """
    if not is_published(place):
        return open_run(place, step, weights)
    if weights != "ema" or step is not None:
        raise UserError(f"{place}: an exported folder has one set of weights; leave out step and width of an average")
    published = read_published(place)
    return PublishedRun.of(published, published.made_by(), sha256(*published.source.files))


def is_published(place: Path) -> bool:
    """Whether a folder is a network's or a pipeline's, and no run directory."""
    return not (place / "config.yaml").is_file() and any(
        (place / name).is_file() for name in ("model_index.json", EXPORT_NOTE)
    )
