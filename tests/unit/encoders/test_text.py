"""encoders/text.py against the prompt encoding of diffusers' SD3 pipeline, on tiny encoders with random weights."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from fmscale.batch import Conditioning
from fmscale.encoders.clip import clip_tokenizer, random_clip
from fmscale.encoders.text import TextEncoders, assemble, expand, load_text_encoder, load_text_encoders
from fmscale.errors import UserError

CAPTIONS = ["a handwritten three", "", "Two DOGS, one cat! " * 20]  # the last is longer than any encoder takes
CLIP_TOKENS, CONTEXT_DIM, T5_TOKENS = 16, 72, 24


def write_clip(folder: Path, width: int, projection_dim: int, pad_token: str, seed: int) -> None:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection_dim,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        initializer_factor=5.0,
    )
    CLIPTextModelWithProjection(config).save_pretrained(folder)
    clip_tokenizer(CLIP_TOKENS, pad_token).save_pretrained(folder.with_name(folder.name + "_tokenizer"))


def write_t5(folder: Path) -> None:
    torch.manual_seed(2)
    config = T5Config(d_model=CONTEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=256)
    T5EncoderModel(config).save_pretrained(folder)
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a handwritten three", "two dogs, one cat! the quick brown fox jumps over it"] * 20),
        model_writer=pieces,
        vocab_size=48,
        **{
            "pad_id": 0,
            "eos_id": 1,
            "unk_id": 2,
            "bos_id": -1,
            "num_threads": 1,
            "hard_vocab_limit": False,
            "minloglevel": 2,
        },
    )
    (folder / "spiece.model").write_bytes(pieces.getvalue())
    T5Tokenizer.from_pretrained(folder).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    write_clip(root / "clip_l", 24, 16, "<|endoftext|>", 0)
    write_clip(root / "clip_g", 40, 32, "!", 1)
    write_t5(root / "t5")
    return root


@pytest.fixture(scope="module")
def encoders(folders) -> TextEncoders:
    clips = {
        role: {"path": folders / role, "tokenizer": folders / f"{role}_tokenizer"} for role in ("clip_g", "clip_l")
    }
    return load_text_encoders(clips | {"t5": {"path": folders / "t5"}}, T5_TOKENS)


def pipeline(encoders: TextEncoders, with_t5: bool) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=CONTEXT_DIM,
        caption_projection_dim=8,
        pooled_projection_dim=48,
        pos_embed_max_size=8,
    )
    clip_l, clip_g, t5 = (encoders.by_role[role] for role in ("clip_l", "clip_g", "t5"))
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=None,
        vae=None,
        text_encoder=clip_l.model,
        tokenizer=clip_l.tokenizer,
        text_encoder_2=clip_g.model,
        tokenizer_2=clip_g.tokenizer,
        text_encoder_3=t5.model if with_t5 else None,
        tokenizer_3=t5.tokenizer if with_t5 else None,
    )


@pytest.mark.parametrize("with_t5", [True, False])
def test_features_equal_the_sd3_pipeline(encoders, with_t5):
    roles = ("clip_l", "clip_g", "t5") if with_t5 else ("clip_l", "clip_g")
    features = TextEncoders(encoders.by_role[role] for role in roles).encode(CAPTIONS)
    ours = expand(assemble(features, context_dim=CONTEXT_DIM, t5_length=T5_TOKENS))
    with torch.no_grad():
        context, _, pooled, _ = pipeline(encoders, with_t5).encode_prompt(
            CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
    assert ours.context.shape == (3, CLIP_TOKENS + T5_TOKENS, CONTEXT_DIM)
    torch.testing.assert_close(ours.context, context, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.pooled, pooled, atol=1e-5, rtol=0)


def test_features_by_name_and_shape(encoders):
    features = encoders.encode(CAPTIONS)
    assert {name: tuple(feature.shape) for name, feature in features.items()} == {
        "clip_l": (3, CLIP_TOKENS, 24),
        "clip_l_pooled": (3, 16),
        "clip_g": (3, CLIP_TOKENS, 40),
        "clip_g_pooled": (3, 32),
        "t5": (3, T5_TOKENS, CONTEXT_DIM),
    }
    assert not any(feature.requires_grad for feature in features.values())
    alone = encoders.encode(CAPTIONS[:1])
    for name, feature in features.items():
        torch.testing.assert_close(feature[:1], alone[name], atol=1e-5, rtol=0)


def test_saved_encoders_give_the_same_features(encoders, tmp_path):
    encoders.save("clip_g", tmp_path / "text_encoder_2", tmp_path / "tokenizer_2")
    encoders.save("t5", tmp_path / "t5")
    again = TextEncoders(
        [
            load_text_encoder("clip_g", tmp_path / "text_encoder_2", tokenizer=tmp_path / "tokenizer_2"),
            load_text_encoder("t5", tmp_path / "t5", t5_length=T5_TOKENS),
        ]
    ).encode(CAPTIONS)
    before = encoders.encode(CAPTIONS)
    for name, feature in again.items():
        torch.testing.assert_close(feature, before[name], atol=0, rtol=0)
    assert not list(tmp_path.rglob("*.bin"))


def test_t5_tokenizer_from_sentencepiece_alone(encoders, folders, tmp_path):
    (tmp_path / "spiece.model").write_bytes((folders / "t5" / "spiece.model").read_bytes())
    alone = load_text_encoder("t5", folders / "t5", tokenizer=tmp_path, t5_length=T5_TOKENS)
    torch.testing.assert_close(alone.encode(CAPTIONS), {"t5": encoders.encode(CAPTIONS)["t5"]}, atol=0, rtol=0)


def test_dtype(folders):
    half = load_text_encoder("t5", folders / "t5", dtype=torch.bfloat16)
    assert half.encode(["a"])["t5"].dtype == torch.bfloat16
    assert half.max_length == 256


def test_identity_is_json_and_tells_weights_apart(encoders):
    identity = encoders.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert list(identity) == ["clip_l", "clip_g", "t5"]
    assert identity["clip_l"]["max_length"] == CLIP_TOKENS
    assert len({role["sha256"] for role in identity.values()}) == 3


def test_two_encoders_for_a_role_are_refused(encoders):
    clip_l = encoders.by_role["clip_l"]
    with pytest.raises(UserError, match="given twice: clip_l, clip_l"):
        TextEncoders([clip_l, clip_l])


def test_clips_of_other_lengths_are_refused(encoders, tmp_path):
    random_clip(tmp_path, width=8, layers=2, heads=2, projection_dim=8, max_length=9, seed=0)
    with pytest.raises(UserError, match="equally many tokens"):
        TextEncoders([encoders.by_role["clip_l"], load_text_encoder("clip_g", tmp_path)])


# ---- assemble and expand


def clip_features(widths: dict[str, int]) -> dict[str, torch.Tensor]:
    tokens = {role: torch.randn(2, 5, width) for role, width in widths.items()}
    return tokens | {f"{role}_pooled": torch.randn(2, width + 1) for role, width in widths.items()}


def test_assemble_without_t5_has_one_zero_token_for_all():
    features = clip_features({"clip_l": 3, "clip_g": 4})
    conditioning = assemble(features, context_dim=10, t5_length=7)
    assert conditioning.context.shape == (2, 6, 10)
    assert torch.equal(conditioning.context[:, :5, :3], features["clip_l"])
    assert torch.equal(conditioning.context[:, :5, 3:7], features["clip_g"])
    assert not conditioning.context[:, :5, 7:].any()
    assert not conditioning.context[:, 5].any()
    assert conditioning.repeats.tolist() == [1, 1, 1, 1, 1, 7]
    assert torch.equal(conditioning.pooled, torch.cat([features["clip_l_pooled"], features["clip_g_pooled"]], dim=-1))


def test_assemble_with_t5_and_one_clip():
    features = clip_features({"clip_l": 3}) | {"t5": torch.randn(2, 6, 10)}
    conditioning = assemble(features, context_dim=10)
    assert conditioning.repeats is None
    assert torch.equal(conditioning.context[:, 5:], features["t5"])
    assert torch.equal(conditioning.pooled, features["clip_l_pooled"])


def test_expand_writes_tokens_out():
    context = torch.randn(2, 3, 4)
    pooled = torch.randn(2, 5)
    expanded = expand(Conditioning(context, pooled, torch.tensor([1, 3, 2])))
    assert torch.equal(expanded.context, context[:, [0, 1, 1, 1, 2, 2]])
    assert expanded.repeats is None
    assert expand(expanded) is expanded


def test_features_that_do_not_fit_are_refused():
    features = clip_features({"clip_l": 3, "clip_g": 4})
    with pytest.raises(UserError, match=r"clip_l\+clip_g are 7 wide"):
        assemble(features, context_dim=6)
    with pytest.raises(UserError, match="t5 are 9 wide"):
        assemble(features | {"t5": torch.zeros(2, 6, 9)}, context_dim=10)
    with pytest.raises(UserError, match="no CLIP features"):
        assemble({"t5": torch.zeros(2, 6, 9)}, context_dim=9)


# ---- files that cannot be used


def test_wrong_roles_and_folders_are_refused(folders, tmp_path):
    with pytest.raises(UserError, match="'clip' is none of clip_l, clip_g, t5"):
        load_text_encoder("clip", folders / "clip_l")
    with pytest.raises(UserError, match="clip_l: give either `path`, or `open_clip`"):
        load_text_encoders({"clip_l": {"open_clip": "ViT-L-14"}, "t5": None})
    with pytest.raises(UserError, match="no model folder"):
        load_text_encoder("clip_l", tmp_path)
    with pytest.raises(UserError, match=r"clip_l must be clip_text_model, config\.json says t5"):
        load_text_encoder("clip_l", folders / "t5")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_text_encoder("clip_l", folders / "clip_l")


def test_pickled_weights_are_never_read(folders, tmp_path):
    (tmp_path / "config.json").write_bytes((folders / "clip_l" / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="only safetensors are read"):
        load_text_encoder("clip_l", tmp_path)


def test_weights_that_do_not_fill_the_model_are_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(folders / "clip_l" / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folders / "clip_l" / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"lack text_projection\.weight"):
        load_text_encoder("clip_l", tmp_path)


def test_damaged_weights_are_refused(folders, tmp_path):
    (tmp_path / "config.json").write_bytes((folders / "clip_l" / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folders / "clip_l" / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        load_text_encoder("clip_l", tmp_path)


def test_tokenizer_longer_than_the_model_is_refused(folders, tmp_path):
    clip_tokenizer(CLIP_TOKENS + 1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="takes 16 tokens, its tokenizer gives 17"):
        load_text_encoder("clip_l", folders / "clip_l", tokenizer=tmp_path)
