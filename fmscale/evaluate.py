"""`fmscale evaluate`: how well trained weights do on a dataset, in figures and plots.

held-out loss        validation.HeldOut, as training measures it
ways of samples      flow/trajectory over the learned field ──► straightness, error of few steps
drawn images         real = stored latents, decoded ──► encoders/{inception, clip_pair} ──► quality: FID, KID, …
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fmscale import __version__
from fmscale.config import DataConfig, TrainConfig
from fmscale.data.mixture import Mixture
from fmscale.data.tar import DamageError
from fmscale.dataset import Dataset, making, open_mixture
from fmscale.distributed import World, world_from_environment
from fmscale.encoders.clip_pair import ClipPair
from fmscale.encoders.inception import Inception
from fmscale.errors import UserError
from fmscale.files import new_folder
from fmscale.flow.solver import check_guidance
from fmscale.init_from import EXPORT_NOTE, read_note
from fmscale.judging import Judge, Picture, Settings, judge, trace
from fmscale.log import get_logger
from fmscale.pictures import check_solver, contact_sheet, default_solver, guidance_of
from fmscale.plots import NAMES, write_plots
from fmscale.quality import FEWEST, KID_SUBSET, KID_SUBSETS, NEIGHBOURS
from fmscale.runs import Weights, open_run
from fmscale.sample import Generator, open_generator, parse_roles
from fmscale.validation import RAW, HeldOut, choose, open_beside

log = get_logger(__name__)
EVALUATION = "evaluation.json"  # in the folder that is made
STEPS, LEAPS = (1, 2, 4, 8, 28), (1, 2, 4, 8)


class Subject(NamedTuple):
    """What is evaluated, and on what.

    Attributes:
        identity: source, step and name of the weights.
        generator: draws.
        mixture: the dataset.
        trained_on: fingerprint of the data that it was trained on; None where nobody wrote it down.
        config: of a run; None for an exported folder.
        dataset: for the network of a run; None for an exported folder.
    """

    identity: dict[str, Any]
    generator: Generator
    mixture: Mixture
    trained_on: str | None
    config: TrainConfig | None = None
    dataset: Dataset | None = None


def evaluate_command(args: argparse.Namespace) -> None:
    """`fmscale evaluate`: make the folder `args.out` and print a table."""
    with new_folder(Path(args.out)) as folder:
        check_packages("matplotlib", *(["torchmetrics"] if args.inception or args.clip else []))
        judges = open_judges(args.inception, args.clip)
        subject = open_subject(args)
        settings = settings_of(args, subject)
        pictures, damaged = read_pictures(subject.mixture, args.images)
        check_pictures(subject, pictures, judges, settings)
        record = describe(subject, pictures, judges, settings) | {"damaged": damaged}
        record["left_out"] = left_out(subject, len(pictures), judges)
        for line in record["left_out"]:
            log.info("left out: %s", line)
        record["validation"] = held_out_loss(subject, args.images, settings)
        traces, sheet = trace(subject.generator, subject.mixture, pictures, settings)
        record["trajectories"], errors = traces.record(), traces.by_steps()
        record["real"], figures = judge(subject.generator, subject.mixture, pictures, judges, settings)
        record["by_steps"] = [{"steps": steps, **errors[steps], **figures.get(steps, {})} for steps in settings.steps]
        text = json.dumps(_plain(record), indent=1, allow_nan=False)
        (folder / EVALUATION).write_text(text + "\n", encoding="utf-8")
        contact_sheet(*sheet, columns=len(settings.steps) + 2).save(folder / "samples.png")
        write_plots(record, folder)
    print("\n".join(table(record)))
    log.info("%s: %s and plots", args.out, EVALUATION)


def check_packages(*names: str) -> None:
    """Refuse to begin what could not be ended; they are not imported, which takes seconds.

    Raises:
        UserError: one is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"this needs the package {name}: pip install 'fmscale[evaluate]'")


def open_judges(inception: str | None, clip: str | None) -> dict[str, Judge]:
    """The networks whose features are compared.

    Raises:
        UserError: one cannot be loaded from what was given.
    """
    device, judges = world_from_environment().device, dict[str, Judge]()
    if inception is not None:
        judges["inception"] = Inception(Path(inception), device)
    if clip is not None:
        judges["clip"] = ClipPair(clip, device)
    return judges


