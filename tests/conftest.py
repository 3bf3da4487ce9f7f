"""What several folders of tests share: a small real dataset, and a config that trains on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):  # else each process of a test would compile torch anew, for 10 s
    os.environ["PYTHONPYCACHEPREFIX"] = str(Path(__file__).parent.parent / ".pytest_cache" / "bytecode")

import torch

from fmscale.config import TrainConfig, check, merge, parse_overrides
from fmscale.data.index_build import build_index
from fmscale.data.shards import ShardWriter
from fmscale.encoders.null import save_null

BUCKETS = ((8, 8), (8, 16), (16, 8))
SAMPLES = 120
T5_LENGTH = 32


def text_features(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Features as two small CLIP encoders would give them for a caption."""
    shapes = {"clip_l": (6, 16), "clip_l_pooled": (12,), "clip_g": (6, 24), "clip_g_pooled": (20,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An indexed dataset of random latents in three buckets, half of them square."""
    folder = tmp_path_factory.mktemp("dataset")
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, samples_per_shard=40) as writer:
        for number in range(SAMPLES):
            size = BUCKETS[number % 3 if number % 2 else 0]
            tensors = {"latents": torch.randn(4, *size, generator=generator), **text_features(generator)}
            writer.write(f"s{number:05d}", tensors, {"caption": str(number)})
    save_null(folder, text_features(generator))
    build_index(folder, {"program": "tests", "t5_length": T5_LENGTH})
    return folder


@pytest.fixture(scope="session")
def make_config(dataset: Path) -> Callable[..., TrainConfig]:
    """Makes a config of a small model on `dataset`, for a run directory; overrides as on the command line."""

    def make(run_dir: Path, *overrides: str) -> TrainConfig:
        data: dict[str, Any] = {
            "run_dir": str(run_dir),
            "steps": 8,
            "global_batch": 32,
            "micro_batch": 32,
            "data": {"path": str(dataset), "workers": 0},
            "model": {
                "layers": 2,
                "heads": 2,
                "head_dim": 16,
                "latent_channels": 4,
                "context_dim": 48,
                "pooled_dim": 32,
                "pos_embed_max_size": 16,
                "base_size": 4,
                "qk_norm": True,
            },
            "optimizer": {"lr": 1e-3, "warmup_steps": 4, "weight_decay": 0.01},
            "ema": {"decays": [0.99, 0.9]},
            "engine": {"dtype": "fp32"},
            "checkpoint": {"every_steps": 4, "keep": 10},
            "log": {"tensorboard": False},
        }
        return check(TrainConfig, merge(data, parse_overrides(overrides)), "test")

    return make
