"""features.py: what is stored of images decodes to them again, mirrored or not; on real digits and the bundled VAE."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from fmscale import digits
from fmscale.config import EncodeConfig, check
from fmscale.data.prepare import Prepared, as_floats
from fmscale.data.tensors import widen
from fmscale.encoders.clip import random_clip
from fmscale.encoders.vae import Posterior
from fmscale.errors import UserError
from fmscale.features import Encoder, add_up, describe, summarize
from fmscale.quickstart import bundled_vae

IMAGES = 12
CLIP_SIZES = {"width": 16, "layers": 2, "heads": 2, "projection_dim": 8, "max_length": 12}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    random_clip(folder, seed=0, **CLIP_SIZES)
    return folder


@pytest.fixture(scope="module")
def images() -> list[Prepared]:
    split = digits.load_split()
    pixels = digits.enlarge(split.heldout_images[:IMAGES]).transpose(0, 3, 1, 2)
    captions = [digits.caption(label) for label in split.heldout_labels[:IMAGES]]
    return [
        Prepared(f"digit{number}", picture, caption, {"caption": caption})
        for number, (picture, caption) in enumerate(zip(pixels, captions, strict=True))
    ]


def make_encoder(clip: Path, **settings: Any) -> Encoder:
    source = {"path": str(clip)}
    data = {"images": "none", "out": "none", "vae": str(bundled_vae()), "text": {"clip_l": source, "clip_g": source}}
    return Encoder(check(EncodeConfig, data | {"dtype": "fp32"} | settings, "test"))


def stored(encoder: Encoder, images: list[Prepared]) -> dict[str, torch.Tensor]:
    """What is stored of the images, stacked."""
    rows = [tensors for _, tensors in encoder.encode(images)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def psnr_db(images: torch.Tensor, rebuilt: torch.Tensor) -> float:
    return 10 * math.log10(4 / (images - rebuilt).square().mean().item())


@pytest.mark.parametrize("kind", ["mean", "sample", "posterior"])
def test_stored_latents_decode_to_the_images_and_their_mirror_images(
    clip: Path, images: list[Prepared], kind: str
) -> None:
    encoder = make_encoder(clip, latents=kind, flip=True, dtype="bf16")
    tensors = stored(encoder, images)
    pixels = as_floats(images)
    lost_db = 2.0 if kind == "sample" else 0.5  # a sample is not the likeliest image; bf16 rounds
    for name, shown in (("latents", pixels), ("latents_flipped", pixels.flip(-1))):
        assert tensors[name].dtype == torch.bfloat16
        rebuilt = encoder.vae.decode(tensors[name].float())
        round_trip_db = psnr_db(shown, encoder.vae.decode(encoder.vae.encode(shown)))
        assert psnr_db(shown, rebuilt) > max(28, round_trip_db - lost_db)
        assert psnr_db(shown.flip(-1), rebuilt) < 20
    log_variances = {"latents_log_variance", "latents_flipped_log_variance"} if kind == "posterior" else set()
    assert {name for name in tensors if name.startswith("latents")} == {"latents", "latents_flipped"} | log_variances


def test_a_posterior_is_stored_as_the_vae_gives_it(clip: Path, images: list[Prepared]) -> None:
    encoder = make_encoder(clip, latents="posterior")
    tensors = stored(encoder, images)
    raw = encoder.vae.model.encode(as_floats(images)).latent_dist
    scale, shift = encoder.vae.scaling_factor, encoder.vae.shift_factor
    torch.testing.assert_close(tensors["latents"], (raw.mean - shift) * scale, atol=1e-5, rtol=1e-5)
    spread = (tensors["latents_log_variance"] / 2).exp()
    torch.testing.assert_close(spread, raw.std * scale, atol=0, rtol=1e-4)


def test_a_stored_sample_belongs_to_its_image_whatever_it_is_encoded_with(clip: Path, images: list[Prepared]) -> None:
    encoder = make_encoder(clip, latents="sample", flip=True)
    together, alone = stored(encoder, images), stored(encoder, images[3:4])
    for name in ("latents", "latents_flipped"):
        torch.testing.assert_close(together[name][3:4], alone[name], atol=1e-4, rtol=0)
    posterior = Posterior(*encoder.vae.posterior(as_floats(images[3:4])))
    noise = (alone["latents"] - posterior.mean) / (posterior.log_variance / 2).exp()
    assert abs(noise.mean().item()) < 0.25
    assert 0.8 < noise.std().item() < 1.2
    other = stored(make_encoder(clip, latents="sample", flip=True, seed=1), images[3:4])
    assert not torch.equal(other["latents"], alone["latents"])


# ---- captions


def test_tokens_are_kept_and_captions_that_were_cut_are_counted(clip: Path, images: list[Prepared]) -> None:
    encoder = make_encoder(clip)
    long = replace(images[0], caption="many words " * 20)
    facts: dict[str, float] = {}
    for image, _ in encoder.encode([images[0], long, long]):
        add_up(facts, encoder.facts(image.meta))
        expected = 2 + len(image.caption.split())
        assert image.meta["tokens"] == {"clip_l": expected, "clip_g": expected}
        assert image.meta["caption"] == images[0].caption
    assert summarize(facts) == {"captions": 3, "cut": {"clip_l": 2, "clip_g": 2}}
    assert describe(summarize(facts))[0] == "2 of 3 captions were cut to fit clip_l"
    assert describe(summarize({"captions": 3})) == []


def test_one_text_encoder_is_enough(clip: Path, images: list[Prepared]) -> None:
    encoder = make_encoder(clip, text={"clip_g": {"path": str(clip)}, "clip_length": 7})
    assert {name: tuple(value.shape) for name, value in stored(encoder, images).items()} == {
        "latents": (IMAGES, 4, 8, 8),
        "clip_g": (IMAGES, 7, 16),
        "clip_g_pooled": (IMAGES, 8),
    }
    assert encoder.identity()["clip_length"] == 7
    assert list(encoder.identity()["text"]) == ["clip_g"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({}, "give clip_l or clip_g: the pooled embedding comes from them"),
        ({"clip_l": {"path": "x"}, "pipeline": "flux"}, "`pipeline: flux` takes clip_l and t5, and no clip_g"),
    ],
)
def test_encoders_that_make_no_model_are_refused(clip: Path, text: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_encoder(clip, text=text)


# ---- t5 in eight bits


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 encoder with random weights that knows 26 words of one letter."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{chr(97 + n)}", -1.0) for n in range(26))]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder)
    config = T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=64)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def test_t5_in_eight_bits_is_read_back_and_its_error_is_told(clip: Path, t5: Path, images: list[Prepared]) -> None:
    text = {"clip_l": {"path": str(clip)}, "t5": {"path": str(t5)}, "t5_length": 6}
    exact = stored(make_encoder(clip, text=text), images)
    encoder = make_encoder(clip, text={**text, "t5_fp8": True})
    tensors, facts = stored(encoder, images), dict[str, float]()
    for image, _ in encoder.encode(images):
        add_up(facts, encoder.facts(image.meta))
    assert tensors["t5"].dtype == torch.float8_e4m3fn
    assert tensors["t5_scale"].shape == (IMAGES, 6)
    restored = widen(tensors)
    assert set(restored) == set(exact)
    lost = (restored["t5"].float() - exact["t5"]).flatten(1).norm(dim=1) / exact["t5"].flatten(1).norm(dim=1)
    told = summarize(facts)["t5_fp8_error"]
    assert told == pytest.approx(lost.square().mean().sqrt().item(), rel=1e-3)
    assert 0.005 < told < 0.04
    assert f"{told:.2%}" in describe(summarize(facts))[-1]
    null = encoder.null()
    assert null["t5"].dtype == torch.float32
    assert {name: int(null[name]) for name in ("clip_l_count", "t5_count")} == {"clip_l_count": 2, "t5_count": 1}
    with pytest.raises(UserError, match="`t5_fp8` stores what t5 gives; give t5, and not `online`"):
        make_encoder(clip, text={"clip_l": {"path": str(clip)}, "t5_fp8": True})
