"""Both towers of a CLIP, as judges of images: features of each, and how well it fits its caption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fmscale.encoders.clip import model_config
from fmscale.encoders.weights import read_safetensors
from fmscale.errors import UserError
from fmscale.files import sha256

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"  # of a folder, as open_clip's on the hub


class ClipPair:
    """A frozen CLIP of open_clip.

    Args:
        place: a folder as open_clip's models have it on the Hugging Face hub, or NAME=FILE: a model that open_clip
            knows, and its weights in safetensors.
        device: where it computes.

    Attributes:
        width: features of an image, and of a text.

    Raises:
        UserError: files that are missing, damaged, or of another kind of model.
    """

    def __init__(self, place: str, device: torch.device | str = "cpu") -> None:
        from open_clip.tokenizer import SimpleTokenizer
        from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

        self.name, config, preparation, self.file = _find(place)
        self.device = torch.device(device)
        self.model = _build(self.name, config, read_safetensors(self.file)).to(self.device)
        self.width: int = config["embed_dim"]
        prepared = merge_preprocess_dict({"size": self.model.visual.image_size}, preparation)
        self._prepare: Any = image_transform_v2(PreprocessCfg(**prepared), is_train=False)
        self._tokens: Any = SimpleTokenizer(context_length=self.model.context_length)

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """Embeddings of images of any size, brought to the model's own as it was trained.

        Args:
            pixels: shape (B, height, width, 3), uint8.

        Returns:
            Shape (B, width), float32, on the CPU, of any length.
        """
        from PIL import Image

        given = torch.stack([self._prepare(Image.fromarray(image)) for image in pixels.numpy()])
        return self.model.encode_image(given.to(self.device)).float().cpu()

    @torch.no_grad()
    def scores(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        """100 times the cosine between each image and its caption, and 0 for one that points away from it.

        Args:
            features: from `images`, shape (B, width).
            captions: B of them; what does not fit the model's context is cut.

        Returns:
            Shape (B,), float32, on the CPU.

        Source: Hessel et al. 2021, arXiv:2104.08718, eq. 1, with the factor 100 of torchmetrics.
        """
        texts = self.model.encode_text(self._tokens(list(captions)).to(self.device)).float().cpu()
        return 100 * functional.cosine_similarity(features, texts).clamp(min=0)

    def identity(self) -> dict[str, Any]:
        """What makes figures comparable."""
        kind = f"image embedding of CLIP, {self.name}"
        return {"features": kind, "width": self.width, "path": str(self.file), "sha256": sha256(self.file)}


def _find(place: str) -> tuple[str, dict[str, Any], dict[str, Any], Path]:
    """Name, config, preparation of images, and weights of a model."""
    name, equals, file = place.partition("=")
    if equals and not Path(place).exists():
        return name, model_config(name), {}, Path(file)
    folder = Path(place)
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{place}: no open_clip model, for it holds no {CONFIG}; give a folder with that and {WEIGHTS}, or "
            "NAME=FILE.safetensors with the name of a model that open_clip knows"
        )
    try:
        read = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return folder.name, {**read["model_cfg"]}, {**read.get("preprocess_cfg", {})}, folder / WEIGHTS
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG}: damaged ({error}); download it again") from error


def _build(name: str, config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    from open_clip.model import CLIP, CustomTextCLIP

    given = {key: value for key, value in config.items() if key != "custom_text"}
    foreign = [key for key in ("hf_model_name", "hf_tokenizer_name") if given.get("text_cfg", {}).get(key)]
    if foreign:
        raise UserError(f"open_clip's {name} reads text with {foreign[0]}; choose a CLIP with CLIP's own tokenizer")
    if given.get("vision_cfg", {}).get("timm_model_name"):
        given["vision_cfg"] = {**given["vision_cfg"], "timm_model_pretrained": False}  # else it asks the network
    try:
        model = (CustomTextCLIP if config.get("custom_text") else CLIP)(**given)
        model.load_state_dict({key.removeprefix("module."): value.float() for key, value in state.items()})
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--clip: the weights are not those of open_clip's {name} ({reason})") from error
    return model.requires_grad_(False).eval()
