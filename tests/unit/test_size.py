"""Sizes in closed form against those of networks that are built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fmscale.config import TrainConfig, load
from fmscale.runs import build_model
from fmscale.size import mmdit_parameters

CONFIG = Path(__file__).parents[2] / "configs" / "sd3_medium_256.yaml"


@pytest.mark.parametrize("shape", [(), ("model.layers=1", "model.heads=2", "model.latent_channels=4")])
@pytest.mark.parametrize(
    "more", [(), ("model.qk_norm=true",), ("model.qk_norm=true", "model.dual_attention_layers=[0]")]
)
def test_parameters_are_those_of_the_network(shape: tuple[str, ...], more: tuple[str, ...]) -> None:
    config = load(TrainConfig, CONFIG, [*shape, *more])
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in build_model(config).parameters())
    assert mmdit_parameters(config.model) == built
