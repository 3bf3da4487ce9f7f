"""Rows of the tables of flow, as a config chooses them: what is drawn, what it costs, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fmscale.batch import Conditioning
from fmscale.config import FlowConfig, TrainConfig
from fmscale.draws import JITTER, draw_step, draw_view
from fmscale.engine.metrics import read_metrics
from fmscale.errors import UserError
from fmscale.flow.few_step import _change
from fmscale.flow.noise import draw_noise, keyed_generator
from fmscale.flow.path import PATHS
from fmscale.flow.weights import min_snr
from fmscale.models.families import build
from fmscale.objective import Times, check_objective, draw_times, losses, network_of, plain_losses, shift_for, weight_of
from fmscale.pictures import Guidance, check_solver, sample_latents, times_for
from fmscale.train import train

Make = Callable[..., TrainConfig]
SIZES = {"layers": 2, "heads": 2, "head_dim": 8, "latent_channels": 4, "context_dim": 12, "pooled_dim": 6}
FAMILIES: dict[str, dict[str, Any]] = {
    "mmdit": {**SIZES, "pos_embed_max_size": 8, "base_size": 4, "qk_norm": True},
    "flux": {**SIZES, "single_layers": 2, "rope_dims": (2, 2, 4)},
}


def network(family: str, **more: Any) -> torch.nn.Module:
    """A small network whose every layer says something."""
    torch.manual_seed(0)
    model = build(family, {**FAMILIES[family], **more})
    for name, parameter in model.named_parameters():
        if not name.startswith("leap_mlp") and parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(images: int = 3) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """Latents, noise and text."""
    generator = keyed_generator("inputs")
    latents, noise = torch.randn(2, images, 4, 8, 8, generator=generator).unbind()
    context, pooled = torch.randn(images, 5, 12, generator=generator), torch.randn(images, 6, generator=generator)
    return latents, noise, Conditioning(context, pooled)


def test_plain_flow_draws_and_costs_as_ever() -> None:
    flow, (latents, noise, given) = FlowConfig(shift=2.0), inputs()
    times = draw_times(flow, 2.0, 3, (7, 4))
    t = torch.sigmoid(torch.randn(3, generator=keyed_generator("t", 7, 4)))
    assert torch.equal(times.t, 2 * t / (1 + t))
    assert torch.equal(times.leap, torch.zeros(3))
    model = network("mmdit")
    along = times.t[:, None, None, None]
    said = model((1 - along) * latents + along * noise, times.t, given.context, given.pooled)
    plain = (said - (noise - latents)).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(losses(flow, network_of(model, given, flow), latents, noise, times), plain)


def test_path_prediction_weight_and_bandwidth_come_from_the_config() -> None:
    flow = FlowConfig(path="variance_exploding", prediction="noise", weight="min_snr", snr_gamma=3.0, sigma=0.1)
    (latents, noise, given), t, jitter = inputs(), torch.tensor([0.1, 0.5, 0.9]), torch.randn(3, 4, 8, 8)
    beta = PATHS["variance_exploding"](t).beta
    seen = latents + beta[:, None, None, None] * noise + 0.1 * jitter
    model = network("mmdit")
    said = model(seen / (1 + beta**2).sqrt()[:, None, None, None], t, given.context, given.pooled)
    wanted = (said - noise).square().flatten(1).mean(dim=1)
    given_network, times = network_of(model, given, flow), Times(t, torch.zeros(3))
    torch.testing.assert_close(plain_losses(flow, given_network, latents, noise, t, jitter), wanted)
    torch.testing.assert_close(losses(flow, given_network, latents, noise, times, jitter), wanted)
    torch.testing.assert_close(weight_of(flow, t), min_snr(t, "variance_exploding", "noise", gamma=3.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_that_is_told_of_leaps_begins_as_one_that_is_not(family: str) -> None:
    (latents, _, given), t = inputs(), torch.tensor([0.2, 0.5, 1.0])
    plain, told = network(family), network(family, leap_embed=True)
    told.load_state_dict(plain.state_dict(), strict=False)
    arguments = latents, t, given.context, given.pooled
    assert torch.equal(told(*arguments), plain(*arguments))
    assert torch.equal(told(*arguments, leap=t), plain(*arguments))
    torch.nn.init.normal_(told.leap_mlp.down.weight)
    assert not torch.allclose(told(*arguments, leap=t), told(*arguments), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_networks_can_be_differentiated_forwards(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As finite differences say, where all inputs move at once."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)  # which ZeRO-3 replaces for good
    (latents, noise, given), t = inputs(), torch.tensor([0.2, 0.5, 0.9])
    model = network(family, leap_embed=True)
    torch.nn.init.normal_(model.leap_mlp.down.weight, std=0.2)
    bound = network_of(model.double(), Conditioning(given.context.double(), given.pooled.double()), FlowConfig())
    at, ahead = (latents.double(), t.double(), t.double() / 2), (noise.double(), torch.ones(3).double(), torch.ones(3))
    step = 1e-4
    with torch.no_grad():
        high, low = (bound(*(x + sign * step * dx for x, dx in zip(at, ahead, strict=True))) for sign in (1.0, -1.0))
    found = _change(bound, at[0], ahead[0], at[1], at[2], torch.arange(3))
    # The features of t are computed in float32, whose rounding a difference of 1e-4 makes 1e4 times as large.
    torch.testing.assert_close(found, (high - low) / (2 * step), rtol=0.02, atol=0.02)


def test_the_shift_follows_from_the_bucket(tmp_path: Path, make_config: Make) -> None:
    config = make_config(tmp_path, "flow.shift=sqrt", "flow.shift_base=2", "global_batch=4000")
    assert shift_for(config.flow, config.model, 16, 8) == pytest.approx((8 * 4 / 2**2) ** 0.5)
    drawn = draw_step(config, 0, 2, (16, 8)).times.t.median().item()
    shift = 8**0.5
    assert drawn == pytest.approx(shift / (1 + shift), abs=0.03)
    assert draw_step(config, 0, 2, (4, 4)).times.t.median().item() == pytest.approx(0.5, abs=0.03)


def test_strata_are_those_of_the_global_batch(tmp_path: Path, make_config: Make) -> None:
    config = make_config(tmp_path, "flow.stratified=true", "flow.timesteps=uniform", "global_batch=64")
    t = draw_step(config, 3, 1, (8, 8)).times.t
    assert (t * 64).long().sort().values.tolist() == list(range(64))


def test_jitter_belongs_to_seed_step_and_slot() -> None:
    stored = {"latents": torch.zeros(2, 4, 8, 8)}
    seen = draw_view(5, None, stored, 9, [3, 7], jitter=True)
    assert torch.equal(seen[JITTER][1], draw_noise((4, 8, 8), JITTER, 5, 9, 7))
    assert JITTER not in draw_view(5, None, stored, 9, [3, 7])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("flow.objective=shortcut", "needs a network that is told how far to leap; set model.leap_embed=true"),
        ("engine.zero_stage=3", "ZeRO-3 needs that; set engine.zero_stage=2"),
        ("engine.compile=true", r"engine\.compile: flow\.objective mean_flow differentiates the network forwards"),
    ],
)
def test_an_objective_that_cannot_be_followed_is_refused(
    tmp_path: Path, make_config: Make, given: str, said: str
) -> None:
    leaps = () if "shortcut" in given else ("flow.objective=mean_flow", "model.leap_embed=true")
    with pytest.raises(UserError, match=said):
        check_objective(make_config(tmp_path, *leaps, given))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("flow.transport=exact", "flow.coupling=paired"), "gives noise to other images"),
        (("flow.objective=shortcut", "flow.sigma=0.1"), "predicts velocity, by squared error, on a path without sigma"),
        (("flow.objective=shortcut", "flow.leap_share=1"), "a shortcut is learned from velocities"),
        (("flow.shift=sqr",), r"flow\.shift: give a number above 0, or sqrt, or flux; given \"sqr\""),
        (("flow.prediction=noise",), "says nothing at t = 1 of the path rectified"),
    ],
)
def test_rows_that_do_not_go_together_are_refused(
    tmp_path: Path, make_config: Make, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        make_config(tmp_path, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ("flow.path=cosine", "flow.sigma=0.1", "flow.weight=min_snr", "flow.stratified=true", "flow.transport=exact"),
        ("flow.objective=mean_flow", "model.leap_embed=true", "flow.leap_share=0.5"),
        ("flow.objective=shortcut", "model.leap_embed=true", "engine.zero_stage=2"),
    ],
    ids=["rows", "mean_flow", "shortcut"],
)
def test_a_run_trains_and_resumes_to_the_bit(tmp_path: Path, make_config: Make, overrides: tuple[str, ...]) -> None:
    config = make_config(tmp_path / "whole", "global_batch=8", "micro_batch=4", *overrides)
    train(config)
    first = make_config(tmp_path / "parts", "global_batch=8", "micro_batch=4", "steps=8", *overrides)
    train(first.model_copy(update={"steps": 4}))
    train(first)
    whole, parts = ([r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "parts"))
    assert len(whole) == 8
    assert whole == parts
    if "flow.transport=exact" in overrides:
        assert all(record["transport_s"] > 0 for record in read_metrics(tmp_path / "whole" / "metrics.jsonl"))


def test_leaps_and_steps_of_a_model_that_leaps() -> None:
    """A network whose velocity is the same everywhere goes as far in one leap as in many steps."""
    (_, noise, given), flow = inputs(), FlowConfig(objective="shortcut", shift=3.0)

    def model(noisy_latents: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.full_like(noisy_latents, 2.0)

    for solver, steps in (("leap", 1), ("leap", 4), ("euler", 3), ("midpoint", 2)):
        times = times_for(flow, 3.0, steps, solver)
        found = sample_latents(model, noise, times, given, given, Guidance(4.0), solver, flow)
        torch.testing.assert_close(found, noise - 2)
    exploding = FlowConfig(objective="mean_flow", path="variance_exploding")
    found = sample_latents(model, noise, times_for(exploding, 1.0, 1, "leap"), given, solver="leap", flow=exploding)
    torch.testing.assert_close(found, 50 * noise - 2)
    with pytest.raises(UserError, match="leaps 1, 2, 4, 8 … times, given 3"):
        times_for(flow, 3.0, 3, "leap")
    with pytest.raises(UserError, match="needs a model that was trained to"):
        check_solver("leap", FlowConfig())
    with pytest.raises(UserError, match="heun asks the model at t = 0"):
        check_solver("heun", FlowConfig(prediction="data"))
    with pytest.raises(UserError, match=r"'newton' is none of euler, .*, stochastic, leap"):
        check_solver("newton", flow)


def test_guidance_keeps_to_its_interval() -> None:
    (_, noise, given), asked = inputs(1), list[float]()

    def model(noisy_latents: torch.Tensor, t: torch.Tensor, context: torch.Tensor, *_: Any) -> torch.Tensor:
        if (context == 0).any():
            asked.append(round(t[0].item(), 2))
        return torch.zeros_like(noisy_latents)

    given, other = Conditioning(torch.zeros_like(given.context), given.pooled), given
    times = times_for(FlowConfig(), 1.0, 4, "euler")
    sample_latents(model, noise, times, other, given, Guidance(4.0, interval=(0.3, 0.8)))
    assert asked == [0.75, 0.5]


def test_stochastic_sampling_depends_on_its_seed_alone() -> None:
    (_, noise, given), model = inputs(), network("mmdit")
    times = times_for(FlowConfig(), 1.0, 3, "stochastic")
    one, same, other = (
        sample_latents(model, noise, times, given, solver="stochastic", seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("repeats", [None, (2, 1, 1, 3, 1)])
def test_guidance_in_one_pass_is_that_of_two(repeats: tuple[int, ...] | None) -> None:
    """As where texts are of two lengths, which cannot go together."""
    (_, noise, given), model = inputs(), network("mmdit")
    counts = None if repeats is None else torch.tensor(repeats)
    given = Conditioning(given.context, given.pooled, counts)
    null = Conditioning(torch.zeros_like(given.context), torch.zeros_like(given.pooled), counts)
    passes = list[int]()

    def counting(noisy_latents: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        passes.append(len(noisy_latents))
        return model(noisy_latents, *more, **named)

    times = times_for(FlowConfig(), 1.0, 2, "euler")
    together = sample_latents(counting, noise, times, given, null, Guidance(4.0))
    assert passes == [6, 6]
    passes.clear()
    ones = torch.ones(5, dtype=torch.int64) if counts is None else counts
    longer = Conditioning(
        torch.cat([null.context, torch.zeros(3, 1, 12)], 1), null.pooled, torch.cat([ones, torch.tensor([0])])
    )
    apart = sample_latents(counting, noise, times, given, longer, Guidance(4.0))
    assert passes == [3, 3, 3, 3]
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-5)
