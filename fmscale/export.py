"""A run -> files that others load, with nothing of fmscale in them, proved against the run before they get their name.

pipeline       a folder of diffusers with all that it takes to draw
transformer    a folder of diffusers with the network alone
single         one file under the names of Stability AI or Black Forest Labs, beside others' as ComfyUI loads them, and
               the configs by which diffusers reads it
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmscale import __version__
from fmscale.config import FlowConfig, ModelConfig, TrainConfig, load
from fmscale.encoders.original import original_text, original_vae
from fmscale.encoders.text import TextEncoders
from fmscale.encoders.vae import Vae
from fmscale.errors import UserError
from fmscale.features import STORAGE
from fmscale.files import new_folder
from fmscale.hub import check_repository, hub_token, push
from fmscale.init_from import EXPORT_NOTE, PREFIXES
from fmscale.log import get_logger
from fmscale.model_card import model_card
from fmscale.models.families import blueprint, file_layout
from fmscale.models.mmdit_names import DIFFUSERS_POSITIONS, position_parts
from fmscale.models.published import Part, check_state
from fmscale.pipelines import PIPELINES, WHOLE, Written, network_config, scheduler_config, stock_classes
from fmscale.runs import Run, Weights, use_run
from fmscale.sample import load_run_text, load_run_vae, parse_roles
from fmscale.self_check import check_export, features_of
from fmscale.stream import MAX_FILE_BYTES, stream_weights, write_file

log = get_logger(__name__)
CPU = torch.device("cpu")
FLUX_PATCH = 2  # of FluxPipeline


class Frozen(NamedTuple):
    """Networks that are exported as they are; None where they are left out."""

    vae: Vae | None
    text: TextEncoders | None


def export_command(args: argparse.Namespace) -> None:
    """`fmscale export`."""
    if args.parts and args.form != "single":
        raise UserError(f"--with: says what goes into a single file, and --form is {args.form}; leave it out")
    if args.shard_gb and args.form == "single":
        raise UserError("--shard-gb: a single file is one file; leave it out")
    held = WHOLE if args.form == "pipeline" else args.parts
    for option, part, given in (("--vae", "vae", args.vae), ("--text-encoder", "text", args.text_encoder)):
        if given and part not in held:
            raise UserError(f"{option}: this export holds no such network; leave it out")
    if args.push:
        check_repository(args.push)
    token = hub_token() if args.push else ""
    weights = args.ema_std or args.weights or "ema"
    write = functools.partial(
        export,
        out=Path(args.out),
        weights=weights,
        dtype=args.dtype,
        form=args.form,
        parts=args.parts,
        max_file_bytes=int(1e9 * args.shard_gb) if args.shard_gb else MAX_FILE_BYTES,
        licence=args.license,
        vae=args.vae,
        text_encoders=parse_roles(args.text_encoder),
    )
    use_run(Path(args.run_dir), args.step, weights, write)
    if args.push:
        push(Path(args.out), args.push, token)


def export(
    run: Run,
    out: Path,
    weights: Weights = "ema",
    dtype: str = "bf16",
    *,
    form: str = "pipeline",
    parts: Collection[str] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
    licence: str | None = None,
    vae: str | None = None,
    text_encoders: dict[str, str] | None = None,
) -> None:
    """Write a run's weights, read them back, and compare.

    Args:
        run: an open run.
        out: folder to make; it appears only when it is whole and says what the run says.
        weights: `ema`, `raw`, or the relative width of an average that is made from snapshots.
        dtype: key of `STORAGE`, of the network; frozen networks stay in float32, in which the data was encoded.
        form: row of `FORMS`.
        parts: of `WHOLE`, what goes into a single file beside the network.
        max_file_bytes: where another file is begun.
        licence: for the card.
        vae: folder of the VAE, where it has moved.
        text_encoders: folders by role, likewise.

    Raises:
        UserError: `out` exists, the checkpoint is damaged or of another model, a frozen network is not the one that
            made the dataset, or this form cannot hold the run.
        OutageError: what was written does not say what the run says.
    """
    row, held = PIPELINES[run.config.model.family], WHOLE if form == "pipeline" else frozenset(parts)
    check_stock(run)
    check_weights(run)
    if "text" in held:
        check_text(run)
    with new_folder(out) as folder:
        frozen = Frozen(
            load_run_vae(run, vae, CPU) if "vae" in held else None,
            load_run_text(run, text_encoders or {}, CPU) if "text" in held else None,
        )
        if frozen.vae is not None and frozen.vae.model.config.shift_factor is None:
            frozen.vae.model.register_to_config(shift_factor=0.0)  # stock pipelines add it all the same
        file = folder / f"{out.absolute().name}.safetensors"
        written = Written(folder, form, held, STORAGE[dtype], file)
        FORMS[form](run, written, weights, frozen, max_file_bytes)
        masked, features = run.config.conditioning.text == "masked", None
        if frozen.text is not None:
            features = features_of(frozen.text, masked)
            frozen = frozen._replace(text=None)  # T5 may be as large as the network, which comes next
        note = _note(run, weights, form, licence)
        note["check"] = check_export(run, weights, written, frozen.vae, features)
        (folder / EXPORT_NOTE).write_text(json.dumps(note, indent=1) + "\n")
        (folder / "README.md").write_text(model_card(run, weights, note, written), encoding="utf-8")
    shown = (run.weight_kind(weights), run.checkpoint.step, out, form, row.name)
    log.info("exported %s weights of step %d to %s: %s, for %s", *shown)


def _write_pipeline(run: Run, written: Written, weights: Weights, frozen: Frozen, max_file_bytes: int) -> None:
    pipeline = _pipeline(run, frozen, zeros=True)
    pipeline.save_config(written.folder)
    components: dict[str, Any] = pipeline.components
    for name, part in components.items():
        if name == "transformer":
            write_transformer(run, written.folder / name, weights, written.dtype, max_file_bytes)
        elif part is not None:
            shards = {"max_shard_size": max_file_bytes} if _has_weights(part) else {}
            part.save_pretrained(written.folder / name, **shards)


def _write_alone(run: Run, written: Written, weights: Weights, frozen: Frozen, max_file_bytes: int) -> None:
    write_transformer(run, written.folder, weights, written.dtype, max_file_bytes)


def _write_single(run: Run, written: Written, weights: Weights, frozen: Frozen, max_file_bytes: int) -> None:
    family, row = run.config.model.family, PIPELINES[run.config.model.family]
    model = blueprint(family, run.config.model.model_dump())
    prefix = PREFIXES["text" in written.parts or "vae" in written.parts or family == "mmdit"]  # FLUX alone has none
    layout = {
        name: [part._replace(name=prefix + part.name) for part in held]
        for name, held in file_layout(family, model, "original").items()
    }
    others = original_vae(frozen.vae, row.text) if frozen.vae is not None else {}
    for encoder in frozen.text.by_role.values() if frozen.text is not None else ():
        others |= original_text(encoder)
    layout |= {name: [Part(name, tuple(value.shape), swapped=False)] for name, value in others.items()}
    learned = _parts(run, weights, model)

    def parts(name: str) -> Iterable[tuple[int, Tensor]]:
        return [(0, others[name].detach().flatten())] if name in others else learned(name)

    full = {DIFFUSERS_POSITIONS, *others}
    dtypes = {name: torch.float32 if name in full else written.dtype for name in layout}
    write_file(written.file, layout, parts, dtypes)
    pipeline = _pipeline(run, frozen, zeros=False)
    pipeline.save_config(written.folder)
    components: dict[str, Any] = pipeline.components
    for name, part in components.items():
        if hasattr(part, "save_config"):  # diffusers'
            part.save_config(written.folder / name)
        elif part is not None:  # transformers'
            (part.config if _has_weights(part) else part).save_pretrained(written.folder / name)


def _has_weights(part: Any) -> bool:
    return isinstance(part, torch.nn.Module)


FORMS: dict[str, Callable[[Run, Written, Weights, Frozen, int], None]] = {
    "pipeline": _write_pipeline,
    "transformer": _write_alone,
    "single": _write_single,
}


def check_stock(run: Run) -> None:
    """Refuse a network that stock pipelines would call otherwise than it was trained.

    Raises:
        UserError: says which key of the run's config they do not know.
    """
    flow, plain = run.config.flow, FlowConfig()
    strange = [name for name in ("path", "prediction", "objective") if getattr(flow, name) != getattr(plain, name)]
    if strange:
        raise UserError(
            f"{run.path}: was trained with flow.{strange[0]}={getattr(flow, strange[0])}, and pipelines of diffusers "
            "know the velocity of the rectified path alone; `fmscale sample` draws from the run itself"
        )
    if run.config.model.leap_embed:
        raise UserError(
            f"{run.path}: was trained with model.leap_embed, which no network of diffusers has; `fmscale sample` draws "
            "from the run itself"
        )
    model = run.config.model
    if model.family == "flux" and model.patch_size != FLUX_PATCH:
        raise UserError(
            f"{run.path}: was trained with model.patch_size={model.patch_size}, and FluxPipeline makes patches of "
            f"{FLUX_PATCH}; `fmscale sample` draws from the run itself"
        )


def check_weights(run: Run) -> None:
    """Refuse a checkpoint of another network than the configs say: that in it, and that of the run.

    Raises:
        UserError: names what differs.
    """
    configs: dict[Path, Callable[[], ModelConfig]] = {
        run.checkpoint.path / "index.json": lambda: run.config.model,
        run.path / "config.yaml": lambda: load(TrainConfig, run.path / "config.yaml").model,
    }
    stored = {name: torch.empty(shape, device="meta") for name, shape in run.checkpoint.index["parameters"].items()}
    for place, read in configs.items():
        model = read()
        expected = blueprint(model.family, model.model_dump()).state_dict()
        try:
            check_state(stored, {name: tuple(value.shape) for name, value in expected.items()})
        except UserError as error:
            raise UserError(f"{place}: is of another model than {run.checkpoint.path}: {error}") from None


def check_text(run: Run) -> None:
    """Refuse a run whose text a stock pipeline would encode otherwise.

    Raises:
        UserError: says what its dataset lacks.
    """
    row, made = PIPELINES[run.config.model.family], run.made_by
    if missing := [role for role in row.needs if role not in made["text"]]:
        raise UserError(
            f"{run.path}: was trained without {missing[0]}, which {row.name} needs; give --form transformer, or encode "
            "the data with it"
        )
    if (given := made.get("pipeline", "sd3")) != row.text:
        raise UserError(
            f"{run.path}: its text was encoded as for text.pipeline {given}, {row.name} encodes it as {row.text}; give "
            "--form transformer"
        )


def _pipeline(run: Run, frozen: Frozen, zeros: bool) -> Any:
    """The stock pipeline, its network without memory for weights.

    Args:
        run: that is exported.
        frozen: what goes into it.
        zeros: where the run is without T5, there is one that says zeros.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    row, (pipeline, _) = PIPELINES[run.config.model.family], stock_classes(run.config.model.family)
    encoders = {} if frozen.text is None else {r: (e.model, e.tokenizer) for r, e in frozen.text.by_role.items()}
    if zeros and "t5" not in encoders:
        encoders["t5"] = _t5_of_zeros(run)
    parts: dict[str, Any] = {}
    for role, names in row.folders.items():
        parts |= zip(names, encoders.get(role, (None, None)), strict=True)
    return pipeline(
        transformer=_blueprint(run),
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler_config(run.config)),
        vae=None if frozen.vae is None else frozen.vae.model,
        **parts,
    )


