"""Noise and text -> latents -> pictures that one can look at: what every program that draws shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fmscale.batch import Conditioning
from fmscale.config import FlowConfig
from fmscale.errors import UserError
from fmscale.flow.few_step import FEW_STEP
from fmscale.flow.noise import keyed_generator
from fmscale.flow.path import begin
from fmscale.flow.prediction import as_velocity
from fmscale.flow.solver import SOLVERS, Velocity, check_guidance, guide, is_guided, stochastic, time_grid
from fmscale.objective import Network, network_of

CAPTION_PX = 12


class Guidance(NamedTuple):
    """How strongly images are led towards their text.

    Attributes:
        scale: of classifier-free guidance, which runs the network a second time; 1 is none.
        told: what a network with `guidance_embed` is told; None tells it nothing, which it takes for 1.
        interval: of t, in which there is classifier-free guidance.
        rescale: how much of the spread that it adds is taken back, in [0, 1].
    """

    scale: float = 1.0
    told: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0


NO_GUIDANCE = Guidance()
RECTIFIED = FlowConfig()
STOCHASTIC, LEAP = "stochastic", "leap"
AT_DATA = {"heun", "rk4", "dopri5"}  # solvers that ask at t = 0


def guidance_of(scale: float, takes_guidance: bool, true_cfg_scale: float = 1.0) -> Guidance:
    """Guidance by the names of diffusers' pipelines.

    Args:
        scale: told to a network that takes it, as by FluxPipeline; of classifier-free guidance for another.
        takes_guidance: the network has `guidance_embed`.
        true_cfg_scale: of classifier-free guidance for a network that is told.
    """
    return Guidance(true_cfg_scale, scale) if takes_guidance else Guidance(scale)


def guided_velocity(
    model: Callable[..., Tensor],
    conditioning: Conditioning,
    unconditional: Conditioning | None = None,
    guidance: Guidance = NO_GUIDANCE,
    flow: FlowConfig = RECTIFIED,
) -> Velocity:
    """The velocity field that is solved, in float32, without gradients; arguments as of `sample_latents`."""
    network = guided_network(model, conditioning, unconditional, guidance, flow)
    return as_velocity(lambda noisy_latents, t: network(noisy_latents, t, None, None), flow.prediction, flow.path)


def guided_network(
    model: Callable[..., Tensor],
    conditioning: Conditioning,
    unconditional: Conditioning | None,
    guidance: Guidance,
    flow: FlowConfig,
) -> Network:
    """What the model predicts, guided, for all images; otherwise as `guided_velocity`."""
    towards = network_of(model, conditioning, flow, guidance.told)
    if unconditional is None or guidance.scale == 1.0:
        return lambda *given: _in_float32(towards, *given)
    check_guidance(guidance.interval, guidance.rescale)
    away = network_of(model, unconditional, flow, guidance.told)
    together = unconditional.beside(conditioning)
    both = None if together is None else network_of(model, together, flow, guidance.told)

    def predicted(noisy_latents: Tensor, t: Tensor, leap: Tensor | None, rows: None) -> Tensor:
        given = noisy_latents, t, leap
        if not is_guided(t, guidance.interval):
            return _in_float32(towards, *given)
        if both is None:
            without, within = _in_float32(away, *given), _in_float32(towards, *given)
        else:  # one pass of twice the images
            twice = (None if value is None else torch.cat([value, value]) for value in given)
            without, within = _in_float32(both, *twice).chunk(2)
        return guide(within, without, guidance.scale, guidance.rescale)

    return predicted


@torch.no_grad()
def _in_float32(network: Network, *given: Tensor | None) -> Tensor:
    return network(*given).float()


def default_solver(flow: FlowConfig) -> str:
    """What a model is sampled with unless one says otherwise."""
    return "euler" if flow.objective == "velocity" else LEAP


def default_steps(solver: str) -> int:
    """How many steps a solver takes unless one says otherwise."""
    return 4 if solver == LEAP else 28


def times_for(flow: FlowConfig, shift: float, steps: int, solver: str) -> list[float]:
    """The times that a solver visits.

    Args:
        flow: the model's objective.
        shift: of the size of image; leaps are learned without.
        steps: of the solver.
        solver: as for `sample_latents`.

    Raises:
        UserError: a number of steps that the model has not learned.
    """
    if solver != LEAP:
        return time_grid(steps, shift)
    if flow.objective == "shortcut" and steps & (steps - 1):
        raise UserError(f"steps: a shortcut model leaps 1, 2, 4, 8 … times, given {steps}")
    return time_grid(steps)


def check_solver(solver: str, flow: FlowConfig) -> None:
    """Refuse a solver that is not there, or that a model cannot be sampled with.

    Raises:
        UserError: says which can.
    """
    if solver not in (*SOLVERS, STOCHASTIC, LEAP):
        raise UserError(f"solver: {solver!r} is none of {', '.join((*SOLVERS, STOCHASTIC, LEAP))}")
    if solver == LEAP and flow.objective == "velocity":
        raise UserError("solver: leap needs a model that was trained to, with flow.objective mean_flow or shortcut")
    if flow.prediction == "data" and flow.path in ("rectified", "cosine") and solver in AT_DATA:
        raise UserError(
            f"solver: {solver} asks the model at t = 0, where its prediction, data, does not say where the path goes; "
            "choose euler, midpoint or dpm"
        )


def sample_latents(
    model: Callable[..., Tensor],
    noise: Tensor,
    times: Sequence[float],
    conditioning: Conditioning,
    unconditional: Conditioning | None = None,
    guidance: Guidance = NO_GUIDANCE,
    solver: str = "euler",
    flow: FlowConfig = RECTIFIED,
    seed: int = 0,
) -> Tensor:
    """From noise to latents, as the model has learned it.

    Args:
        model: noisy latents to what it predicts.
        noise: standard normal, shape (B, C, H, W), float32.
        times: falling from 1 to 0, as `times_for` gives them, or a scheduler's sigmas.
        conditioning: of the prompts.
        unconditional: of what guidance leads away from; None means no classifier-free guidance.
        guidance: how strong it is.
        solver: row of `SOLVERS`, or `stochastic`, or `leap` for a model that has learned to.
        flow: path, prediction and objective that the model was trained with.
        seed: of the noise that `stochastic` adds.

    Returns:
        Latents, shape of `noise`, float32.

    Raises:
        UserError: no such solver, or not with such a model.
    """
    check_solver(solver, flow)
    start = begin(noise, flow.path)
    if solver == LEAP:
        network = guided_network(model, conditioning, unconditional, guidance, flow)
        return FEW_STEP[flow.objective].sample(network, start, times)
    velocity = guided_velocity(model, conditioning, unconditional, guidance, flow)
    if solver == STOCHASTIC:
        return stochastic(velocity, start, times, keyed_generator(STOCHASTIC, seed), path=flow.path)
    return SOLVERS[solver](velocity, start, times, path=flow.path)


def to_pixels(images: Tensor) -> np.ndarray:
    """Images (B, 3, height, width) in [-1, 1] as a decoder gives them: shape (B, height, width, 3), uint8."""
    scaled = images.float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def contact_sheet(images: Sequence[np.ndarray], captions: Sequence[str], columns: int) -> Image.Image:
    """Images in rows, each with its caption under it.

    Args:
        images: each (height, width, 3), uint8.
        captions: one for each.
        columns: images in a row.
    """
    font = ImageFont.load_default(CAPTION_PX)
    texts = [_wrap(caption, font, image.shape[1]) for image, caption in zip(images, captions, strict=True)]
    heights = [
        image.shape[0] + 8 + (text.count("\n") + 1) * (CAPTION_PX + 3)
        for image, text in zip(images, texts, strict=True)
    ]
    row_heights = [max(heights[start : start + columns]) for start in range(0, len(images), columns)]
    cell_width = max(image.shape[1] for image in images) + 8
    sheet = Image.new("RGB", (cell_width * min(columns, len(images)), sum(row_heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (image, text) in enumerate(zip(images, texts, strict=True)):
        row, column = divmod(place, columns)
        left, top = column * cell_width + 4, sum(row_heights[:row]) + 4
        sheet.paste(Image.fromarray(image), (left, top))
        draw.multiline_text((left, top + image.shape[0] + 2), text, fill="black", font=font, spacing=2)
    return sheet


def _wrap(caption: str, font: Any, width_px: int) -> str:
    """Break a caption into lines that are no wider than an image, where its words allow."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width_px:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
