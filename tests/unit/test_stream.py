"""Weights written a little at a time are what stock diffusers would have written at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from fmscale.models.families import FORMS, build, file_layout
from fmscale.models.mmdit import MMDiT
from fmscale.models.mmdit_names import (
    DIFFUSERS_POSITIONS,
    diffusers_config,
    position_parts,
    to_diffusers,
)
from fmscale.models.published import publish
from fmscale.stream import stream_weights, write_file

KWARGS: dict[str, Any] = {
    "layers": 2,
    "heads": 2,
    "head_dim": 8,
    "latent_channels": 4,
    "context_dim": 12,
    "pooled_dim": 10,
    "pos_embed_max_size": 6,
    "qk_norm": True,
    "dual_attention_layers": (0,),
}


@pytest.mark.parametrize("max_file_bytes", [10**9, 20_000, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_stock_diffusers_loads_what_was_streamed(tmp_path: Path, dtype: torch.dtype, max_file_bytes: int) -> None:
    network = MMDiT(**KWARGS)
    state = {name: torch.randn(like.shape) for name, like in network.state_dict().items()}

    def parts(name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """The last stretch first."""
        if name == DIFFUSERS_POSITIONS:
            yield from position_parts(network)
            return
        flat = state[name].flatten()
        yield 7, flat[7:]
        yield 0, flat[:7]

    model = SD3Transformer2DModel(**diffusers_config(KWARGS, sample_size=8))
    model.save_config(tmp_path)
    stream_weights(
        tmp_path, file_layout("mmdit", network, "diffusers"), parts, dtype, {DIFFUSERS_POSITIONS}, max_file_bytes
    )
    written = sorted(tmp_path.glob("*.safetensors"))
    assert {10**9: len(written) == 1, 1: len(written) == len(state) + 1}.get(
        max_file_bytes, 1 < len(written) < len(state)
    )
    theirs = to_diffusers(state, network)
    wanted = {name: value if name == DIFFUSERS_POSITIONS else value.to(dtype) for name, value in theirs.items()}
    stored = {name: value for file in written for name, value in load_file(file).items()}
    assert stored.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(stored[name], value), name
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    assert index.exists() == (len(written) > 1)
    if index.exists():
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(v.nbytes for v in wanted.values())
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype).state_dict()
    for name, value in wanted.items():
        assert torch.equal(loaded[name].to(dtype), value.to(dtype)), name  # with accelerate the positions are cast too


@pytest.mark.parametrize("cut", [1, 7, 1000])
@pytest.mark.parametrize("family", FORMS)
def test_an_original_file_is_what_publish_makes(tmp_path: Path, family: str, cut: int) -> None:
    """Fused matrices go to several places, and halves are swapped, however the stretches are cut."""
    single = {"single_layers": 1, "rope_dims": (2, 2, 4)} if family == "flux" else {}
    network = build(family, KWARGS | single)
    state = {name: torch.randn(like.shape) for name, like in network.state_dict().items()}
    layout = {name: held for name, held in file_layout(family, network, "original").items() if name in state}

    def parts(name: str) -> Iterator[tuple[int, torch.Tensor]]:
        flat = state[name].flatten()
        length = max(len(flat) // cut, 1)
        yield from ((at, flat[at : at + length]) for at in reversed(range(0, len(flat), length)))

    file = tmp_path / "weights.safetensors"
    write_file(file, layout, parts, dict.fromkeys(layout, torch.float32))
    stored, wanted = load_file(file), publish(state, network, FORMS[family]["original"])
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(stored[name], value) for name, value in wanted.items())
