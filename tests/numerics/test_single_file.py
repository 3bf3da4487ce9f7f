"""Single files with original names, read by diffusers' own loader: the same weights to the bit, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import save_file

from fmscale.models import flux_names, mmdit_names
from fmscale.models.families import NAMES, blueprint
from fmscale.models.published import publish

PREFIX = "model.diffusion_model."  # of a network beside others in one file
SD3 = {"layers": 3, "heads": 2, "head_dim": 8, "latent_channels": 4, "context_dim": 12, "pooled_dim": 10}
SD3 |= {"pos_embed_max_size": 6}
# diffusers' loader takes FLUX to be 3072 wide, whatever its config says.
FLUX = {"layers": 1, "single_layers": 1, "heads": 24, "context_dim": 64, "pooled_dim": 32}
CASES: dict[str, tuple[str, dict[str, Any], str, torch.dtype]] = {
    "sd3": ("mmdit", SD3, PREFIX, torch.float32),
    "sd3_bare": ("mmdit", SD3, "", torch.float32),
    "sd35_medium": ("mmdit", SD3 | {"qk_norm": True, "dual_attention_layers": (0, 1)}, PREFIX, torch.float32),
    "sd35_large": ("mmdit", SD3 | {"qk_norm": True, "base_size": 4}, PREFIX, torch.float32),
    "flux_dev": ("flux", FLUX | {"guidance_embed": True}, "", torch.bfloat16),
}


def load_stock(family: str, values: dict[str, Any], folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What diffusers makes of the single file in a folder."""
    if family == "mmdit":
        network, config = SD3Transformer2DModel, mmdit_names.diffusers_config(values, sample_size=16)
    else:
        network, config = FluxTransformer2DModel, flux_names.diffusers_config(values)
    (folder / "config.json").write_text(json.dumps({"_class_name": network.__name__, **config}))
    file = str(folder / "weights.safetensors")
    return network.from_single_file(file, config=str(folder), local_files_only=True, torch_dtype=dtype).state_dict()


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case == "flux_dev" else case for case in CASES]
)
def test_diffusers_reads_our_weights_from_an_original_file(case: str, tmp_path: Path) -> None:
    family, values, prefix, dtype = CASES[case]
    names, model, generator = NAMES[family], blueprint(family, values), torch.Generator().manual_seed(0)
    shapes = {name: like.shape for name, like in model.state_dict().items()}
    state = {name: torch.empty(shape, dtype=dtype).uniform_(generator=generator) for name, shape in shapes.items()}
    original = publish(state, model, names.original_form)
    if family == "mmdit":
        original[mmdit_names.ORIGINAL_POSITIONS] = mmdit_names.position_grid(model)
    save_file({prefix + name: value for name, value in original.items()}, tmp_path / "weights.safetensors")
    read, expected = load_stock(family, values, tmp_path, dtype), names.to_diffusers(state, model)
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value), name
    back = names.from_diffusers(read, model)
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(back[name], value), name
    for name, value in publish(back, model, names.original_form).items():
        assert torch.equal(value, original[name]), name
