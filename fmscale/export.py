"""A run -> a folder that stock diffusers loads as `StableDiffusion3Pipeline`, with nothing of fmscale in it."""

from __future__ import annotations

import argparse
import functools
import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmscale import __version__
from fmscale.errors import UserError
from fmscale.features import STORAGE
from fmscale.files import new_folder
from fmscale.log import get_logger
from fmscale.models import blueprint
from fmscale.models.mmdit_names import DIFFUSERS_POSITIONS, diffusers_config, diffusers_layout, position_parts
from fmscale.runs import Run, Weights, use_run
from fmscale.sample import EXPORT_NOTE, load_frozen, parse_roles
from fmscale.stream import stream_weights

log = get_logger(__name__)


def export_command(args: argparse.Namespace) -> None:
    """`fmscale export`."""
    weights = args.ema_std or args.weights or "ema"
    write = functools.partial(
        export,
        out=Path(args.out),
        weights=weights,
        dtype=args.dtype,
        vae=args.vae,
        text_encoders=parse_roles(args.text_encoder),
    )
    use_run(Path(args.run_dir), args.step, weights, write)


def export(
    run: Run,
    out: Path,
    weights: Weights = "ema",
    dtype: str = "bf16",
    *,
    vae: str | None = None,
    text_encoders: dict[str, str] | None = None,
) -> None:
    """Write a whole pipeline folder.

    Args:
        run: an open run.
        out: folder to make; it appears only when it is whole.
        weights: `ema`, `raw`, or the relative width of an average that is made from snapshots.
        dtype: key of `STORAGE`, of the transformer.
        vae: folder of the VAE, where it has moved.
        text_encoders: folders by role, likewise.

    Raises:
        UserError: `out` exists, the checkpoint is damaged, or a frozen network is not the one that made the dataset.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    if (family := run.config.model.family) != "mmdit":
        raise UserError(
            f"{run.path}: its model.family is {family}, and export writes pipelines of Stable Diffusion 3 alone; "
            "`fmscale sample` draws from the run itself"
        )
    with new_folder(out) as folder:
        frozen_vae, text = load_frozen(run, vae, text_encoders or {}, torch.device("cpu"))
        encoders = text.by_role
        if missing := [role for role in ("clip_l", "clip_g") if role not in encoders]:
            raise UserError(f"{run.path}: was trained without {missing[0]}, which StableDiffusion3Pipeline needs")
        if frozen_vae.model.config.shift_factor is None:  # which the stock pipeline adds all the same
            frozen_vae.model.register_to_config(shift_factor=0.0)
        t5_model, t5_tokenizer = _t5(encoders, run.config.model.context_dim)
        pipeline = StableDiffusion3Pipeline(
            transformer=_blueprint(run),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=run.config.flow.shift),
            vae=frozen_vae.model,
            text_encoder=encoders["clip_l"].model,
            tokenizer=encoders["clip_l"].tokenizer,
            text_encoder_2=encoders["clip_g"].model,
            tokenizer_2=encoders["clip_g"].tokenizer,
            text_encoder_3=t5_model,
            tokenizer_3=t5_tokenizer,
        )
        pipeline.save_config(folder)
        for name, part in pipeline.components.items():
            if name == "transformer":
                write_transformer(run, folder / name, weights, STORAGE[dtype])
            elif part is not None:
                part.save_pretrained(folder / name)
        (folder / EXPORT_NOTE).write_text(json.dumps(_note(run, weights), indent=1) + "\n")
        (folder / "README.md").write_text(model_card(run, weights, dtype))
    log.info("exported %s weights of step %d to %s", run.weight_kind(weights), run.checkpoint.step, out)


def _t5(encoders: dict[str, Any], context_dim: int) -> tuple[Any, Any]:
    """T5 and its tokenizer; for a run without T5 a tiny one whose every token is zero, as the run was trained.

    `from_pretrained` of diffusers 0.42 refuses a folder whose text_encoder_3 is null, unless its caller says so.
    """
    if "t5" in encoders:
        return encoders["t5"].model, encoders["t5"].tokenizer
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer(extra_ids=0)
    config = T5Config(
        d_model=context_dim,
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
    """The transformer as diffusers builds it, without memory for its weights."""
    from diffusers import SD3Transformer2DModel

    model = run.config.model
    with torch.device("meta"):
        return SD3Transformer2DModel(**diffusers_config(model.model_dump(), model.base_size * model.patch_size))


def write_transformer(run: Run, folder: Path, weights: Weights, dtype: torch.dtype) -> None:
    """Write a run's network as SD3Transformer2DModel, a little at a time.

    Args:
        run: an open run.
        folder: to make.
        weights: as for `export`.
        dtype: of the weights; the position grid stays in float32, since 16 bits would move the positions.

    Raises:
        UserError: the checkpoint is damaged, or has no such weights.
    """
    model = blueprint(run.config.model.family, run.config.model.model_dump())
    _blueprint(run).save_config(folder)
    learned = run.parts(weights)

    def parts(name: str) -> Iterable[tuple[int, Tensor]]:
        return position_parts(model) if name == DIFFUSERS_POSITIONS else learned(name)

    stream_weights(folder, diffusers_layout(model), parts, dtype, full={DIFFUSERS_POSITIONS})


def _note(run: Run, weights: Weights) -> dict[str, Any]:
    """What sampling with fmscale needs and diffusers' files have no place for."""
    model = blueprint(run.config.model.family, run.config.model.model_dump())
    return {
        "fmscale": __version__,
        "step": run.checkpoint.step,
        "images_seen": run.description["images_seen"],
        "weights": run.weight_kind(weights),
        "null": run.config.conditioning.null,
        "text": run.config.conditioning.text,
        "t5_length": run.made_by["t5_length"],
        "encoders": sorted(run.made_by["text"]),
        "base_size": run.config.model.base_size,
        "position_origin": model.position_origin,
        "position_step": model.position_step,
        "dataset_fingerprint": run.description["dataset"]["generations"][-1]["fingerprint"],
    }