def _t5_of_zeros(run: Run) -> tuple[Any, Any]:
    """For a run without T5 a tiny one whose every token is zero, as the run was trained, and its tokenizer.

    `from_pretrained` of diffusers 0.42 refuses a folder whose text_encoder_3 is null, unless its caller says so.
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer(extra_ids=0)
    config = T5Config(
        d_model=run.config.model.context_dim,
        d_kv=1,
        d_ff=1,
        num_layers=1,
        num_heads=1,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
    )
    model = T5EncoderModel(config).eval()
    torch.nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model, tokenizer


def _blueprint(run: Run) -> Any:
    """The network as diffusers builds it, without memory for its weights."""
    _, network = stock_classes(run.config.model.family)
    with torch.device("meta"):
        return network(**network_config(run.config.model))


def write_transformer(
    run: Run, folder: Path, weights: Weights, dtype: torch.dtype, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write a run's network as a folder of diffusers, a little at a time.

    Args:
        run: an open run.
        folder: to make.
        weights: as for `export`.
        dtype: of the weights; a position grid stays in float32, since 16 bits would move the positions.
        max_file_bytes: where another file is begun.

    Raises:
        UserError: the checkpoint is damaged, or has no such weights.
    """
    family = run.config.model.family
    model = blueprint(family, run.config.model.model_dump())
    _blueprint(run).save_config(folder)
    layout = file_layout(family, model, "diffusers")
    stream_weights(folder, layout, _parts(run, weights, model), dtype, {DIFFUSERS_POSITIONS}, max_file_bytes)


