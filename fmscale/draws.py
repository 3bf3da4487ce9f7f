"""What is random in a step: functions of seed, step and place in the global batch, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmscale.batch import COUNT
from fmscale.config import TrainConfig
from fmscale.data.raw import PIXELS, RawImages
from fmscale.data.tensors import widen
from fmscale.encoders.vae import FLIPPED, LATENTS, LOG_VARIANCE, Posterior
from fmscale.flow.coupling import COUPLINGS
from fmscale.flow.loss import draw_dropped
from fmscale.flow.noise import draw_noise as noise_of
from fmscale.flow.noise import keyed_generator
from fmscale.objective import Times, draw_times, shift_for


class Draws(NamedTuple):
    """What is random in a step: for the whole global batch B, or for some of its slots.

    Attributes:
        times: where images are on their path, and how far they leap.
        dropped: shape (B, encoders), bool: which text encoder is dropped for which image.
    """

    times: Times
    dropped: Tensor

    def of(self, slots: Tensor, device: torch.device) -> Draws:
        """Those of some slots, on a device; a slot behind the last one is padding, for which any draw will do."""
        places = slots % len(self.dropped)
        t, leap, dropped = (drawn[places].to(device, non_blocking=True) for drawn in (*self.times, self.dropped))
        return Draws(Times(t, leap), dropped)


def draw_step(config: TrainConfig, step: int, encoders: int, bucket: tuple[int, int]) -> Draws:
    """Times and dropped encoders of a global batch of a bucket: a function of seed, step and bucket alone."""
    shift = shift_for(config.flow, config.model, *bucket)
    times = draw_times(config.flow, shift, config.global_batch, (config.seed, step))
    generator = keyed_generator("dropout", config.seed, step)
    return Draws(times, draw_dropped(config.global_batch, encoders, config.conditioning.dropout, generator))


def draw_noise(
    coupling: str, seed: int, shape: Sequence[int], step: int, slot: int, read_meta: Callable[[], Mapping[str, Any]]
) -> Tensor:
    """The noise of one slot of a global batch; the loader's workers call it."""
    return COUPLINGS[coupling](shape, read_meta, (seed, step, slot))


POSTERIOR_NOISE = "posterior_noise"  # beside pixels: what stands for one sample of their latents' posterior
JITTER = "jitter"  # beside either: fresh noise around the path, shape of the latents


def draw_view(
    seed: int,
    raw: RawImages | None,
    tensors: dict[str, Tensor],
    step: int,
    slots: Sequence[int],
    jitter: bool = False,
) -> dict[str, Tensor]:
    """What some slots of a step see of their samples, be they latents (raw is None) or images; same draws for both.

    Where `jitter` is set, there is noise of that name beside it.
    """
    seen = draw_latents(seed, tensors, step, slots) if raw is None else draw_pixels(seed, raw, tensors, step, slots)
    if not jitter:
        return seen
    shape = seen[LATENTS].shape[1:] if raw is None else raw.latent_shape(*seen[PIXELS].shape[-2:])
    return {**seen, JITTER: torch.stack([noise_of(shape, JITTER, seed, step, slot) for slot in slots])}


def draw_pixels(
    seed: int, raw: RawImages, tensors: dict[str, Tensor], step: int, slots: Sequence[int]
) -> dict[str, Tensor]:
    """What some slots of a step see of their images: as they are or mirrored, and which latents of the posterior.

    The loader's workers call it.

    Args:
        seed: of the run.
        raw: whether there is anything to draw.
        tensors: `pixels`, shape (B, 3, H, W), 0 to 255; what is mirrored is so in place.
        step: optimizer step.
        slots: B places in the global batch.

    Returns:
        The pixels, and beside them the noise from which `Posterior.sample` makes the latents, if they are sampled.
    """
    pixels = tensors[PIXELS]
    for row, slot in enumerate(slots):
        if raw.flip and _is_mirrored(seed, step, slot):
            pixels[row] = pixels[row].flip(-1)
    if raw.latents == "mean":
        return {PIXELS: pixels}
    shape = raw.latent_shape(*pixels.shape[-2:])
    return {PIXELS: pixels, POSTERIOR_NOISE: torch.stack([_posterior_noise(shape, seed, step, slot) for slot in slots])}


def draw_latents(seed: int, tensors: dict[str, Tensor], step: int, slots: Sequence[int]) -> dict[str, Tensor]:
    """What some slots of a step see of their samples: of two mirror images one, of a posterior one sample.

    The loader's workers call it.

    Args:
        seed: of the run.
        tensors: as stored, (B, ...) each.
        step: optimizer step.
        slots: B places in the global batch.

    Returns:
        The same tensors with only `latents` in place of all whose names begin so.
    """
    flipped = FLIPPED in tensors
    if not flipped and LATENTS + LOG_VARIANCE not in tensors:
        return tensors
    rows = []
    for row, slot in enumerate(slots):
        name = FLIPPED if flipped and _is_mirrored(seed, step, slot) else LATENTS
        latents, log_variance = tensors[name][row], tensors.get(name + LOG_VARIANCE)
        if log_variance is not None:
            latents = Posterior(latents, log_variance[row]).sample(_posterior_noise(latents.shape, seed, step, slot))
        rows.append(latents)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(LATENTS)}
    return {LATENTS: torch.stack(rows), **rest}


def _is_mirrored(seed: int, step: int, slot: int) -> bool:
    return bool(torch.rand((), generator=keyed_generator("flip", seed, step, slot)) < 0.5)


def _posterior_noise(shape: Sequence[int], seed: int, step: int, slot: int) -> Tensor:
    return noise_of(shape, "posterior", seed, step, slot)


def drop_text(
    tensors: Mapping[str, Tensor], encoders: Sequence[str], dropped: Tensor, null: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Text features in which dropped encoders say what they say of the null.

    Args:
        tensors: by name, (B, ...) each, as `Batch.tensors`.
        encoders: in the order of the columns of `dropped`.
        dropped: shape (B, encoders), bool.
        null: per text tensor, without the batch dimension.
    """
    text, tensors = {}, widen(tensors)  # on the device: the bytes that travel there are few
    for column, encoder in enumerate(encoders):
        for name in (encoder, f"{encoder}_pooled", encoder + COUNT):
            if name in null:
                value = tensors[name].float()
                mask = dropped[:, column].reshape(-1, *[1] * (value.ndim - 1))
                text[name] = torch.where(mask, null[name], value)
    return text
