"""Prompts -> images, from a run directory or from an exported folder.

encoders/text ──► Conditioning ─┐
flow/noise ─────► noise ────────┴► flow/solver over the network ──► latents ──► encoders/vae ──► images
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmscale.batch import Conditioning
from fmscale.distributed import world_from_environment
from fmscale.encoders.text import (
    ROLES,
    TextEncoders,
    assemble,
    load_text_encoders,
    reopen_text_encoders,
    trim,
    zeros_for,
)
from fmscale.encoders.vae import Vae, load_vae, reopen_vae
from fmscale.errors import UserError
from fmscale.flow.noise import draw_noise
from fmscale.flow.solver import time_grid
from fmscale.log import get_logger
from fmscale.pictures import contact_sheet, guidance_of, sample_latents, to_pixels
from fmscale.runs import Run, Weights, open_run

log = get_logger(__name__)
EXPORT_NOTE = "fmscale.json"  # in an exported folder: what diffusers' own files have no place for
PIPELINE_FOLDERS = {"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}
PIPELINE_FOLDERS["t5"] = ("text_encoder_3", "tokenizer_3")
PICTURES = (".png", ".jpg", ".webp")


@dataclass(frozen=True)
class Generator:
    """A trained network with the frozen ones around it.

    Attributes:
        model: noisy latents to velocity, in evaluation mode.
        vae: latents to images.
        text: captions to features.
        context_dim: token width that the model takes.
        t5_length: T5 tokens, or zeros in their place.
        null: what the model was trained on in place of text, `empty` or `zeros`.
        masked: it was trained without sight of the text's padding.
        shift: of the timesteps it was trained with.
        patch_size: latent pixels on a side of a patch.
        base_size: patches on a side of an image at the base resolution.
        takes_guidance: the model is told how strong guidance is.
    """

    model: nn.Module
    vae: Vae
    text: TextEncoders
    context_dim: int
    t5_length: int
    null: str
    masked: bool
    shift: float
    patch_size: int
    base_size: int
    takes_guidance: bool

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.model.parameters()).device

    def condition(self, captions: list[str]) -> Conditioning:
        """What the network is told about these captions."""
        return self._assemble(self.text.encode(captions, self.masked))

    def unconditional(self, negative_prompts: list[str]) -> Conditioning:
        """What guidance leads away from: negative prompts, or zeros where those are empty and zeros were trained."""
        features = self.text.encode(negative_prompts, self.masked)
        replaced = self.null == "zeros" and not any(negative_prompts)
        return self._assemble(zeros_for(features) if replaced else features)

    def _assemble(self, features: Mapping[str, Tensor]) -> Conditioning:
        return trim(assemble(features, context_dim=self.context_dim, t5_length=self.t5_length))

    def latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """(C, H, W) of an image of this size.

        Raises:
            UserError: the size does not divide into patches.
        """
        step = self.vae.factor * self.patch_size
        if height_px % step or width_px % step:
            raise UserError(f"an image of {height_px}x{width_px} px: both sides must be multiples of {step}")
        return self.vae.channels, height_px // self.vae.factor, width_px // self.vae.factor

    def decode(self, latents: Tensor) -> np.ndarray:
        """Images of latents (B, C, H, W): shape (B, height, width, 3), uint8."""
        return to_pixels(self.vae.decode(latents))


def sample_command(args: argparse.Namespace) -> None:
    """`fmscale sample`: write a PNG with `args.images` images for each prompt, prompts under the images."""
    source, out = Path(args.source), Path(args.out)
    _check_out(out)
    if any("\ud800" <= char <= "\udfff" for text in (*args.prompt, args.negative_prompt) for char in text):
        raise UserError("--prompt: not UTF-8 text")
    generator = open_generator(
        source,
        step=args.step,
        weights=args.ema_std or args.weights,
        vae=args.vae,
        text_encoders=parse_roles(args.text_encoder),
    )
    if args.true_cfg_scale != 1.0 and not generator.takes_guidance:
        raise UserError(
            f"--true-cfg-scale: the network of {source} is not told how strong guidance is; give --guidance-scale alone"
        )
    guidance = guidance_of(args.guidance_scale, generator.takes_guidance, args.true_cfg_scale)
    side = generator.base_size * generator.patch_size * generator.vae.factor
    shape = generator.latent_shape(args.height or side, args.width or side)
    times = time_grid(args.solver_steps, generator.shift)
    images: list[np.ndarray] = []
    captions: list[str] = []
    for number, prompt in enumerate(args.prompt):
        noise = torch.stack([draw_noise(shape, "sample", args.seed, number, i) for i in range(args.images)])
        latents = sample_latents(
            generator.model,
            noise.to(generator.device),
            times,
            generator.condition([prompt] * args.images),
            generator.unconditional([args.negative_prompt] * args.images),
            guidance,
            args.solver,
        )
        images.extend(generator.decode(latents))
        captions.extend([prompt] * args.images)
    contact_sheet(images, captions, columns=args.images).save(out)
    log.info("%d images in %s", len(images), out)


def _check_out(out: Path) -> None:
    """Refuse what could not be written, before anything is drawn."""
    if not out.parent.is_dir():
        raise UserError(f"--out: there is no folder {out.parent} to write {out.name} in")
    if out.suffix.lower() not in PICTURES:
        raise UserError(f"--out: {out} must end in one of {', '.join(PICTURES)}")
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise UserError(f"--out: {out} cannot be written; give another file")


def parse_roles(texts: Sequence[str]) -> dict[str, str]:
    """`["clip_l=DIR", …]` by role.

    Raises:
        UserError: not of that form, or an unknown role.
    """
    roles = {}
    for text in texts:
        role, equals, folder = text.partition("=")
        if not equals or role not in ROLES:
            raise UserError(f"--text-encoder: {text!r}; write ROLE=DIR with one of {', '.join(ROLES)}")
        roles[role] = folder
    return roles


def open_generator(
    source: Path,
    *,
    step: int | None = None,
    weights: Weights | None = None,
    vae: str | None = None,
    text_encoders: Mapping[str, str] | None = None,
) -> Generator:
    """Load everything that it takes to draw.

    Args:
        source: a run directory or an exported folder.
        step: checkpoint of a run; None for the newest.
        weights: of a run, `ema` (None means the same), `raw`, or the relative width of an average.
        vae: folder to use in place of the one that the dataset names.
        text_encoders: folders by role, likewise.

    Raises:
        UserError: `source` is neither, or a frozen network is gone or is not the one that made the dataset.
    """
    if (source / EXPORT_NOTE).is_file():
        if step is not None or weights or vae or text_encoders:
            raise UserError(
                f"{source}: an exported folder has one set of weights and brings its own networks; leave out "
                "--step, --weights, --ema-std, --vae and --text-encoder, or give the run directory"
            )
        return _open_export(source)
    if (source / "model_index.json").is_file():
        raise UserError(f"{source}: a pipeline that fmscale did not export; draw from it with diffusers")
    run = open_run(source, step, weights or "ema")
    device = world_from_environment().device
    frozen_vae, text = load_frozen(run, vae, text_encoders or {}, device)
    return Generator(
        model=run.model(weights or "ema").to(device),
        vae=frozen_vae,
        text=text,
        context_dim=run.config.model.context_dim,
        t5_length=run.made_by["t5_length"],
        null=run.config.conditioning.null,
        masked=run.config.conditioning.text == "masked",
        shift=run.config.flow.shift,
        patch_size=run.config.model.patch_size,
        base_size=run.config.model.base_size,
        takes_guidance=run.takes_guidance,
    )


def load_frozen(
    run: Run, vae: str | None, text_encoders: Mapping[str, str], device: torch.device
) -> tuple[Vae, TextEncoders]:
    """The VAE and the text encoders that made a run's dataset.

    Args:
        run: names them.
        vae: folder, where it has moved.
        text_encoders: folders by role, where they have moved.
        device: where they compute.

    Raises:
        UserError: one is gone, or is another than the one that made the dataset.
    """
    made_by = run.made_by
    if not (folder := Path(vae or made_by["vae"]["path"])).is_dir():
        raise UserError(f"{folder}: the VAE that made the dataset is no longer there; give its folder: --vae DIR")
    loaded = reopen_vae(folder, made_by["vae"], device)
    text = reopen_text_encoders(made_by, text_encoders, "--text-encoder ", device)
    return loaded, text


def _open_export(folder: Path) -> Generator:
    from fmscale.models import blueprint
    from fmscale.models.mmdit_names import from_diffusers, model_kwargs_from_diffusers

    device = world_from_environment().device
    note = _read_json(folder / EXPORT_NOTE)
    config = _read_json(folder / "transformer" / "config.json")
    kwargs = model_kwargs_from_diffusers(config, note["base_size"])
    kwargs |= {name: note.get(name) for name in ("position_origin", "position_step")}
    model = blueprint("mmdit", kwargs)
    state = {name: value.float() for name, value in _read_weights(folder / "transformer").items()}
    model.load_state_dict(from_diffusers(state, model), assign=True)
    present = {role: PIPELINE_FOLDERS[role] for role in note["encoders"]}  # a T5 that says zeros is not among them
    sources = {
        role: {"path": str(folder / model_name), "tokenizer": str(folder / tokenizer)}
        for role, (model_name, tokenizer) in present.items()
    }
    return Generator(
        model=model.requires_grad_(False).eval().to(device),
        vae=load_vae(folder / "vae", device),
        text=load_text_encoders(sources, note["t5_length"], device),
        context_dim=kwargs["context_dim"],
        t5_length=note["t5_length"],
        null=note["null"],
        masked=note.get("text") == "masked",  # not a word of it in older exports
        shift=_read_json(folder / "scheduler" / "scheduler_config.json")["shift"],
        patch_size=kwargs["patch_size"],
        base_size=note["base_size"],
        takes_guidance=False,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); export the run again") from None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    from fmscale.encoders.weights import weight_files

    state: dict[str, Tensor] = {}
    for file in weight_files(folder, "diffusion_pytorch_model"):
        state |= load_file(file)
    return state
