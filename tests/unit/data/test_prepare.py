from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fmscale.batch import BadSample
from fmscale.data import reasons
from fmscale.data.buckets import make_buckets
from fmscale.data.prepare import Filters, Preparation
from fmscale.data.reasons import ImageError
from fmscale.data.sources import SourceImage

BUCKETS = {"-64px": make_buckets(64, 16, 2), "-128px": make_buckets(128, 16, 2)}


def source(height: int, width: int, meta: dict[str, Any] | None = None) -> SourceImage:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    captions = {"txt": "a", "json.long": "a long one"}
    return SourceImage("k", file.getvalue(), "a", "x.tar/k", captions, "txt", meta or {})


def test_an_image_goes_into_each_resolution_that_it_is_large_enough_for() -> None:
    preparation = Preparation(BUCKETS, 10**6, max_upscale=1.25)
    large = preparation.prepare(source(200, 150))
    assert [image.key for image in large] == ["k-64px", "k-128px"]
    assert [tuple(image.pixels.shape) for image in large] == [(3, 80, 48), (3, 144, 112)]
    assert [image.key for image in preparation.prepare(source(110, 110))] == ["k-64px", "k-128px"]
    assert [image.key for image in preparation.prepare(source(100, 100))] == ["k-64px"]
    with pytest.raises(ImageError) as caught:
        preparation.prepare(source(40, 40))
    assert (caught.value.reason, caught.value.detail) == (
        reasons.TOO_SMALL,
        "40 x 40 px would be enlarged 1.60 times, the limit is 1.25",
    )


def test_a_sample_says_what_was_done() -> None:
    (image,) = Preparation({"": [(64, 64)]}, 10**6, 1).prepare(source(100, 200))
    assert image.key == "k"
    assert image.meta == {
        "caption": "a",
        "caption_from": "txt",
        "captions": {"txt": "a", "json.long": "a long one"},
        "source": "x.tar/k",
        "original_size_px": [100, 200],
        "colour_profile": "none",
        "crop_px": [50, 0, 150, 100],
        "size_px": [64, 64],
    }


@pytest.mark.parametrize(
    ("filters", "reason"),
    [
        (Filters(min_side_px=101), reasons.TOO_SMALL),
        (Filters(max_aspect=1.9), reasons.TOO_LONG),
        (Filters(scores={"aesthetic": (5.5, None)}), "aesthetic out of range"),
        (Filters(scores={"aesthetic": (5, None), "ai.watermark": (None, 0.8)}), "ai.watermark out of range"),
        (Filters(scores={"similarity": (0, None)}), "no similarity"),
        (Filters(scores={"text": (0, None)}), "no text"),
        (Filters(scores={"column": (0.4, None)}), "column out of range"),
        (Filters(100, 2, {"aesthetic": (5, 5.25), "ai.watermark": (None, 0.9), "column": (0.3, 0.3)}), None),
    ],
)
def test_filters(filters: Filters, reason: str | None) -> None:
    preparation = pickle.loads(pickle.dumps(Preparation({"": [(64, 64)]}, 10**6, 1, filters)))  # noqa: S301
    image = source(100, 200, {"aesthetic": 5.25, "ai": {"watermark": 0.9}, "text": "five", "column": "0.3"})
    if reason is None:
        assert len(preparation.prepare(image)) == 1
        return
    with pytest.raises(ImageError) as caught:
        preparation.prepare(image)
    assert caught.value.reason == reason


def test_what_the_source_could_not_give_keeps_its_reason() -> None:
    with pytest.raises(ImageError) as caught:
        Preparation(BUCKETS, 10**6, 1).prepare(BadSample("k", "x.tar", reasons.NO_CAPTION, "looked"))
    assert (caught.value.reason, caught.value.detail) == (reasons.NO_CAPTION, "looked")