def open_subject(args: argparse.Namespace) -> Subject:
    """What the command line names, checked against one another.

    Raises:
        UserError: the source, its networks or the dataset cannot be used, or do not belong together.
    """
    source, weights = Path(args.source), args.ema_std or args.weights
    options: dict[str, Any] = {"vae": args.vae, "text_encoders": parse_roles(args.text_encoder)}
    if (source / EXPORT_NOTE).is_file():
        return _of_export(source, args.data, open_generator(source, step=args.step, weights=weights, **options))
    if (source / "model_index.json").is_file():
        raise UserError(f"{source}: a pipeline that fmscale did not export; make a run of it: fmscale import")
    return _of_run(source, args.step, weights or "ema", args.data, options)


def _of_run(source: Path, step: int | None, weights: Weights, data: str, options: Mapping[str, Any]) -> Subject:
    run = open_run(source, step, weights)
    dataset = open_beside(run.config, data)
    _check_stored(dataset.mixture)
    if making(run.made_by) != making(dataset.mixture.made_by):
        raise UserError(
            f"--data: {data} and the dataset of {source} were not made by the same VAE and text encoders; give one "
            "that was encoded as the run's"
        )
    step, name = run.checkpoint.step, RAW if weights == RAW else run.weight_kind(weights)
    identity = {"path": str(source), "kind": "run", "step": step, "weights": name}
    trained_on = run.description["dataset"]["generations"][-1]["fingerprint"]
    generator = open_generator(source, step=step, weights=weights, **options)
    return Subject(identity, generator, dataset.mixture, trained_on, run.config, dataset)


def _of_export(source: Path, data: str, generator: Generator) -> Subject:
    note = read_note(source)
    mixture = open_mixture(DataConfig(path=data))
    _check_stored(mixture)
    given, made = generator.vae.identity(), mixture.made_by.get("vae", {})
    if wrong := [key for key in ("channels", "factor", "scale", "shift") if given[key] != made.get(key)]:
        raise UserError(
            f"--data: {data} was not made by the VAE of {source}: {wrong[0]} {made.get(wrong[0])} instead of "
            f"{given[wrong[0]]}; give a dataset that was encoded as the run's"
        )
    for bucket in mixture.buckets:
        generator.latent_shape(bucket.height * generator.vae.factor, bucket.width * generator.vae.factor)
    identity = {"path": str(source), "kind": "export", "step": note["step"], "weights": note["weights"]}
    return Subject(identity, generator, mixture, note.get("dataset_fingerprint"))


def _check_stored(mixture: Mixture) -> None:
    if mixture.raw is not None:
        raise UserError(
            f"--data: {mixture.name} holds images that training encodes; give a dataset that `fmscale encode` made"
        )


def settings_of(args: argparse.Namespace, subject: Subject) -> Settings:
    """How the command line wants it drawn.

    Raises:
        UserError: the model cannot be drawn from so.
    """
    generator = subject.generator
    solver = args.solver or default_solver(generator.flow)
    check_solver(solver, generator.flow)
    if solver == "dopri5":
        raise UserError("--solver: dopri5 chooses its own steps, so their number tells nothing; give another")
    guidance = guidance_of(args.guidance_scale, generator.takes_guidance)
    guidance = guidance._replace(interval=tuple(args.guidance_interval), rescale=args.guidance_rescale)
    check_guidance(guidance.interval, guidance.rescale)
    steps = args.steps or (STEPS if generator.flow.objective == "velocity" else LEAPS)
    seed = args.seed if args.seed is not None else subject.config.seed if subject.config else 0
    return Settings(tuple(sorted(set(steps))), solver, guidance, seed, args.batch, args.trace_steps)


def read_pictures(mixture: Mixture, images: int) -> tuple[list[Picture], list[str]]:
    """About so many pictures, those of which the held-out loss is measured too, and the keys of damaged ones.

    Raises:
        UserError: the dataset has no captions.
    """
    pictures, damaged = [], []
    for bucket, addresses in choose(mixture, images):
        for address in addresses:
            key = mixture.key(address)
            try:
                meta = mixture.sample(address).read_meta()
            except DamageError as error:
                log.warning("skipped %s: %s", key, error)
                damaged.append(key)
                continue
            pictures.append(Picture(bucket, address, key, str(meta.get("caption", ""))))
    if not any(picture.caption for picture in pictures):
        raise UserError(f"--data: {mixture.name} has no captions to draw; encode one with captions")
    return pictures, damaged


def check_pictures(subject: Subject, pictures: list[Picture], judges: Mapping[str, Judge], settings: Settings) -> None:
    """Refuse what would be found out late, and warn of what misleads.

    Raises:
        UserError: too few images to compare, or a number of steps that the model has not learned.
    """
    if judges and len(pictures) < FEWEST:
        raise UserError(f"--images: {len(pictures)} images are too few to compare; give {FEWEST} or more, or thousands")
    for picture in {picture.bucket: picture for picture in pictures}.values():
        for steps in settings.steps:
            subject.generator.times(picture.bucket.height, picture.bucket.width, steps, settings.solver)
    if subject.trained_on == subject.mixture.fingerprint:
        log.warning("%s is what was trained on: a low loss on it may be learned by heart", subject.mixture.name)


