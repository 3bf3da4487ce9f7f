"""encoders/text.py against diffusers' prompt encoding of SD3 and FLUX, on tiny encoders with random weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny_t5 import write_t5
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fmscale.batch import Conditioning
from fmscale.encoders.clip import clip_tokenizer, random_clip
from fmscale.encoders.text import (
    TRIM_TOKENS,
    TextEncoders,
    assemble,
    expand,
    load_text_encoder,
    load_text_encoders,
    trim,
    zeros_for,
)
from fmscale.encoders.weights import model_folder
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    write_clip(root / "clip_l", 24, 16, "<|endoftext|>", 0)
    write_clip(root / "clip_g", 40, 32, "!", 1)
    write_t5(root / "t5", CONTEXT_DIM)
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


@pytest.fixture(scope="module")
def flux(folders, tmp_path_factory) -> TextEncoders:
    """As FLUX has them: CLIP-L without a projection, written as the pipeline's folder is."""
    folder = tmp_path_factory.mktemp("flux")
    CLIPTextModel.from_pretrained(folders / "clip_l").save_pretrained(folder)
    clip = {"path": folder, "tokenizer": folders / "clip_l_tokenizer"}
    return load_text_encoders({"clip_l": clip, "t5": {"path": folders / "t5"}}, T5_TOKENS, pipeline="flux")


def test_features_equal_the_flux_pipeline(flux):
    transformer = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=CONTEXT_DIM,
        pooled_projection_dim=24,
        axes_dims_rope=(2, 2, 4),
    )
    clip_l, t5 = (flux.by_role[role] for role in ("clip_l", "t5"))
    stock = FluxPipeline(
        transformer=transformer,
        scheduler=None,
        vae=None,
        text_encoder=clip_l.model,
        tokenizer=clip_l.tokenizer,
        text_encoder_2=t5.model,
        tokenizer_2=t5.tokenizer,
    )
    with torch.no_grad():
        context, pooled, _ = stock.encode_prompt(CAPTIONS, None, max_sequence_length=T5_TOKENS)
    features = flux.encode(CAPTIONS)
    assert set(features) == {"clip_l_pooled", "t5"}
    ours = assemble(features, context_dim=CONTEXT_DIM)
    torch.testing.assert_close(ours.context, context, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.pooled, pooled, atol=1e-5, rtol=0)
    assert ours.repeats is None


def test_flux_takes_what_is_pooled_before_the_projection(flux, folders):
    """A folder with a projection gives the same features: FLUX does not look at it."""
    clip = {"path": folders / "clip_l", "tokenizer": folders / "clip_l_tokenizer"}
    projected = load_text_encoders({"clip_l": clip}, pipeline="flux").encode(CAPTIONS)
    torch.testing.assert_close(projected, {"clip_l_pooled": flux.encode(CAPTIONS)["clip_l_pooled"]}, atol=0, rtol=0)
    projected = load_text_encoders({"clip_l": clip}).encode(CAPTIONS)
    assert projected["clip_l_pooled"].shape != flux.encode(CAPTIONS)["clip_l_pooled"].shape


def test_a_shorter_clip_is_what_a_pipeline_reads_again(encoders, folders, tmp_path):
    shorter = load_text_encoders(
        {"clip_l": {"path": folders / "clip_l", "tokenizer": folders / "clip_l_tokenizer"}}, clip_length=10
    )
    features = shorter.encode(CAPTIONS)
    assert features["clip_l"].shape == (3, 10, 24)
    shorter.save("clip_l", tmp_path)
    torch.testing.assert_close(load_text_encoder("clip_l", tmp_path).encode(CAPTIONS), features, atol=0, rtol=0)
    with pytest.raises(UserError, match="takes 16 tokens, clip_length is 17; lower that"):
        load_text_encoder("clip_l", folders / "clip_l", tokenizer=folders / "clip_l_tokenizer", clip_length=17)


def test_tokens_are_counted_before_captions_are_cut(encoders):
    counts = encoders.count(CAPTIONS)
    assert list(counts) == ["clip_l", "clip_g", "t5"]
    assert counts["clip_l"] == counts["clip_g"] == [5, 2, 2 + 6 * 20]  # words and marks, start and end
    assert counts["t5"][1] == 1  # the end alone
    assert counts["t5"][2] > T5_TOKENS
    ids = encoders.by_role["t5"].tokenizer(CAPTIONS[0]).input_ids
    assert counts["t5"][0] == len(ids)


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


