"""A small random CLIP, both towers, as a folder that open_clip's models on the hub look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "embed_dim": 4,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_clip(folder: Path, **changes: Any) -> Path:
    """Write it; `changes` are laid over the config of the model, not over its weights."""
    torch.manual_seed(0)
    folder.mkdir()
    state = {name: value.contiguous() for name, value in CLIP(**CONFIG).state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    config = {"model_cfg": CONFIG | changes, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder
