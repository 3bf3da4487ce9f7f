"""dataset.py: text features of other kinds than the usual ones are opened, and train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fmscale.config import TrainConfig
from fmscale.data.index_build import build_index
from fmscale.data.shards import ShardWriter
from fmscale.data.tensors import narrow
from fmscale.dataset import open_dataset
from fmscale.encoders.null import save_null
from fmscale.engine.metrics import read_metrics
from fmscale.errors import UserError
from fmscale.train import train

T5 = (6, 48)


def write(folder: Path, in_8_bits: bool) -> Path:
    """A dataset as FLUX has it: tokens of t5, and the pooled embedding of clip_l."""
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder) as writer:
        for number in range(8):
            tokens = torch.randn(T5, generator=generator)
            text = {"t5": tokens, "clip_l_pooled": torch.randn(12, generator=generator)}
            if in_8_bits:
                text["t5"], text["t5_scale"] = narrow(tokens)
            writer.write(f"s{number}", {"latents": torch.randn(4, 8, 8, generator=generator), **text}, {})
    save_null(folder, {"t5": torch.zeros(T5), "clip_l_pooled": torch.zeros(12)})
    build_index(folder, {"program": "tests", "pipeline": "flux", "t5_length": T5[0]})
    return folder


def test_flux_features_train_in_eight_bits_or_more(tmp_path: Path, make_config: Callable[..., TrainConfig]) -> None:
    losses = {}
    for name, in_8_bits in (("exact", False), ("narrow", True)):
        data = write(tmp_path / name, in_8_bits)
        overrides = [f"data.path={data}", "model.pooled_dim=12", "steps=5", "global_batch=8", "micro_batch=4"]
        config = make_config(tmp_path / f"run-{name}", *overrides, "optimizer.warmup_steps=0", "optimizer.lr=0.01")
        dataset = open_dataset(config)
        assert (dataset.encoders, dataset.text_tokens) == (("clip_l", "t5"), T5[0])
        train(config)
        losses[name] = [record["loss"] for record in read_metrics(tmp_path / f"run-{name}" / "metrics.jsonl")]
    assert losses["narrow"] == pytest.approx(losses["exact"], rel=1e-2)
    assert losses["narrow"][-1] != losses["exact"][-1]  # in the first steps text is behind gates that are shut


def test_a_dataset_without_text_is_refused(tmp_path: Path, make_config: Callable[..., TrainConfig]) -> None:
    with ShardWriter(tmp_path / "data") as writer:
        writer.write("s", {"latents": torch.zeros(4, 8, 8)}, {"caption": "left alone"})
    build_index(tmp_path / "data", None)
    with pytest.raises(UserError, match="holds no text features"):
        open_dataset(make_config(tmp_path / "run", f"data.path={tmp_path / 'data'}"))


@pytest.mark.parametrize(
    ("null", "complaint"),
    [
        (
            "empty",
            r"null\.safetensors: lacks clip_l_count, .* encode .* again, or set conditioning\.null=zeros",
        ),
        ("zeros", r"the json of s00000 in .* has no tokens\.clip_l; .* or set conditioning\.text=padded"),
    ],
)
def test_captions_that_nobody_counted_cannot_be_masked(
    tmp_path: Path, make_config: Callable[..., TrainConfig], null: str, complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        train(make_config(tmp_path / "run", "conditioning.text=masked", f"conditioning.null={null}"))
    assert not (tmp_path / "run").exists()


def test_counts_are_no_part_of_the_null_that_may_not_change(
    tmp_path: Path, make_config: Callable[..., TrainConfig]
) -> None:
    with ShardWriter(tmp_path / "data") as writer:
        tensors = {"latents": torch.zeros(4, 8, 8), "clip_l": torch.ones(6, 16), "clip_l_pooled": torch.ones(32)}
        writer.write("s", tensors, {"tokens": {"clip_l": 4}})
    null = {"clip_l": torch.ones(6, 16), "clip_l_pooled": torch.ones(32), "clip_l_count": torch.tensor(2)}
    save_null(tmp_path / "data", null)
    build_index(tmp_path / "data", None)
    padded, masked = (
        open_dataset(make_config(tmp_path / "run", f"data.path={tmp_path / 'data'}", f"conditioning.text={text}"))
        for text in ("padded", "masked")
    )
    assert padded.null.keys() == {"clip_l", "clip_l_pooled"}
    assert masked.null["clip_l_count"].item() == 2
    assert (padded.counted, masked.counted) == ((), ("clip_l",))
    assert (padded.text_tokens, masked.text_tokens) == (7, 6)  # nothing stands for an absent T5
    assert padded.null_sha256 == masked.null_sha256
