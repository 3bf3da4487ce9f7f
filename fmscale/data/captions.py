"""Which caption of an image is taken, where it has several."""

from __future__ import annotations

import hashlib
from bisect import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from fmscale.data.reasons import BAD_CAPTION, NO_CAPTION, ImageError

JSON = "json."
USUAL = ("txt", "json.caption", "json.text")  # img2dataset's two, and the column that Hugging Face's examples have


@dataclass(frozen=True)
class Captions:
    """Where captions are, and how often each is taken.

    Attributes:
        weights: by place: `txt` is the file (or the member of a tar) of that extension, `json.a.b` a field of the json,
            which may hold a list of captions that share the weight. Empty for the first of `USUAL` that is there.
        seed: of the draw.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def extensions(self) -> frozenset[str]:
        """Of the files that may hold captions."""
        return frozenset(place for place in self.weights or USUAL if not place.startswith(JSON))

    def choose(self, key: str, files: Mapping[str, bytes], meta: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
        """Draw one of an image's captions: the same for the same seed and key, wherever and whenever it is read.

        Args:
            key: of the image.
            files: what lies beside the image, by extension.
            meta: its json.

        Returns:
            The place of the caption that was drawn, and all captions by place, none of them empty.

        Raises:
            ImageError: there is none that may be drawn, or one is no text.
        """
        found = {place: list(_texts(place, files, meta)) for place in self.weights or USUAL}
        found = {place: texts for place, texts in found.items() if texts}
        if not any(self.weights.get(place, 1.0) for place in found):
            raise ImageError(NO_CAPTION, f"looked for {', '.join(self.weights or USUAL)}")
        if not self.weights:
            found = dict(list(found.items())[:1])
        named, weights = {}, []
        for place, texts in found.items():
            for number, text in enumerate(texts):
                named[place if len(texts) == 1 else f"{place}.{number}"] = text
                weights.append(self.weights.get(place, 1.0) / len(texts))
        sums = list(accumulate(weights))
        return list(named)[bisect(sums[:-1], self._draw(key) * sums[-1])], named

    def _draw(self, key: str) -> float:
        """Uniform in [0, 1)."""
        digest = hashlib.blake2b(f"caption {self.seed} {key}".encode(), digest_size=6).digest()
        return int.from_bytes(digest, "big") / 2**48


def _texts(place: str, files: Mapping[str, bytes], meta: Mapping[str, Any]) -> Iterator[str]:
    """The captions at a place that are not empty."""
    values: Any
    if place.startswith(JSON):
        values = look_up(meta, place.removeprefix(JSON))
    else:
        try:
            values = files.get(place, b"").decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ImageError(BAD_CAPTION, f"{place} is not UTF-8 ({error.reason})") from error
    for value in values if isinstance(values, list) else [values]:
        if value is not None and not isinstance(value, str):
            raise ImageError(BAD_CAPTION, f"{place} holds a {type(value).__name__}")
        text = (value or "").strip()
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise ImageError(BAD_CAPTION, f"{place} holds half a character")
        if text:
            yield text


def look_up(meta: Mapping[str, Any], path: str) -> Any:
    """A field of a json, `a.b` for one inside another; None where it is not there."""
    value: Any = meta
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
