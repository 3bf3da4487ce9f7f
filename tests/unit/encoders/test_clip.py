"""encoders/clip.py: a converted open_clip tower against open_clip's own numbers, and the random encoders."""

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, TextTransformer
from safetensors.torch import save_file
from torch import nn

from fmscale.encoders.clip import clip_tokenizer, from_open_clip, load_open_clip, random_clip
from fmscale.encoders.text import load_text_encoder
from fmscale.errors import UserError

CAPTIONS = ["a handwritten three", "", "It's 2 dogs & one cat — naïve café!", "many words " * 30]
LENGTH = 20
SETTINGS = {"context_length": LENGTH, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 3}


def random_tower(act_layer: type[nn.Module] = nn.GELU, **settings) -> TextTransformer:
    torch.manual_seed(0)
    tower = TextTransformer(**(SETTINGS | settings), output_dim=16, act_layer=act_layer).eval()
    for name, weight in tower.named_parameters():  # biases and norms too, so that none can be mistaken for another
        if weight.ndim == 1:
            nn.init.normal_(weight, mean=float(".weight" in name), std=0.2)
    return tower


def add_model(folder, name: str, text_cfg: dict, **extra) -> None:
    """Make open_clip know a model; it keeps the names that it knows for the rest of the process."""
    vision_cfg = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    config = {"embed_dim": 16, "vision_cfg": vision_cfg, "text_cfg": text_cfg, **extra}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@torch.no_grad()
