"""Prompts -> images, from a run directory or from an exported folder.

encoders/text ──► Conditioning ─┐
flow/noise ─────► noise ────────┴► flow/solver over the network ──► latents ──► encoders/vae ──► images
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fmscale.batch import Conditioning
from fmscale.config import FlowConfig
from fmscale.distributed import world_from_environment
from fmscale.encoders.text import (
    ROLES,
    TextEncoders,
    assemble,
    reopen_text_encoders,
    trim,
    zeros_for,
)
from fmscale.encoders.vae import Vae, reopen_vae
from fmscale.errors import UserError
from fmscale.files import read_lines
from fmscale.flow.noise import draw_noise
from fmscale.flow.solver import Velocity
from fmscale.flow.timesteps import resolve_shift
from fmscale.imported import PublishedRun, is_published, read_published
from fmscale.log import get_logger
from fmscale.pictures import (
    Guidance,
    check_solver,
    contact_sheet,
    default_solver,
    default_steps,
    guidance_of,
    guided_velocity,
    sample_latents,
    times_for,
    to_pixels,
)
from fmscale.runs import Run, Weights, open_run

log = get_logger(__name__)
PICTURES = (".png", ".jpg", ".webp")
MOST_PX = {".jpg": 65535, ".webp": 16383}  # on a side, by the formats


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
        flow: path, prediction, objective and shift that it was trained with.
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
    flow: FlowConfig
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

    def velocity(self, captions: list[str], negative_prompts: list[str], guidance: Guidance) -> Velocity:
        """The guided velocity field of these captions, for latents (B, C, H, W) with one caption each."""
        given = self.condition(captions), self.unconditional(negative_prompts)
        return guided_velocity(self.model, *given, guidance, self.flow)

    def draw(
        self,
        noise: Tensor,
        captions: list[str],
        negative_prompts: list[str],
        guidance: Guidance,
        steps: int,
        solver: str | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Latents of these captions, from noise (B, C, H, W), on its device; None is the model's own way to sample."""
        solver = solver or default_solver(self.flow)
        given = self.condition(captions), self.unconditional(negative_prompts)
        times = self.times(noise.shape[-2], noise.shape[-1], steps, solver)
        return sample_latents(self.model, noise, times, *given, guidance, solver, self.flow, seed)

    def times(self, height: int, width: int, steps: int, solver: str | None = None) -> list[float]:
        """The times that a solver visits for latents of this size."""
        tokens = (height // self.patch_size) * (width // self.patch_size)
        shift = resolve_shift(self.flow.shift, tokens, self.flow.shift_base**2)
        return times_for(self.flow, shift, steps, solver or default_solver(self.flow))

    def decode(self, latents: Tensor) -> np.ndarray:
        """Images of latents (B, C, H, W): shape (B, height, width, 3), uint8."""
        return to_pixels(self.vae.decode(latents))


def sample_command(args: argparse.Namespace) -> None:
    """`fmscale sample`: a sheet with `args.images` images for each prompt, or strips of several numbers of steps."""
    source, out = Path(args.source), Path(args.out)
    _check_out(out)
    prompts = _read_prompts(args)
    generator = open_generator(
        source,
        step=args.step,
        weights=args.ema_std or args.weights,
        vae=args.vae,
        text_encoders=parse_roles(args.text_encoder),
    )
    solver = args.solver or default_solver(generator.flow)
    check_solver(solver, generator.flow)
    guidance = _guidance(args, generator)
    side = generator.base_size * generator.patch_size * generator.vae.factor
    shape = generator.latent_shape(args.height or side, args.width or side)
    counts = args.solver_steps or [default_steps(solver)]
    for steps in counts:
        generator.times(shape[1], shape[2], steps, solver)  # says what the model has not learned
    cells: list[tuple[np.ndarray, str]] = []
    for number, prompt in enumerate(prompts):
        noise = torch.stack([draw_noise(shape, "sample", args.seed, number, i) for i in range(args.images)])
        told = [prompt if len(counts) == 1 else f"{prompt} · {steps} steps" for steps in counts]
        by_steps = [
            draw_images(generator, noise, prompt, args.negative_prompt, guidance, steps, solver, args.seed, args.batch)
            for steps in counts
        ]
        cells += [cell for row in zip(*by_steps, strict=True) for cell in zip(row, told, strict=True)]
    columns = args.images if len(counts) == 1 else len(counts)
    sheet = contact_sheet([image for image, _ in cells], [caption for _, caption in cells], columns)
    if max(sheet.size) > MOST_PX.get(out.suffix.lower(), max(sheet.size)):
        wanted, out = out, out.with_suffix(".png")
        log.warning("%s: such a file takes no sheet of %d x %d px", wanted, *sheet.size)
    sheet.save(out)
    log.info("%d images in %s", len(cells), out)


def draw_images(
    generator: Generator,
    noise: Tensor,
    prompt: str,
    negative_prompt: str,
    guidance: Guidance,
    steps: int,
    solver: str,
    seed: int,
    batch: int,
) -> np.ndarray:
    """Images of one prompt, each from its own noise, no more than `batch` at once; arguments as of `Generator.draw`.

    Args:
        noise: shape (N, C, H, W), on the CPU.

    Returns:
        Shape (N, height, width, 3), uint8.

    Raises:
        UserError: what was drawn is not finite.
    """
    images = []
    for part in noise.split(batch):
        prompts, negatives = [prompt] * len(part), [negative_prompt] * len(part)
        latents = generator.draw(part.to(generator.device), prompts, negatives, guidance, steps, solver, seed)
        if not bool(latents.isfinite().all()):
            raise UserError(
                f"{steps} steps of {solver} end in numbers that are not finite; guidance is too strong, or the "
                "weights are broken"
            )
        images.append(generator.decode(latents))
    return np.concatenate(images)


def _guidance(args: argparse.Namespace, generator: Generator) -> Guidance:
    if args.true_cfg_scale != 1.0 and not generator.takes_guidance:
        raise UserError(
            f"--true-cfg-scale: the network of {args.source} is not told how strong guidance is; give "
            "--guidance-scale alone"
        )
    guidance = guidance_of(args.guidance_scale, generator.takes_guidance, args.true_cfg_scale)
    return guidance._replace(interval=tuple(args.guidance_interval), rescale=args.guidance_rescale)


def _read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of the file.

    Raises:
        UserError: there is none, or one is no text.
    """
    prompts = list(args.prompt) + (read_lines(Path(args.prompts), "--prompts") if args.prompts else [])
    if not prompts:
        raise UserError('say what to draw: --prompt "a handwritten seven", or --prompts FILE with one a line')
    if any("\ud800" <= char <= "\udfff" for text in (*prompts, args.negative_prompt) for char in text):
        raise UserError("--prompt: not UTF-8 text")
    return prompts


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
    device = world_from_environment().device
    if is_published(source):
        if step is not None or weights or vae or text_encoders:
            raise UserError(
                f"{source}: an exported folder has one set of weights and brings its own networks; leave out "
                "--step, --weights, --ema-std, --vae and --text-encoder, or give the run directory"
            )
        published = read_published(source)
        frozen = published.load_vae(device), published.load_text(device)
        return _around(PublishedRun.of(published, None), "ema", *frozen, published.t5_length)
    run = open_run(source, step, weights or "ema")
    return _around(run, weights or "ema", *load_frozen(run, vae, text_encoders or {}, device), run.made_by["t5_length"])


def _around(run: Run, weights: Weights, vae: Vae, text: TextEncoders, t5_length: int) -> Generator:
    model = run.config.model
    return Generator(
        model=run.model(weights).to(world_from_environment().device),
        vae=vae,
        text=text,
        context_dim=model.context_dim,
        t5_length=t5_length,
        null=run.config.conditioning.null,
        masked=run.config.conditioning.text == "masked",
        flow=run.config.flow,
        patch_size=model.patch_size,
        base_size=model.base_size,
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
    return load_run_vae(run, vae, device), load_run_text(run, text_encoders, device)


def load_run_vae(run: Run, vae: str | None, device: torch.device) -> Vae:
    """The VAE that made a run's dataset; arguments and errors as of `load_frozen`."""
    made = run.made_by["vae"]
    if not (folder := Path(vae or made["path"])).is_dir():
        raise UserError(f"{folder}: the VAE that made the dataset is no longer there; give its folder: --vae DIR")
    return reopen_vae(folder, made, device)


def load_run_text(run: Run, text_encoders: Mapping[str, str], device: torch.device) -> TextEncoders:
    """The text encoders that made a run's dataset; arguments and errors as of `load_frozen`."""
    return reopen_text_encoders(run.made_by, text_encoders, "--text-encoder ", device)