def test_counted_features_are_those_that_are_not_padding(encoders, flux):
    """By the attention mask that transformers' tokenizers make, which no pipeline passes on."""
    features = encoders.encode(CAPTIONS, counted=True)
    plain = encoders.encode(CAPTIONS)
    assert features.keys() - plain.keys() == {"clip_l_count", "clip_g_count", "t5_count"}
    assert features["clip_l_count"].tolist()[:2] == [5, 2]
    given = assemble(features, context_dim=CONTEXT_DIM)
    assert torch.equal(given.context, assemble(plain, context_dim=CONTEXT_DIM).context)
    masks = [
        encoders.by_role[role].tokenizer(
            CAPTIONS, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )["attention_mask"]
        for role, length in (("clip_l", CLIP_TOKENS), ("t5", T5_TOKENS))
    ]
    assert torch.equal(given.repeats, torch.cat(masks, dim=1))
    counted = flux.encode(CAPTIONS, counted=True)
    assert counted.keys() == {"t5", "clip_l_pooled", "t5_count"}
    assert torch.equal(assemble(counted, context_dim=CONTEXT_DIM).repeats, masks[1])


def test_the_larger_count_holds_for_both_clips_and_none_for_an_absent_t5():
    features = clip_features({"clip_l": 3, "clip_g": 4})
    counts = {"clip_l_count": torch.tensor([2, 4]), "clip_g_count": torch.tensor([3, 9])}
    given = assemble(features | counts, context_dim=10, t5_length=7)
    assert given.context.shape == (2, 5, 10)
    assert given.repeats.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    nothing = assemble(zeros_for(features | counts), context_dim=10)
    assert not nothing.context.any()
    assert nothing.repeats.tolist() == [[1, 0, 0, 0, 0]] * 2


@pytest.mark.parametrize(("longest", "left"), [(1, 1), (31, 1), (32, 2), (82, 3)])
def test_trim_leaves_what_anybody_sees_in_few_shapes(longest, left):
    repeats = torch.zeros(2, 100, dtype=torch.int64)
    repeats[0, :1], repeats[1, 5 : 5 + longest] = 1, 1
    whole = Conditioning(torch.randn(2, 100, 4), torch.randn(2, 5), repeats)
    trimmed = trim(whole)
    assert trimmed.context.shape == (2, left * TRIM_TOKENS, 4)
    for row in range(2):
        assert torch.equal(
            trimmed.context[row, trimmed.repeats[row].bool()], whole.context[row, whole.repeats[row].bool()]
        )
    full = Conditioning(whole.context, whole.pooled, torch.ones_like(repeats))
    assert torch.equal(trim(full).context, whole.context)
    for repeated in (None, torch.tensor([1] * 99 + [7])):
        conditioning = Conditioning(whole.context, whole.pooled, repeated)
        assert trim(conditioning) is conditioning


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


# ---- models on the Hugging Face hub


@pytest.fixture
def hub(folders, tmp_path, monkeypatch) -> str:
    """The commit of a repository `someone/tiny` that the hub's own client fetched before, with a pipeline's folders."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(folders / "clip_l", repository / "snapshots" / commit / "text_encoder")
    shutil.copytree(folders / "clip_l_tokenizer", repository / "snapshots" / commit / "tokenizer")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return commit


def test_a_name_on_the_hub_is_a_folder_once_it_was_fetched(hub, encoders):
    model, tokenizer = (model_folder(f"someone/tiny/{name}") for name in ("text_encoder", "tokenizer"))
    assert model.parent.name == hub
    features = load_text_encoder("clip_l", model, tokenizer=tokenizer).encode(CAPTIONS)
    torch.testing.assert_close(features, encoders.by_role["clip_l"].encode(CAPTIONS), atol=0, rtol=0)


def test_a_folder_goes_before_a_name_on_the_hub(hub, tmp_path):
    (tmp_path / "someone" / "tiny").mkdir(parents=True)
    assert model_folder("someone/tiny") == Path("someone/tiny")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("someone/else", "someone/else: there is no such folder, and the Hugging Face hub gives no model"),
        ("someone/tiny/vae", "has no folder 'vae'"),
    ],
)
def test_what_is_neither_a_folder_nor_on_the_hub_is_one_line(hub, place, message):
    with pytest.raises(UserError, match=message) as caught:
        model_folder(place)
    assert "\n" not in str(caught.value)


def test_a_path_is_no_name_on_the_hub(tmp_path):
    for place in (tmp_path / "absent", Path("../absent/model"), Path("absent")):
        assert model_folder(place) == place


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
    with pytest.raises(UserError, match="takes 16 tokens, its tokenizer's model_max_length is 17; lower that"):
        load_text_encoder("clip_l", folders / "clip_l", tokenizer=tmp_path)
