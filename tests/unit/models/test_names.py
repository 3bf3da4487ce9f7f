"""Weights under the names of others and back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel

from fmscale.config import TrainConfig, load
from fmscale.errors import UserError
from fmscale.models import flux_names, mmdit_names
from fmscale.models.families import FORMS, NAMES, build
from fmscale.models.mmdit import MMDiT
from fmscale.models.mmdit_names import DIFFUSERS_POSITIONS, from_diffusers, to_diffusers
from fmscale.models.published import adopt, publish

SIZES = {"heads": 2, "head_dim": 8, "latent_channels": 4, "context_dim": 12, "pooled_dim": 10}
KWARGS = {**SIZES, "layers": 2, "pos_embed_max_size": 6, "qk_norm": True, "dual_attention_layers": (0,)}
FLUX = {**SIZES, "layers": 2, "single_layers": 2, "rope_dims": (2, 2, 4), "guidance_embed": True}
VALUES = {"mmdit": KWARGS, "flux": FLUX}
MODEL = MMDiT(**KWARGS)


def random_state(model: torch.nn.Module = MODEL, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.randn(like.shape).to(dtype) for name, like in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "form"), [(family, form) for family in FORMS for form in FORMS[family]])
def test_round_trip_is_exact(family: str, form: str, dtype: torch.dtype) -> None:
    model = build(family, VALUES[family])
    state = random_state(model, dtype)
    back = adopt(publish(state, model, FORMS[family][form]), model, FORMS[family][form])
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor), name


def test_a_half_precision_grid_is_recognised() -> None:
    theirs = to_diffusers(random_state(), MODEL)
    theirs[DIFFUSERS_POSITIONS] = theirs[DIFFUSERS_POSITIONS].bfloat16()
    assert from_diffusers(theirs, MODEL).keys() == random_state().keys()


def test_rows_of_a_fused_weight_are_query_key_value() -> None:
    state = random_state()
    theirs = to_diffusers(state, MODEL)
    parts = [theirs[f"transformer_blocks.1.attn.add_{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), state["blocks.1.text.qkv.linear.weight"])
    assert theirs["pos_embed.proj.weight"].shape == (16, 4, 2, 2)


def test_last_shifts_and_scales_change_places_in_original_files() -> None:
    state, width = random_state(), MODEL.width
    theirs = publish(state, MODEL, mmdit_names.original_form)
    scale, shift = state["modulation.bias"][-2 * width :].chunk(2)
    assert torch.equal(theirs["final_layer.adaLN_modulation.1.bias"], torch.cat([shift, scale]))
    scale, shift = state["modulation.bias"][-4 * width : -2 * width].chunk(2)
    assert torch.equal(theirs["joint_blocks.1.context_block.adaLN_modulation.1.bias"], torch.cat([shift, scale]))
    assert torch.equal(theirs["joint_blocks.0.x_block.adaLN_modulation.1.bias"], state["modulation.bias"][: 9 * width])


Change = Callable[[dict[str, torch.Tensor]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("proj_out.bias"), r"missing: proj_out\.bias \(1 in all\)"),
        (lambda state: state.update(lora=torch.ones(1)), r"unexpected: lora \(1 in all\)"),
        (lambda state: state.update({"proj_out.bias": torch.ones(3)}), r"of another shape: proj_out\.bias"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Change, message: str) -> None:
    ours = random_state()
    theirs = to_diffusers(ours, MODEL)
    for state, convert in ((ours, to_diffusers), (theirs, from_diffusers)):
        change(state)
        with pytest.raises(UserError, match=message):
            convert(state, MODEL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("origin", "step"), [(0.0, 1 / 3), (1.0, 4.0), (2.5, 0.25)])
def test_foreign_positions_are_refused_and_recognised(origin: float, step: float, dtype: torch.dtype) -> None:
    learned = MMDiT(**KWARGS, position_origin=origin, position_step=step)
    theirs = to_diffusers(random_state(), learned)
    theirs[DIFFUSERS_POSITIONS] = theirs[DIFFUSERS_POSITIONS].to(dtype)
    with pytest.raises(
        UserError, match=r"other positions than those of model\.base_size: set model\.position_origin"
    ) as said:
        from_diffusers(theirs, MODEL)
    found = re.search(r"position_origin to (\S+) and model\.position_step to (\S+)", str(said.value))
    assert found is not None
    assert [float(value) for value in found.groups()] == pytest.approx(
        [origin, step], rel=1e-8 if dtype == torch.float32 else 2e-3
    )
    from_diffusers(theirs, MMDiT(**KWARGS, position_origin=float(found[1]), position_step=float(found[2])))


def test_positions_of_diffusers_own_making_are_recognised() -> None:
    """Which counts from the first patch of the grid, in parts of its base size."""
    config = mmdit_names.diffusers_config(KWARGS, sample_size=4)
    state = dict(SD3Transformer2DModel(**config).state_dict())
    with pytest.raises(UserError, match=r"set model\.position_origin to 0 and model\.position_step to 0\.333333333"):
        from_diffusers(state, MODEL)


def test_learned_positions_are_refused() -> None:
    theirs = to_diffusers(random_state(), MODEL)
    theirs[DIFFUSERS_POSITIONS] = torch.randn_like(theirs[DIFFUSERS_POSITIONS])
    with pytest.raises(UserError, match="not evenly spaced sines"):
        from_diffusers(theirs, MODEL)


def test_config_round_trip() -> None:
    config = mmdit_names.diffusers_config(KWARGS, sample_size=32)
    assert config["sample_size"] == 32
    assert config["caption_projection_dim"] == 16
    assert config["qk_norm"] == "rms_norm"
    found = mmdit_names.model_kwargs_from_diffusers(config, base_size=4)
    assert found == KWARGS | {"base_size": 4, "patch_size": 2}
    config = flux_names.diffusers_config(FLUX)
    assert config["in_channels"] == 16
    assert flux_names.model_kwargs_from_diffusers(config) == FLUX | {"patch_size": 2}


# As the first of each family were published, by versions of diffusers that did not know all of today's keys.
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd3_medium_256": {
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "in_channels": 16,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 24,
        "out_channels": 16,
        "patch_size": 2,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "sample_size": 128,
    },
    "flux_dev_256": {
        "attention_head_dim": 128,
        "guidance_embeds": True,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 19,
        "num_single_layers": 38,
        "patch_size": 1,
        "pooled_projection_dim": 768,
    },
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_config_that_is_older_than_some_keys_is_that_of_the_preset(preset: str) -> None:
    model = load(TrainConfig, Path(__file__).parents[3] / "configs" / f"{preset}.yaml").model
    found = NAMES[model.family].model_kwargs_from_diffusers(PUBLISHED[preset])
    ours = model.model_dump()
    assert found == {name: ours[name] for name in found}


def test_a_config_that_no_network_has_is_refused() -> None:
    config = mmdit_names.diffusers_config(KWARGS, sample_size=32) | {"qk_norm": "layer_norm", "out_channels": 8}
    with pytest.raises(UserError, match="out_channels 8 instead of 4, qk_norm layer_norm instead of rms_norm"):
        mmdit_names.model_kwargs_from_diffusers(config)
    config = flux_names.diffusers_config(FLUX) | {"out_channels": 8}
    with pytest.raises(UserError, match=r"out_channels 8 instead of None: fmscale has no such Flux"):
        flux_names.model_kwargs_from_diffusers(config)
