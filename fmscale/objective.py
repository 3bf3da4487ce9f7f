"""What a network is asked and what it costs to answer wrongly, as `flow` in the config says: rows of `fmscale.flow`."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fmscale.batch import Conditioning
from fmscale.config import FlowConfig, ModelConfig, TrainConfig
from fmscale.errors import UserError
from fmscale.flow.few_step import FEW_STEP
from fmscale.flow.loss import LOSSES
from fmscale.flow.noise import keyed_generator
from fmscale.flow.path import expand_like, input_scale, interpolate
from fmscale.flow.prediction import PREDICTIONS
from fmscale.flow.timesteps import TIMESTEP_SAMPLERS, resolve_shift, shift_timesteps
from fmscale.flow.weights import WEIGHTS

# (noisy latents (B, C, H, W), t (B,), leap (B,) or None, rows: which images these are, None for all) -> prediction
Network = Callable[..., Tensor]


class Times(NamedTuple):
    """Where images are on their path, shape (B,) each.

    Attributes:
        t: in [0, 1].
        leap: how much of t the network is to pass over, 0 in a plain objective.
    """

    t: Tensor
    leap: Tensor


def shift_for(flow: FlowConfig, model: ModelConfig, height: int, width: int) -> float:
    """The timestep shift of latents (height, width)."""
    tokens = prod((height // model.patch_size, width // model.patch_size))
    return resolve_shift(flow.shift, tokens, flow.shift_base**2)


def draw_times(flow: FlowConfig, shift: float, batch: int, key: tuple[int, int]) -> Times:
    """Times of a global batch of B images, from `key`: seed and step."""

    def draw(name: str) -> Tensor:
        drawn = TIMESTEP_SAMPLERS[flow.timesteps](
            batch,
            keyed_generator(name, *key),
            stratified=flow.stratified,
            mean=flow.logit_mean,
            std=flow.logit_std,
            scale=flow.mode_scale,
            a=flow.beta_a,
            b=flow.beta_b,
            steepness=flow.u_steepness,
            steps=flow.distill_steps,
        )
        return shift_timesteps(drawn, shift)

    t = draw("t")
    if flow.objective == "velocity":
        return Times(t, torch.zeros_like(t))
    generator = keyed_generator("leap", *key)
    return Times(*FEW_STEP[flow.objective].draw(t, draw("other t"), generator, share=flow.leap_share))


def network_of(
    model: Callable[..., Tensor], given: Conditioning, flow: FlowConfig, told: float | None = None
) -> Network:
    """A model bound to its text, as objectives and samplers call it.

    Args:
        model: of `fmscale.models.families`, or one under an engine.
        given: text of the images.
        flow: says on which path they are.
        told: strength of guidance, to a model that takes it; None tells it nothing.
    """

    def network(noisy_latents: Tensor, t: Tensor, leap: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        text = given if rows is None else given.of(rows)
        more = {} if told is None else {"guidance": torch.full_like(t, told)}
        if leap is not None:
            more["leap"] = leap
        if flow.path == "variance_exploding":
            noisy_latents = noisy_latents * expand_like(input_scale(t, flow.path), noisy_latents)
        return model(noisy_latents, t, text.context, text.pooled, text.repeats, **more)

    return network


def losses(
    flow: FlowConfig, network: Network, latents: Tensor, noise: Tensor, times: Times, jitter: Tensor | None = None
) -> Tensor:
    """What the objective costs, before it is multiplied by `weight_of`.

    Args:
        flow: the objective.
        network: from `network_of`.
        latents: clean, shape (B, C, H, W), float32.
        noise: the other end of their paths, same shape.
        times: on the device of `latents`.
        jitter: standard normal, same shape, where `flow.sigma` is above 0.

    Returns:
        Loss per image, shape (B,), float32.
    """
    if flow.objective == "velocity":
        return plain_losses(flow, network, latents, noise, times.t, jitter)
    return FEW_STEP[flow.objective].loss(network, latents, noise, times.t, times.leap, path=flow.path)


def weight_of(flow: FlowConfig, t: Tensor) -> Tensor:
    """How much the loss of images at t counts; both of shape (B,)."""
    return WEIGHTS[flow.weight](t, flow.path, flow.prediction, gamma=flow.snr_gamma)


def plain_losses(
    flow: FlowConfig, network: Network, latents: Tensor, noise: Tensor, t: Tensor, jitter: Tensor | None = None
) -> Tensor:
    """Error of the prediction at t, without weights or leaps; arguments as of `losses`."""
    noisy_latents, velocity = interpolate(latents, noise, t, flow.path, flow.sigma, jitter)
    wanted = PREDICTIONS[flow.prediction](latents, noise, velocity)
    return LOSSES[flow.loss](network(noisy_latents, t), wanted, flow.huber_width)


def check_objective(config: TrainConfig) -> None:
    """Refuse an objective that the network or the engine cannot follow.

    Raises:
        UserError: names the keys.
    """
    objective, engine = config.flow.objective, config.engine
    if objective == "velocity":
        return
    if not config.model.leap_embed:
        raise UserError(
            f"flow.objective: {objective} needs a network that is told how far to leap; set model.leap_embed=true"
        )
    if engine.zero_stage == 3:
        raise UserError(
            f"flow.objective: {objective} calls the network more than once in a step, not equally often on all ranks, "
            "and ZeRO-3 needs that; set engine.zero_stage=2"
        )
    if objective != "mean_flow":
        return
    forward = {
        "engine.compile": engine.compile,
        "engine.fp8": engine.fp8,
        "engine.recompute_every": engine.recompute_every > 0,
        "engine.recompute": bool(engine.recompute),
    }
    if wrong := [key for key, is_set in forward.items() if is_set]:
        raise UserError(
            f"{wrong[0]}: flow.objective mean_flow differentiates the network forwards, which this cannot do; "
            "leave it out"
        )
