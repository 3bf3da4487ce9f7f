"""The quickstart's encoders in the stock SD3 pipeline: written, read back, and run to a picture."""

from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

import fmscale
from fmscale.encoders.clip import random_clip
from fmscale.encoders.text import TextEncoders, load_text_encoder
from fmscale.encoders.vae import load_vae


def load_encoders(folder: Path) -> TextEncoders:
    sizes = {"width": 16, "layers": 2, "heads": 2, "max_length": 24}
    for seed, role in enumerate(("clip_l", "clip_g")):
        random_clip(folder / role, projection_dim=8, seed=seed, **sizes)
    return TextEncoders(load_text_encoder(role, folder / role) for role in ("clip_l", "clip_g"))


def draw(pipeline: StableDiffusion3Pipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np", "max_sequence_length": 8}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a handwritten three", generator=generator, **settings).images


def test_the_stock_pipeline_reads_the_folders_and_paints(tmp_path):
    torch.manual_seed(0)
    encoders = load_encoders(tmp_path / "random")
    vae = load_vae(Path(fmscale.__file__).parent / "assets" / "digits_vae")
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=vae.channels,
        out_channels=vae.channels,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=32,
        caption_projection_dim=8,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
    )
    clip_l, clip_g = encoders.by_role["clip_l"], encoders.by_role["clip_g"]
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.model,
        text_encoder=clip_l.model,
        tokenizer=clip_l.tokenizer,
        text_encoder_2=clip_g.model,
        tokenizer_2=clip_g.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    vae.save(tmp_path / "pipeline" / "vae")
    encoders.save("clip_l", tmp_path / "pipeline" / "text_encoder", tmp_path / "pipeline" / "tokenizer")
    absent = {"text_encoder_3": None, "tokenizer_3": None}  # diffusers asks for them, null in model_index.json or not
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True, **absent)
    picture = draw(again)
    assert picture.shape == (1, 64, 64, 3)
    np.testing.assert_allclose(picture, draw(pipeline), atol=1e-5)
