"""README.md of an export: what the weights are, how they were trained, and lines that draw with them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np

from fmscale.engine.metrics import read_metrics
from fmscale.features import STORAGE
from fmscale.files import read_records
from fmscale.pipelines import PIPELINES, Written, reads_single_files
from fmscale.runs import Run, Weights
from fmscale.validation import RAW, VALIDATION

LOSSES = 100  # steps whose mean is the loss that is told: single steps are noisy
PLACE = "PATH OF THIS FOLDER"
_NULL_TEXT = {
    "empty": "the encoded empty caption, which pipelines feed for guidance unless told otherwise",
    "zeros": "zeros: pass zeros as negative_prompt_embeds and negative_pooled_prompt_embeds, as below",
}
_PADDING_TEXT = {
    "padded": "seen by the model, as pipelines show it",
    "masked": "never seen by the model: give the transformer each caption's own tokens alone, as below",
}


def model_card(run: Run, weights: Weights, note: Mapping[str, Any], written: Written) -> str:
    """The card.

    Args:
        run: that was exported.
        weights: as for `export`.
        note: what fmscale.json will hold.
        written: what was.
    """
    config, made = run.config, run.description["dataset"]["made_by"] or {}
    count = sum(int(np.prod(shape)) for shape in run.checkpoint.index["parameters"].values())
    single = f" and {config.model.single_layers}" if config.model.family == "flux" else ""
    rows = {
        "architecture": f"{_FAMILIES[config.model.family]}, {count:,} parameters, {config.model.layers}{single} layers",
        "weights": f"{note['weights']} of step {note['step']:,}, stored as {_DTYPES[written.dtype]}",
        "images seen": "" if note["images_seen"] is None else f"{note['images_seen']:,}",
        "dataset": f"fingerprint {note['dataset_fingerprint'][:16]}" if note["dataset_fingerprint"] else "",
        "timesteps": f"{config.flow.timesteps}, shift {config.flow.shift}",
        **_metrics(run, weights),
        "null conditioning": _NULL_TEXT[config.conditioning.null],
        "text padding": _PADDING_TEXT[config.conditioning.text],
        "text length": _lengths(run, made),
        "checked": _checked(note["check"]),
        "licence": note["licence"] or "not stated; yours to choose",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value)
    head = ["library_name: diffusers", "pipeline_tag: text-to-image"]
    head += [f"license: {note['licence']}"] if note["licence"] else []
    front = "\n".join(["---", *head, "---"])
    lines = snippet(run, written)
    return f"{front}\n\n# A model trained with fmscale\n\n| | |\n|---|---|\n{table}\n\n```python\n{lines}```\n"


_FAMILIES, _DTYPES = {"mmdit": "MMDiT", "flux": "FLUX"}, {dtype: name for name, dtype in STORAGE.items()}


def _metrics(run: Run, weights: Weights) -> dict[str, str]:
    """The training loss of the last steps, and the loss on held-out images that was measured last."""
    step, rows = run.checkpoint.step, dict[str, str]()
    losses = [
        (record["step"], record["loss"]) for record in read_metrics(run.path / "metrics.jsonl") if "loss" in record
    ]
    if losses := [pair for pair in losses if pair[0] <= step][-LOSSES:]:
        mean, first, last = np.mean([loss for _, loss in losses]), losses[0][0], losses[-1][0]
        rows["training loss"] = f"{mean:.4f}, mean of steps {first:,} to {last:,}"
    kind = RAW if weights == "raw" else run.weight_kind(weights)
    held_out = [
        each for each in read_records(run.path / VALIDATION) if each["weights"] == kind and each["step"] <= step
    ]
    if held_out:
        newest = held_out[-1]
        rows["validation loss"] = f"{newest['loss']:.4f} of {newest['images']:,} images at step {newest['step']:,}"
    return rows


def _lengths(run: Run, made: Mapping[str, Any]) -> str:
    if "t5_length" not in made:
        return ""
    absent = ", all zeros" if run.config.model.family == "mmdit" and "t5" not in made.get("text", {}) else ""
    return f"{made['t5_length']} T5 tokens{absent}"


def _checked(check: Mapping[str, Any]) -> str:
    return f"velocity read back by {check['read_by']}: {check['velocity']['difference']:.1e} from the run's"


def snippet(run: Run, written: Written) -> str:
    """Lines that load the files and, where all is there that it takes, draw with them."""
    row, file = PIPELINES[run.config.model.family], f"{PLACE}/{written.file.name}"
    if written.form == "single" and not reads_single_files(run.config.model):
        why = "# for ComfyUI: diffusers reads single files of FLUX that are 3072 wide alone\n"
        return f'{why}from safetensors.torch import load_file\n\nweights = load_file("{file}")\n'
    single = f'from_single_file("{file}", config="{PLACE}"'
    if not written.draws:
        call = f'{single}, subfolder="transformer")' if written.form == "single" else f'from_pretrained("{PLACE}")'
        return f"from diffusers import {row.network}\n\ntransformer = {row.network}.{call}\n"
    call = f"{single}{_absent(run)})" if written.form == "single" else f'from_pretrained("{PLACE}")'
    head = f"from diffusers import {row.name}\n\npipe = {row.name}.{call}\n"
    if written.form == "single" and "t5" in run.made_by["text"]:
        head += f"pipe.{row.folders['t5'][0]}.eval()  # from_single_file leaves it with its dropout\n"
    if run.config.model.family == "flux":
        return _flux_lines(run, head)
    return _masked_snippet(run, head) if run.config.conditioning.text == "masked" else head + _sd3_lines(run)


def _absent(run: Run) -> str:
    """What a single file has no text encoder for."""
    folders = PIPELINES[run.config.model.family].folders
    names = [name for role, pair in folders.items() if role not in run.made_by["text"] for name in pair]
    return "".join(f", {name}=None" for name in names)


def _side_px(run: Run) -> int:
    return run.config.model.base_size * run.config.model.patch_size * run.made_by["vae"]["factor"]


def _sd3_lines(run: Run) -> str:
    length, side = run.made_by["t5_length"], _side_px(run)
    extra = f", max_sequence_length={length}" if length != 256 else ""
    head = 'prompt = "what the image shows"\n'
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


def _masked_snippet(run: Run, load: str) -> str:
    """The stock pipeline on text without its padding, which is to have one length for all: NaN marks what goes."""
    length, side, has_t5 = run.made_by["t5_length"], _side_px(run), "t5" in run.made_by["text"]
    t5 = f"len(pipe.tokenizer_3(prompt, truncation=True, max_length={length}).input_ids)" if has_t5 else "0"
    null = 'negative, negative_pooled = embed("")'
    if run.config.conditioning.null == "zeros":
        null = "negative, negative_pooled = torch.full_like(tokens, torch.nan), torch.zeros_like(pooled)\n"
        null += f"negative[:, {'[0, clip_length]' if has_t5 else '0'}] = 0"
    head = f"import torch\n{load}" + textwrap.dedent(f"""\
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