def describe(
    subject: Subject, pictures: list[Picture], judges: Mapping[str, Judge], settings: Settings
) -> dict[str, Any]:
    """What every figure was measured on, and with."""
    guidance, mixture = settings.guidance, subject.mixture
    return {
        "fmscale": __version__,
        "torch": torch.__version__,
        "device": str(subject.generator.device),
        "source": subject.identity,
        "dataset": {
            "path": mixture.name,
            "fingerprint": mixture.fingerprint,
            "images": len(pictures),
            "trained_on": None if subject.trained_on is None else subject.trained_on == mixture.fingerprint,
        },
        "drawing": {
            "solver": settings.solver,
            "steps": list(settings.steps),
            "guidance_scale": guidance.scale if guidance.told is None else guidance.told,
            "guidance_interval": list(guidance.interval),
            "guidance_rescale": guidance.rescale,
            "shift": subject.generator.flow.shift,
            "seed": settings.seed,
            "vae": subject.generator.vae.identity(),
        },
        "judges": {name: one.identity() for name, one in judges.items()},
        "kid": {"subsets": KID_SUBSETS, "images": min(KID_SUBSET, len(pictures) // 2)},
        "precision_recall": {"neighbours": NEIGHBOURS},
    }


def left_out(subject: Subject, images: int, judges: Mapping[str, Judge]) -> list[str]:
    """What is not in the result, one line each, with what would bring it in."""
    lines = []
    if subject.dataset is None:
        lines.append("the loss: an exported folder does not say how it was trained; give the run directory")
    if "inception" not in judges:
        lines.append("FID, KID, precision and recall by Inception: give --inception FILE")
    if "clip" not in judges:
        lines.append("CLIP score, and FID, KID, precision and recall by CLIP: give --clip DIR, or NAME=FILE")
    lines += [
        f"FID by {name}: its {one.width} features need more images than the {images} here; KID needs no more"
        for name, one in judges.items()
        if images <= one.width
    ]
    return lines


def held_out_loss(subject: Subject, images: int, settings: Settings) -> dict[str, Any] | None:
    """The loss as training's `validation` measures it; None for an exported folder."""
    if subject.dataset is None or subject.config is None:
        return None
    held_out = HeldOut(
        subject.dataset,
        images,
        seed=settings.seed,
        flow=subject.config.flow,
        context_dim=subject.config.model.context_dim,
        world=World(0, 0, 1),
        micro_batch=settings.batch,
    )
    return {"weights": subject.identity["weights"], "seed": settings.seed, **held_out.losses(subject.generator.model)}


def table(record: Mapping[str, Any]) -> list[str]:
    """The figures that one looks at first, as lines of text."""
    traced, loss = record["trajectories"], record["validation"]
    lines = [] if loss is None else [f"loss {loss['loss']:.4f} on {loss['images']} images, {loss['weights']} weights"]
    lines.append(f"straightness {traced['straightness']['mean']:.4f}, mean of {traced['images']} images; 1 is straight")
    if "clip_score" in record["real"]:
        lines.append(f"CLIP score of the {record['dataset']['images']} real images {record['real']['clip_score']:.2f}")
    columns: dict[str, list[float | None]] = {
        "evaluations": [row["evaluations"] for row in record["by_steps"]],
        "error": [row["relative_error"] for row in record["by_steps"]],
    }
    if "clip" in record["judges"]:
        columns["CLIP score"] = [row["clip_score"] for row in record["by_steps"]]
    lines += _block(record, columns)
    for name in record["judges"]:
        heads = {"fid": "FID", "kid": "KID", "precision": "precision", "recall": "recall"}
        found = {key: [row[name][key] for row in record["by_steps"]] for key in heads}
        lines += _block(record, {f"{NAMES[name]} {head}": found[key] for key, head in heads.items()})
    return lines


def _block(record: Mapping[str, Any], columns: Mapping[str, Sequence[float | None]]) -> list[str]:
    """Columns of numbers, one number for each number of steps."""
    cells = [["steps", *(str(steps) for steps in record["drawing"]["steps"])]]
    for head, values in columns.items():
        cells.append([head, *("-" if value is None else f"{value:.4g}" for value in values)])
    widths = [max(map(len, column)) for column in cells]
    rows = zip(*cells, strict=True)
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _plain(value: Any) -> Any:
    """The same without numbers that JSON does not know: they become null."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
