"""Noise and text -> latents -> pictures that one can look at: what every program that draws shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fmscale.batch import Conditioning
from fmscale.errors import UserError
from fmscale.flow.solver import SOLVERS, Velocity, guide

CAPTION_PX = 12


class Guidance(NamedTuple):
    """How strongly images are led towards their text.

    Attributes:
        scale: of classifier-free guidance, which runs the network a second time; 1 is none.
        told: what a network with `guidance_embed` is told; None tells it nothing, which it takes for 1.
    """

    scale: float = 1.0
    told: float | None = None


NO_GUIDANCE = Guidance()


def guidance_of(scale: float, takes_guidance: bool, true_cfg_scale: float = 1.0) -> Guidance:
    """Guidance by the names of diffusers' pipelines.

    Args:
        scale: told to a network that takes it, as by FluxPipeline; of classifier-free guidance for another.
        takes_guidance: the network has `guidance_embed`.
        true_cfg_scale: of classifier-free guidance for a network that is told.
    """
    return Guidance(true_cfg_scale, scale) if takes_guidance else Guidance(scale)


def velocity_of(model: Callable[..., Tensor], conditioning: Conditioning, told: float | None = None) -> Velocity:
    """The network's velocity for fixed text, in float32, without gradients; `told` as in `Guidance`."""
    given = (conditioning.context, conditioning.pooled, conditioning.repeats)

    @torch.no_grad()
    def velocity(noisy_latents: Tensor, t: Tensor) -> Tensor:
        more = {} if told is None else {"guidance": torch.full_like(t, told)}
        return model(noisy_latents, t, *given, **more).float()

    return velocity


def sample_latents(
    model: Callable[..., Tensor],
    noise: Tensor,
    times: Sequence[float],
    conditioning: Conditioning,
    unconditional: Conditioning | None = None,
    guidance: Guidance = NO_GUIDANCE,
    solver: str = "euler",
) -> Tensor:
    """Solve the learned ODE from noise to latents.

    Args:
        model: noisy latents to velocity.
        noise: shape (B, C, H, W), float32.
        times: falling from 1 to 0, as `time_grid` gives them, or a scheduler's sigmas.
        conditioning: of the prompts.
        unconditional: of what guidance leads away from; None means no classifier-free guidance.
        guidance: how strong it is.
        solver: row of `SOLVERS`.

    Returns:
        Latents, shape of `noise`, float32.

    Raises:
        UserError: no such solver.
    """
    if solver not in SOLVERS:
        raise UserError(f"solver: {solver!r} is none of {', '.join(SOLVERS)}")
    velocity = velocity_of(model, conditioning, guidance.told)
    if unconditional is not None and guidance.scale != 1.0:
        velocity = guide(velocity, velocity_of(model, unconditional, guidance.told), guidance.scale)
    return SOLVERS[solver](velocity, noise, times)


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
