"""Names and shapes in closed form against those of networks that are built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fmscale.config import TrainConfig, load
from fmscale.engine.blocks import parts_of
from fmscale.engine.optim import parameter_groups
from fmscale.models.families import blueprint
from fmscale.models.shapes import in_forward_order, recomputable, weights_of

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
    assert recomputable(weights) == parts_of(list(network.blocks))


@pytest.mark.parametrize("preset", ["sd35_medium_256.yaml", "flux_dev_256.yaml"])
def test_modules_run_in_the_order_that_is_told(preset: str) -> None:
    small = ["model.layers=2", "model.heads=2", "model.latent_channels=4", "model.context_dim=32", "model.pooled_dim=8"]
    more = ["model.single_layers=2"] if preset.startswith("flux") else ["model.dual_attention_layers=[0]"]
    model = load(TrainConfig, CONFIGS / preset, [*small, *more]).model.model_dump()
    network, ran = blueprint(model["family"], model), list[str]()
    for name, module in network.named_modules():
        if not list(module.children()) and list(module.parameters()):
            module.register_forward_pre_hook(lambda module, given, name=name: ran.append(name))
    with torch.device("meta"):
        text, pooled = torch.empty(1, 3, model["context_dim"]), torch.empty(1, model["pooled_dim"])
        network(torch.empty(1, model["latent_channels"], 8, 8), torch.empty(1), text, pooled)
    told = list(dict.fromkeys(weight.module for weight in in_forward_order(weights_of(model))))
    assert [name for name in told if name.startswith("blocks.")] == [name for name in ran if name.startswith("blocks.")]
    assert told[-1] == ran[-1] == "proj_out"
    first = [name for name in ran if not name.startswith("blocks.")]
    assert set(told[: len(first) - 1]) == set(ran[: len(first) - 1])
