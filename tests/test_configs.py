"""Every file in configs/ loads, builds its model on the meta device, and its schema is the program's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fmscale.building import check_setup
from fmscale.cli import main
from fmscale.config import CONFIGS, EncodeConfig, ReflowConfig, TrainConfig, load, schema
from fmscale.data.index_build import build_index
from fmscale.data.shards import ShardWriter
from fmscale.encoders.null import save_null
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


# What the published encoders give for a caption.
FEATURES = {
    "mmdit": {
        "clip_l": (77, 768),
        "clip_l_pooled": (768,),
        "clip_g": (77, 1280),
        "clip_g_pooled": (1280,),
        "t5": (256, 4096),
    },
    "flux": {"clip_l_pooled": (768,), "t5": (512, 4096)},
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family, one square image of 256 px as the published VAE and encoders would store it, but zeros."""
    folders = {}
    for family, shapes in FEATURES.items():
        folders[family] = tmp_path_factory.mktemp(family)
        text = {name: torch.zeros(shape) for name, shape in shapes.items()}
        with ShardWriter(folders[family]) as writer:
            writer.write("image", {"latents": torch.zeros(16, 32, 32), **text}, {"caption": "nothing"})
        save_null(folders[family], text)
        build_index(folders[family], {"program": "tests", "t5_length": shapes["t5"][0]})
    return folders


@pytest.mark.parametrize("preset", PARAMETERS)
def test_a_preset_trains_on_what_the_published_encoders_give(
    preset: str, datasets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every check that precedes a run; and what is missing from the preset is the dataset alone."""
    path = CONFIGS_DIR / f"{preset}.yaml"
    family = load(TrainConfig, path).model.family
    config = load(TrainConfig, path, [f"run_dir={tmp_path / 'run'}", f"data.path={datasets[family]}"])
    assert len(check_setup(config, world_size=8).datasets[0].mixture) == 1
    assert main(["train", str(path), f"run_dir={tmp_path / 'run'}", f"data.path={tmp_path / 'none'}"]) == 2
    assert f"{tmp_path / 'none'}: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", CONFIGS)
def test_schema_is_current(command: str) -> None:
    assert (CONFIGS_DIR / f"{command}.schema.json").read_text() == schema(command)
