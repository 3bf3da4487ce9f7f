"""Names and shapes in closed form against those of networks that are built."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmscale.config import TrainConfig, load
from fmscale.engine.optim import parameter_groups
from fmscale.models.families import blueprint
from fmscale.models.shapes import weights_of

CONFIGS = Path(__file__).parents[3] / "configs"
PRESETS = sorted(path.name for path in CONFIGS.glob("*.yaml") if path.name not in ("encode_sd3.yaml", "reflow.yaml"))
ODD = ["model.layers=1", "model.heads=2", "model.latent_channels=4"]
MORE = [["model.leap_embed=true"], ["model.layers=3", "model.qk_norm=true", "model.dual_attention_layers=[2, 0]"]]


@pytest.mark.parametrize(
    ("preset", "changes"),
    [*((name, []) for name in PRESETS), *(("sd3_medium_256.yaml", [*ODD, *more]) for more in MORE)]
    + [("flux_dev_256.yaml", ["model.layers=1", "model.leap_embed=true", "model.guidance_embed=true"])],
)
def test_weights_are_those_of_the_network(preset: str, changes: list[str]) -> None:
    model = load(TrainConfig, CONFIGS / preset, changes).model.model_dump()
    network = blueprint(model["family"], model)
    weights = weights_of(model)
    assert [(weight.name, weight.shape) for weight in weights] == [
        (name, tuple(parameter.shape)) for name, parameter in network.named_parameters()
    ]
    decaying = {id(p) for group in parameter_groups(network, 0.1) if group["decays"] for p in group["params"]}
    assert [weight.decays for weight in weights] == [id(p) in decaying for p in network.parameters()]
