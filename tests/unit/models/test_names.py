"""Weights under diffusers' names and back."""

from __future__ import annotations

import pytest
import torch

from fmscale.errors import UserError
from fmscale.models.mmdit import MMDiT
from fmscale.models.names import (
    POSITIONS,
    diffusers_config,
    from_diffusers,
    model_kwargs_from_diffusers,
    to_diffusers,
)

KWARGS = {
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


def random_state(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.randn(like.shape).to(dtype) for name, like in MMDiT(**KWARGS).state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_is_exact(dtype: torch.dtype) -> None:
    state = random_state(dtype)
    back = from_diffusers(to_diffusers(state, KWARGS), KWARGS)
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor), name


def test_a_half_precision_grid_is_recognised() -> None:
    theirs = to_diffusers(random_state(), KWARGS)
    theirs[POSITIONS] = theirs[POSITIONS].bfloat16()
    assert from_diffusers(theirs, KWARGS).keys() == random_state().keys()


def test_rows_of_a_fused_weight_are_query_key_value() -> None:
    state = random_state()
    theirs = to_diffusers(state, KWARGS)
    parts = [theirs[f"transformer_blocks.1.attn.add_{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), state["blocks.1.text.qkv.linear.weight"])
    assert theirs["pos_embed.proj.weight"].shape == (16, 4, 2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("proj_out.bias"), r"missing: proj_out\.bias \(1 in all\)"),
        (lambda state: state.update(lora=torch.ones(1)), r"unexpected: lora \(1 in all\)"),
        (lambda state: state.update({"proj_out.bias": torch.ones(3)}), r"of another shape: proj_out\.bias"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message: str) -> None:
    ours = random_state()
    theirs = to_diffusers(ours, KWARGS)
    for state, convert in ((ours, to_diffusers), (theirs, from_diffusers)):
        change(state)
        with pytest.raises(UserError, match=message):
            convert(state, KWARGS)


def test_foreign_positions_are_refused() -> None:
    theirs = to_diffusers(random_state(), KWARGS | {"base_size": 4})
    with pytest.raises(UserError, match=r"not the grid of model\.base_size 16"):
        from_diffusers(theirs, KWARGS)


def test_config_round_trip() -> None:
    config = diffusers_config(KWARGS, sample_size=32)
    assert config["sample_size"] == 32
    assert config["caption_projection_dim"] == 16
    assert config["qk_norm"] == "rms_norm"
    assert model_kwargs_from_diffusers(config, base_size=4) == KWARGS | {"base_size": 4, "patch_size": 2}


def test_a_config_that_no_mmdit_has_is_refused() -> None:
    config = diffusers_config(KWARGS, sample_size=32) | {"qk_norm": "layer_norm", "out_channels": 8}
    with pytest.raises(UserError, match="out_channels 8 instead of 4, qk_norm layer_norm instead of rms_norm"):
        model_kwargs_from_diffusers(config)
