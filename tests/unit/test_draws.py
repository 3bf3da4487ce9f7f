"""draws.py: which latents a step sees of what is stored, in every world and whatever was done before."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from fmscale.data.captions import Captions
from fmscale.data.index import Index
from fmscale.data.index_build import build_index
from fmscale.data.loader import build_loader
from fmscale.data.mixture import Mixture
from fmscale.data.order import split
from fmscale.data.prepare import Preparation
from fmscale.data.raw import RawImages
from fmscale.data.shards import ShardWriter
from fmscale.draws import POSTERIOR_NOISE, draw_latents, draw_pixels, draw_view
from fmscale.errors import UserError
from fmscale.flow.coupling import independent

SHAPE = (2, 4, 6)
SLOTS = range(2000)


def stored(count: int, **means: float) -> dict[str, torch.Tensor]:
    tensors = {name: torch.full((count, *SHAPE), value) for name, value in means.items()}
    return tensors | {"clip_l": torch.ones(count, 3, 5)}


def test_what_holds_nothing_random_is_left_alone() -> None:
    tensors = stored(3, latents=1.0)
    assert draw_latents(0, tensors, 5, [0, 1, 2]) is tensors


def test_half_of_the_slots_see_the_mirror_image() -> None:
    tensors = stored(len(SLOTS), latents=0.0, latents_flipped=1.0)
    seen = draw_latents(7, tensors, 3, SLOTS)
    assert set(seen) == {"latents", "clip_l"}
    assert 0.46 < seen["latents"].mean() < 0.54  # 2,000 throws of a coin: 3.6 standard deviations
    assert set(seen["latents"].flatten(1).sum(1).tolist()) == {0.0, 48.0}
    assert not torch.equal(draw_latents(7, tensors, 4, SLOTS)["latents"], seen["latents"])


def test_samples_have_the_posterior_s_mean_and_variance() -> None:
    means = {"latents": 5.0, "latents_log_variance": 2 * torch.tensor(0.3).log().item()}
    mirrored = {"latents_flipped": -5.0, "latents_flipped_log_variance": 2 * torch.tensor(0.1).log().item()}
    seen = draw_latents(0, stored(len(SLOTS), **means, **mirrored), 0, SLOTS)
    assert set(seen) == {"latents", "clip_l"}
    for sign, std in ((1, 0.3), (-1, 0.1)):
        side = seen["latents"][seen["latents"].mean(dim=(1, 2, 3)).sign() == sign]
        assert side.mean().item() == pytest.approx(5 * sign, abs=0.01)
        assert side.std().item() == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("flip", [False, True])
def test_images_are_drawn_as_latents_are(flip: bool) -> None:
    """The noise of the posterior's sample is that of stored latents, and so is the mirror image."""
    count, slots = 50, range(50)
    kept = {"latents": 0.0, "latents_log_variance": 0.0}
    mirrored = {"latents_flipped": 100.0, "latents_flipped_log_variance": 0.0} if flip else {}
    expected = draw_latents(7, stored(count, **kept, **mirrored), 3, slots)["latents"]
    raw = RawImages(Preparation({"": [(32, 48)]}, 1, 1), Captions(), {"channels": 2, "factor": 8}, "posterior", flip)
    pixels = torch.zeros(count, 3, 32, 48, dtype=torch.uint8)
    pixels[..., 0] = 100  # the left edge
    seen = draw_view(7, raw, {"pixels": pixels}, 3, slots)
    assert set(seen) == {"pixels", POSTERIOR_NOISE}
    assert set(seen["pixels"][..., 0].flatten(1).float().mean(1).tolist()) == ({0.0, 100.0} if flip else {100.0})
    assert torch.equal(seen[POSTERIOR_NOISE] + seen["pixels"][..., -1].float()[:, :1, :1, None], expected)
    mean = draw_pixels(7, replace(raw, latents="mean"), {"pixels": pixels}, 3, slots)
    assert set(mean) == {"pixels"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("posterior")
    generator = torch.Generator().manual_seed(0)
    names = ("latents", "latents_flipped", "latents_log_variance", "latents_flipped_log_variance")
    with ShardWriter(folder) as writer:
        for number in range(20):
            size = (2, 4, 4 + 4 * (number % 2))
            tensors = {name: torch.randn(size, generator=generator).bfloat16() for name in names}
            writer.write(f"s{number}", {**tensors, "clip_l": torch.zeros(3, 5)}, {})
    build_index(folder, None)
    return folder


def load(dataset: Path, world_size: int, micro_batch: int, start: int = 0, workers: int = 0) -> dict:
    """(step, slot) -> the latents that training sees there."""
    mixture, found = Mixture([Index.open(dataset)]), {}
    cut = split(6, world_size, micro_batch)
    for rank in range(world_size):
        for batch in build_loader(
            mixture,
            mixture.order(6, seed=3),
            cut,
            rank=rank,
            start_step=start,
            stop_step=8,
            noise=lambda shape, step, slot, read_meta: independent(shape, read_meta, (0, step, slot)),
            view=partial(draw_latents, 11),
            workers=workers,
        ):
            assert set(batch.tensors) == {"latents", "clip_l"}
            for row, slot in enumerate(batch.slots.tolist()):
                if batch.weight[row]:
                    found[batch.step, slot] = batch.tensors["latents"][row].tolist()
                else:
                    assert not batch.tensors["latents"][row].any()
    return found


def test_worlds_batches_workers_and_restarts_change_nothing(dataset: Path) -> None:
    alone = load(dataset, world_size=1, micro_batch=6)
    assert len(alone) == 48
    assert len({str(latents) for latents in alone.values()}) == 48  # nothing is seen twice
    assert load(dataset, world_size=2, micro_batch=2) == alone
    assert load(dataset, world_size=4, micro_batch=1, workers=1) == alone
    assert load(dataset, world_size=1, micro_batch=3, start=5) == {at: x for at, x in alone.items() if at[0] >= 5}


def test_tensors_of_one_bucket_have_its_size(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("s", {"latents": torch.zeros(2, 4, 6), "latents_flipped": torch.zeros(2, 6, 4)}, {})
    with pytest.raises(UserError, match="'latents_flipped' of another height and width than its latents"):
        build_index(tmp_path, None)