def model_card(run: Run, weights: Weights, dtype: str) -> str:
    """README.md of the folder: what it is, how it was trained, and a snippet that runs."""
    note, config = _note(run, weights), run.config
    count = sum(torch.Size(shape).numel() for shape in run.checkpoint.index["parameters"].values())
    rows = {
        "architecture": f"MMDiT, {count:,} parameters, {config.model.layers} layers",
        "weights": f"{note['weights']} of step {note['step']:,}, stored as {dtype}",
        "images seen": f"{note['images_seen']:,}",
        "dataset": f"fingerprint {note['dataset_fingerprint'][:16]}",
        "timesteps": f"{config.flow.timesteps}, shift {config.flow.shift:g}",
        "null conditioning": _NULL_TEXT[config.conditioning.null],
        "text padding": _PADDING_TEXT[config.conditioning.text],
        "text length": f"{note['t5_length']} T5 tokens" + ("" if "t5" in run.made_by["text"] else ", all zeros"),
        "licence": "not stated; yours to choose",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    snippet = _masked_snippet(run) if note["text"] == "masked" else _snippet(run)
    return f"# A model trained with fmscale\n\n| | |\n|---|---|\n{table}\n\n```python\n{snippet}```\n"


_NULL_TEXT = {
    "empty": "the encoded empty caption, which pipelines feed for guidance unless told otherwise",
    "zeros": "zeros: pass zeros as negative_prompt_embeds and negative_pooled_prompt_embeds, as below",
}


_PADDING_TEXT = {
    "padded": "seen by the model, as pipelines show it",
    "masked": "never seen by the model: give the transformer each caption's own tokens alone, as below",
}


def _side_px(run: Run) -> int:
    return run.config.model.base_size * run.config.model.patch_size * run.made_by["vae"]["factor"]


def _snippet(run: Run) -> str:
    length, side = run.made_by["t5_length"], _side_px(run)
    extra = f", max_sequence_length={length}" if length != 256 else ""
    head = textwrap.dedent("""\
        from diffusers import StableDiffusion3Pipeline

        pipe = StableDiffusion3Pipeline.from_pretrained("PATH OF THIS FOLDER")
        prompt = "what the image shows"
        """)
    if run.config.conditioning.null == "empty":
        call = f"pipe(prompt, height={side}, width={side}, guidance_scale=4.0{extra})"
        return f"{head}image = {call}.images[0]\n"
    return head + textwrap.dedent(f"""\
        tokens, _, pooled, _ = pipe.encode_prompt(prompt, None, None, do_classifier_free_guidance=False{extra})
        image = pipe(
            prompt_embeds=tokens, pooled_prompt_embeds=pooled,
            negative_prompt_embeds=0 * tokens, negative_pooled_prompt_embeds=0 * pooled,
            height={side}, width={side}, guidance_scale=4.0,
        ).images[0]
        """)


def _masked_snippet(run: Run) -> str:
    """The stock pipeline on text without its padding, which is to have one length for all: NaN marks what goes."""
    length, side, has_t5 = run.made_by["t5_length"], _side_px(run), "t5" in run.made_by["text"]
    t5 = f"len(pipe.tokenizer_3(prompt, truncation=True, max_length={length}).input_ids)" if has_t5 else "0"
    null = 'negative, negative_pooled = embed("")'
    if run.config.conditioning.null == "zeros":
        null = "negative, negative_pooled = torch.full_like(tokens, torch.nan), torch.zeros_like(pooled)\n"
        null += f"negative[:, {'[0, clip_length]' if has_t5 else '0'}] = 0"
    head = textwrap.dedent(f"""\
        import torch
        from diffusers import StableDiffusion3Pipeline

        pipe = StableDiffusion3Pipeline.from_pretrained("PATH OF THIS FOLDER")
        clip_length, stock_forward = pipe.tokenizer_max_length, pipe.transformer.forward


        def embed(prompt):  # with NaN in place of the padding: of CLIP's tokens, then of T5's
            tokens, _, pooled, _ = pipe.encode_prompt(
                prompt, None, None, do_classifier_free_guidance=False, max_sequence_length={length}
            )
            clips = pipe.tokenizer, pipe.tokenizer_2
            most = max(len(clip(prompt, truncation=True, max_length=clip_length).input_ids) for clip in clips)
            tokens[:, most:clip_length] = torch.nan
            tokens[:, clip_length + {t5} :] = torch.nan
            return tokens, pooled


        def forward(hidden_states, timestep, encoder_hidden_states, pooled_projections, **options):
            velocities = []
            for latents, t, tokens, pooled in zip(hidden_states, timestep, encoder_hidden_states, pooled_projections):
                own = tokens[~tokens.isnan().any(dim=1)]
                velocities.append(stock_forward(latents[None], own[None], pooled[None], t[None], **options)[0])
            return (torch.cat(velocities),)


        pipe.transformer.forward = forward
        tokens, pooled = embed("what the image shows")
        """)
    return f"{head}{null}\n" + textwrap.dedent(f"""\
        image = pipe(
            prompt_embeds=tokens, pooled_prompt_embeds=pooled,
            negative_prompt_embeds=negative, negative_pooled_prompt_embeds=negative_pooled,
            height={side}, width={side}, guidance_scale=4.0,
        ).images[0]
        """)