def _flux_lines(run: Run, load: str) -> str:
    """FLUX that guides by a second run of the network, as fmscale trains it: one that is told is told 1."""
    length, side, null = run.made_by["t5_length"], _side_px(run), run.config.conditioning.null
    told = ", guidance_scale=1.0" if run.takes_guidance else ""
    size, embedded = f"height={side}, width={side}, true_cfg_scale=4.0{told}", f"max_sequence_length={length}"
    if run.config.conditioning.text == "masked":
        return _masked_flux(load, length, null, size)
    head = load + 'prompt = "what the image shows"\n'
    if null == "empty":
        return f'{head}image = pipe(prompt, negative_prompt="", {size}, {embedded}).images[0]\n'
    negative = "negative, negative_pooled = 0 * tokens, 0 * pooled\n"
    return f"{head}tokens, pooled, _ = pipe.encode_prompt(prompt, {embedded})\n{negative}" + _flux_call(size)


def _flux_call(size: str) -> str:
    return textwrap.dedent(f"""\
        image = pipe(
            prompt_embeds=tokens, pooled_prompt_embeds=pooled,
            negative_prompt_embeds=negative, negative_pooled_prompt_embeds=negative_pooled,
            {size},
        ).images[0]
        """)


def _masked_flux(load: str, length: int, null: str, size: str) -> str:
    """As `_masked_snippet`, of one prompt: two texts are to have one length, and NaN marks what goes of either."""
    negative = 'negative, negative_pooled = embed("")\n'
    if null == "zeros":
        negative = "negative, negative_pooled = torch.full_like(tokens, torch.nan), torch.zeros_like(pooled)\n"
        negative += "negative[:, 0] = 0\n"
    head = textwrap.dedent(f"""\
        stock_forward = pipe.transformer.forward


        def embed(prompt):  # with NaN in place of the padding
            tokens, pooled, _ = pipe.encode_prompt(prompt, max_sequence_length={length})
            tokens[:, len(pipe.tokenizer_2(prompt, truncation=True, max_length={length}).input_ids) :] = torch.nan
            return tokens, pooled


        def forward(encoder_hidden_states, txt_ids, **options):
            own = ~encoder_hidden_states[0].isnan().any(dim=1)
            return stock_forward(encoder_hidden_states=encoder_hidden_states[:, own], txt_ids=txt_ids[own], **options)


        pipe.transformer.forward = forward
        tokens, pooled = embed("what the image shows")
        """)
    return f"import torch\n{load}{head}{negative}" + _flux_call(size)
