"""Both towers of a CLIP from files, against open_clip's own way to load and use them."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from tiny_clip import CONFIG, write_clip

from fmscale.encoders.clip_pair import ClipPair
from fmscale.errors import UserError

CAPTIONS = ["a handwritten three", "many words " * 30]


def test_features_and_scores_are_those_of_open_clip(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip")
    pixels = torch.randint(0, 256, (2, 40, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pair = ClipPair(str(folder))
    found = pair.images(pixels)
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.tokenizer.SimpleTokenizer()(CAPTIONS, context_length=20)
    given = torch.stack([prepare(Image.fromarray(image.numpy())) for image in pixels])
    with torch.no_grad():
        images, texts, _ = model.eval()(given, tokens)  # of length 1
        torch.testing.assert_close(found, model.encode_image(given))
    cosines = (images * texts).sum(dim=1)
    assert (cosines < 0).any() or (-cosines < 0).any()
    torch.testing.assert_close(pair.scores(found, CAPTIONS), 100 * cosines.clamp(min=0))
    torch.testing.assert_close(pair.scores(-found, CAPTIONS), 100 * (-cosines).clamp(min=0))


def test_a_model_by_name_with_its_file(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip")
    (tmp_path / "tiny-pair-for-test.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "tiny-pair-for-test.json")
    pair = ClipPair(f"tiny-pair-for-test={folder / 'open_clip_model.safetensors'}")
    assert pair.width == 4
    assert pair.identity()["sha256"] == ClipPair(str(folder)).identity()["sha256"]
    with pytest.raises(UserError, match="no model 'tiny-pair-for-tset'; did you mean tiny-pair-for-test"):
        ClipPair("tiny-pair-for-tset=weights.safetensors")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"embed_dim": 8}, "the weights are not those of open_clip's clip"),
        ({"text_cfg": {"hf_tokenizer_name": "x"}}, "reads text with hf_tokenizer_name"),
        ({"multimodal_cfg": {}}, "multimodal_cfg"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        ClipPair(str(write_clip(tmp_path / "clip", **changes)))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no open_clip model, for it holds no open_clip_config\.json"):
        ClipPair(str(tmp_path))
