"""Every file in configs/ loads, builds its model on the meta device, and its schema is the program's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fmscale.config import CONFIGS, EncodeConfig, ReflowConfig, TrainConfig, load, schema
from fmscale.runs import build_model

CONFIGS_DIR = Path(__file__).parent.parent / "configs"
KINDS = {"encode": EncodeConfig, "reflow": ReflowConfig}


@pytest.mark.parametrize("path", sorted(CONFIGS_DIR.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_loads_and_builds(path: Path) -> None:
    config = load(KINDS.get(path.stem.split("_")[0], TrainConfig), path)
    if isinstance(config, TrainConfig):
        with torch.device("meta"):
            model = build_model(config)
        assert sum(parameter.numel() for parameter in model.parameters()) > 0


@pytest.mark.parametrize("command", CONFIGS)
def test_schema_is_current(command: str) -> None:
    assert (CONFIGS_DIR / f"{command}.schema.json").read_text() == schema(command)
