from __future__ import annotations

from collections import Counter
from math import sqrt

import pytest

from fmscale.data.captions import Captions
from fmscale.data.reasons import BAD_CAPTION, NO_CAPTION, ImageError

FILES = {"txt": b" a cat\n", "long": "\ufeffune chaîne".encode(), "empty": b" "}
META = {"caption": "json cat", "ai": {"blip": "a synthetic cat"}, "coco": ["one", "two", " ", "three"], "n": 5}


def test_the_first_usual_place_that_holds_a_caption_is_taken() -> None:
    assert Captions().choose("k", FILES, META) == ("txt", {"txt": "a cat"})
    assert Captions().choose("k", {"txt": b""}, META) == ("json.caption", {"json.caption": "json cat"})
    assert Captions().choose("k", {}, {"text": "x"}) == ("json.text", {"json.text": "x"})


def test_captions_are_drawn_by_weight_and_key() -> None:
    """Of those that an image has; a list shares its weight."""
    captions = Captions({"txt": 1, "json.ai.blip": 3, "json.coco": 6, "json.none": 100, "empty": 100})
    count = 4000
    chosen = [captions.choose(f"{number:06d}", FILES, META) for number in range(count)]
    assert chosen[0][1] == {
        "txt": "a cat",
        "json.ai.blip": "a synthetic cat",
        **{f"json.coco.{number}": text for number, text in enumerate(["one", "two", "three"])},
    }
    counts = Counter(place for place, _ in chosen)
    expected = {"txt": 0.1, "json.ai.blip": 0.3, "json.coco.0": 0.2, "json.coco.1": 0.2, "json.coco.2": 0.2}
    assert counts.keys() == expected.keys()
    for place, share in expected.items():
        assert abs(counts[place] / count - share) < 5 * sqrt(share * (1 - share) / count)
    assert chosen == [captions.choose(f"{number:06d}", FILES, META) for number in range(count)]
    other = Captions(captions.weights, seed=1)
    assert chosen != [other.choose(f"{number:06d}", FILES, META) for number in range(count)]


def test_a_weight_of_zero_is_never_drawn() -> None:
    captions = Captions({"txt": 0, "json.caption": 1, "long": 0})
    assert {captions.choose(str(number), FILES, META)[0] for number in range(200)} == {"json.caption"}
    assert captions.choose("k", FILES, META)[1]["long"] == "une chaîne"
    with pytest.raises(ImageError, match=NO_CAPTION):
        captions.choose("k", FILES, {})


@pytest.mark.parametrize(
    ("place", "reason", "detail"),
    [
        ("json.n", BAD_CAPTION, "json.n holds a int"),
        ("json.ai", BAD_CAPTION, "json.ai holds a dict"),
        ("json.coco.blip", NO_CAPTION, "looked for json.coco.blip"),
        ("empty", NO_CAPTION, "looked for empty"),
        ("latin", BAD_CAPTION, "latin is not UTF-8 (unexpected end of data)"),
        ("json.half", BAD_CAPTION, "json.half holds half a character"),
    ],
)
def test_captions_that_cannot_be_used_have_a_reason(place: str, reason: str, detail: str) -> None:
    with pytest.raises(ImageError) as caught:
        Captions({place: 1}).choose("k", FILES | {"latin": b"\xe9"}, META | {"half": "\ud800"})
    assert (caught.value.reason, caught.value.detail) == (reason, detail)