def features_of_open_clip(tower: TextTransformer, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    output = tower.forward_intermediates(ids, indices=[SETTINGS["layers"] - 2], output_fmt="NLC")
    return {"clip_g": output["text_intermediates"][0], "clip_g_pooled": tower(ids)}


@pytest.mark.parametrize("act_layer", [nn.GELU, QuickGELU])
def test_converted_tower_equals_open_clip(act_layer):
    tower = random_tower(act_layer)
    ids = open_clip.tokenizer.SimpleTokenizer()(CAPTIONS, context_length=LENGTH)
    expected = features_of_open_clip(tower, ids)
    with torch.no_grad():
        output = from_open_clip(tower)(ids, output_hidden_states=True)
    torch.testing.assert_close(output.hidden_states[-2], expected["clip_g"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.text_embeds, expected["clip_g_pooled"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("prefix", ["", "text."])
def test_checkpoint_from_file_equals_open_clip(tmp_path, prefix):
    add_model(tmp_path, "tiny-for-test", SETTINGS, quick_gelu=True)
    tower = random_tower(QuickGELU)
    state = {prefix + name: weight for name, weight in tower.state_dict().items()}
    save_file(
        state | {"visual.conv1.weight": torch.zeros(1), "logit_scale": torch.zeros(1)}, tmp_path / "w.safetensors"
    )
    encoder = load_text_encoder("clip_g", open_clip="tiny-for-test", checkpoint=tmp_path / "w.safetensors")
    ids = open_clip.tokenizer.SimpleTokenizer()(CAPTIONS[:2], context_length=LENGTH)
    torch.testing.assert_close(encoder.encode(CAPTIONS[:2]), features_of_open_clip(tower, ids), atol=1e-4, rtol=0)
    assert encoder.max_length == LENGTH
    encoder.save(tmp_path / "saved")
    again = load_text_encoder("clip_g", tmp_path / "saved")
    torch.testing.assert_close(again.encode(CAPTIONS), encoder.encode(CAPTIONS), atol=0, rtol=0)


def test_flux_takes_open_clips_pooled_embedding_before_its_projection(tmp_path):
    add_model(tmp_path, "tiny-flux-for-test", SETTINGS, quick_gelu=True)
    tower = random_tower(QuickGELU)
    save_file(tower.state_dict(), tmp_path / "w.safetensors")
    options = {"open_clip": "tiny-flux-for-test", "checkpoint": tmp_path / "w.safetensors", "pipeline": "flux"}
    encoder = load_text_encoder("clip_l", **options)
    ids = open_clip.tokenizer.SimpleTokenizer()(CAPTIONS[:2], context_length=LENGTH)
    pooled = encoder.encode(CAPTIONS[:2])
    expected = features_of_open_clip(tower, ids)["clip_g_pooled"]
    torch.testing.assert_close(pooled["clip_l_pooled"] @ tower.text_projection, expected, atol=1e-4, rtol=0)
    encoder.save(tmp_path / "saved")
    again = load_text_encoder("clip_l", tmp_path / "saved", pipeline="flux")
    torch.testing.assert_close(again.encode(CAPTIONS[:2]), pooled, atol=0, rtol=0)


def test_tokenizer_gives_open_clips_ids():
    ids = clip_tokenizer(LENGTH, "!")(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    expected = open_clip.tokenizer.SimpleTokenizer()(CAPTIONS, context_length=LENGTH)
    expected[2] = ids[2]  # "!" in a caption: the tokenizers of CLIP-G pipelines read it as padding
    assert torch.equal(ids, expected)
    plain = clip_tokenizer(LENGTH)(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    expected = open_clip.tokenizer.SimpleTokenizer()(CAPTIONS, context_length=LENGTH)
    assert torch.equal(plain, expected.masked_fill(expected == 0, 49407))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"no_causal_mask": True}, "cannot"),
        ({"pool_type": "last"}, "cannot"),
        ({"proj_bias": True}, "cannot"),
        ({"ls_init_value": 0.1}, "cannot"),
        ({"act_layer": nn.ReLU}, "ReLU"),
    ],
)
def test_towers_that_cannot_be_converted_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        from_open_clip(random_tower(**settings))


def test_models_that_open_clip_or_transformers_do_not_know_are_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean ViT-bigG-14"):
        load_open_clip("ViT-bigG14", tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"list_models\(\) names them"):
        load_open_clip("hf-hub:someone/something", tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="hf_tokenizer_name"):
        load_open_clip("ViT-L-14-CLIPA", tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="open_clip has no t5"):
        load_text_encoder("t5", open_clip="ViT-L-14", checkpoint=tmp_path / "w.safetensors")


def test_checkpoints_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="only safetensors are read"):
        load_open_clip("ViT-L-14", tmp_path / "w.pt")
    (tmp_path / "damaged.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="damaged"):
        load_open_clip("ViT-L-14", tmp_path / "damaged.safetensors")
    save_file(random_tower().state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(UserError, match="not the weights of open_clip's ViT-L-14"):
        load_open_clip("ViT-L-14", tmp_path / "small.safetensors")


def test_a_vocabulary_that_is_not_clips_is_refused(tmp_path):
    add_model(tmp_path, "tiny-vocabulary-for-test", SETTINGS | {"vocab_size": 100})
    save_file(random_tower(vocab_size=100).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="has 100 tokens, not CLIP's 49408"):
        load_text_encoder("clip_g", open_clip="tiny-vocabulary-for-test", checkpoint=tmp_path / "w.safetensors")


def test_random_clip_is_set_by_its_seed_and_tells_words_and_places_apart(tmp_path):
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        random_clip(tmp_path / name, width=64, layers=2, heads=4, projection_dim=48, max_length=24, seed=seed)
    first, again, other = (load_text_encoder("clip_l", tmp_path / name) for name in ("first", "again", "other"))
    captions = ["a handwritten three", "a handwritten five", "three three"]
    features = first.encode(captions)
    torch.testing.assert_close(again.encode(captions), features, atol=0, rtol=0)
    assert not torch.equal(other.encode(captions)["clip_l"], features["clip_l"])
    assert features["clip_l"].shape == (3, 24, 64)
    three, five, twice = features["clip_l"]
    assert F.cosine_similarity(*features["clip_l_pooled"][:2], dim=0) < 0.95
    assert F.cosine_similarity(three[3], five[3], dim=0) < 0.8
    assert F.cosine_similarity(twice[1], twice[2], dim=0) < 0.8