def _parts(run: Run, weights: Weights, model: Any) -> Callable[[str], Iterable[tuple[int, Tensor]]]:
    """Reads weights a little at a time, and computes the position grid."""
    learned = run.parts(weights)
    return lambda name: position_parts(model) if name == DIFFUSERS_POSITIONS else learned(name)


def _note(run: Run, weights: Weights, form: str, licence: str | None) -> dict[str, Any]:
    """What sampling with fmscale needs and diffusers' files have no place for, and where the weights come from."""
    model, made = run.config.model, run.description["dataset"]["made_by"] or {}
    network = blueprint(model.family, model.model_dump())
    return {
        "fmscale": __version__,
        "form": form,
        "family": model.family,
        "step": run.checkpoint.step,
        "images_seen": run.description["images_seen"],
        "weights": run.weight_kind(weights),
        "null": run.config.conditioning.null,
        "text": run.config.conditioning.text,
        "t5_length": made.get("t5_length"),
        "encoders": sorted(made.get("text", {})),
        "made_by": made or None,
        "base_size": model.base_size,
        "flow": run.config.flow.model_dump(mode="json"),
        "position_origin": getattr(network, "position_origin", None),
        "position_step": getattr(network, "position_step", None),
        "dataset_fingerprint": run.description["dataset"]["generations"][-1]["fingerprint"],
        "licence": licence,
    }
