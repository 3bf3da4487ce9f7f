"""Every file in configs/ loads, builds its model on the meta device, and its schema is the program's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fmscale.config import CONFIGS, EncodeConfig, ReflowConfig, TrainConfig, load, schema
from fmscale.runs import build_model
from fmscale.size import checkpoint_bytes

CONFIGS_DIR = Path(__file__).parent.parent / "configs"
KINDS = {"encode": EncodeConfig, "reflow": ReflowConfig}


PARAMETERS = {
    "sd3_medium_256": 2_028_328_000,
    "sd35_medium_256": 2_243_171_520,
    "sd35_large_256": 8_056_627_520,
    "flux_dev_256": 11_901_408_320,
    "mmdit_30m_256": 33_100_096,
    "mmdit_150m_256": 148_140_864,
    "mmdit_450m_256": 461_478_208,
}


@pytest.mark.parametrize("path", sorted(CONFIGS_DIR.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_loads_and_builds(path: Path) -> None:
    config = load(KINDS.get(path.stem.split("_")[0], TrainConfig), path)
    if isinstance(config, TrainConfig):
        with torch.device("meta"):
            model = build_model(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == PARAMETERS[path.stem]
        assert f"{count:,} parameters" in path.read_text()
        assert checkpoint_bytes(config) == 4 * (3 + len(config.ema.decays)) * count


@pytest.mark.parametrize("command", CONFIGS)
def test_schema_is_current(command: str) -> None:
    assert (CONFIGS_DIR / f"{command}.schema.json").read_text() == schema(command)
