"""encoders/original.py: what single files have no place for is refused; diffusers judges the names end to end."""

from pathlib import Path

import pytest
from diffusers import AutoencoderKL

from fmscale.encoders.original import original_vae
from fmscale.encoders.vae import load_vae
from fmscale.errors import UserError


def save_vae(folder: Path, down: str) -> None:
    options = {"block_out_channels": [8, 8], "norm_num_groups": 4, "up_block_types": ["UpDecoderBlock2D"] * 2}
    AutoencoderKL(down_block_types=[down] * 2, **options).save_pretrained(folder)


def test_levels_of_a_decoder_are_counted_from_the_other_end(tmp_path: Path) -> None:
    save_vae(tmp_path, "DownEncoderBlock2D")
    for pipeline, prefix in (("sd3", "first_stage_model."), ("flux", "vae.")):
        named = original_vae(load_vae(tmp_path), pipeline)
        assert prefix + "decoder.up.1.upsample.conv.weight" in named
        assert prefix + "encoder.down.0.downsample.conv.weight" in named
        assert named[prefix + "decoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
        assert all(name.startswith(prefix) for name in named)


def test_a_vae_with_other_blocks_is_refused(tmp_path: Path) -> None:
    save_vae(tmp_path, "AttnDownEncoderBlock2D")
    with pytest.raises(UserError, match=r"no place for encoder\.down_blocks\.0\.attentions"):
        original_vae(load_vae(tmp_path), "sd3")
