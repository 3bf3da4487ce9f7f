"""What is known of a dataset without opening it: its manifest, which may lie on another machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fmscale.config import DataConfig, TrainConfig
from fmscale.data.order import shares
from fmscale.data.transport import PIPE, connect, is_remote
from fmscale.errors import UserError

MANIFEST = "index/manifest.json"
CLIPS = ("clip_l", "clip_g")
CLIP_TOKENS, T5_TOKENS = 77, 256  # of datasets that are not there to be asked


class Part(NamedTuple):
    """One dataset.

    Attributes:
        name: where it is.
        samples: in all.
        shards: tars.
        size: bytes of them.
    """

    name: str
    samples: int
    shards: int
    size: int


class Shape(NamedTuple):
    """A bucket: latent pixels, and how many samples there are."""

    height: int
    width: int
    samples: int

    @property
    def name(self) -> str:
        """For instance `64x96`: height, then width."""
        return f"{self.height}x{self.width}"


class Stock(NamedTuple):
    """What a phase learns from.

    Attributes:
        parts: its datasets; none where it is not known.
        shapes: its buckets, by height, then width; the model's base resolution where it is not known.
        shares: of the steps, by bucket.
        text_tokens: of a caption, as the network takes them.
        sample_bytes: of a sample, on average.
        missing: datasets without a manifest that can be seen from here; if there are any, the rest is assumed.
    """

    parts: tuple[Part, ...]
    shapes: tuple[Shape, ...]
    shares: tuple[float, ...]
    text_tokens: int
    sample_bytes: float
    missing: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """Whether all datasets can be seen."""
        return not self.missing


def stock_of(config: TrainConfig, allow_pipe: bool = False, remote: bool = True) -> Stock:
    """What a config's data are, as far as they are there.

    A manifest that cannot be reached is no mistake: the data may be yet to be made, or lie where no login node sees it.

    Args:
        config: of a phase.
        allow_pipe: programs that datasets name may be started.
        remote: those behind URLs are asked.

    Raises:
        UserError: a manifest is there and cannot be read.
    """
    mixture = config.data.mixture
    places = [part.path for part in mixture] or [str(config.data.path)]
    asked = {place for place in places if remote or not is_remote(place)}
    manifests = {place: _manifest(place, config.data, allow_pipe) for place in asked}
    if missing := [place for place in places if manifests.get(place) is None]:
        return _assumed(config, missing)
    found = [_checked(manifests[place], place, config) for place in places]
    parts = tuple(part for part, *_ in found)
    sizes = sorted({size for _, buckets, _ in found for size in buckets})
    samples = [[buckets.get(size, 0) for _, buckets, _ in found] for size in sizes]
    shapes = tuple(Shape(*size, sum(rows)) for size, rows in zip(sizes, samples, strict=True))
    often = shares(samples, [part.weight for part in mixture] or None)
    mean = sum(part.size for part in parts) / sum(part.samples for part in parts)
    return Stock(parts, shapes, often, max(tokens for *_, tokens in found), mean)


def _assumed(config: TrainConfig, missing: Sequence[str]) -> Stock:
    """Square images of the base resolution, with captions of the usual length, all stored in 16 bits."""
    model = config.model
    side = model.base_size * model.patch_size
    text = T5_TOKENS if model.family == "flux" else CLIP_TOKENS + T5_TOKENS
    size = 2 * (model.latent_channels * side**2 + text * model.context_dim + model.pooled_dim)
    return Stock((), (Shape(side, side, 0),), (1.0,), text, size, tuple(missing))


def _manifest(place: str, data: DataConfig, allow_pipe: bool) -> Any:
    try:
        if not is_remote(place):
            return json.loads((Path(place) / MANIFEST).read_text())
        if place.startswith(PIPE) and not allow_pipe:
            return None
        return json.loads(connect(place, data.remote.timeout_s, allow_pipe).read(MANIFEST, 0, None))
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"data: {place}: its index cannot be read ({error}): run `fmscale index` there") from None
    except Exception as error:  # whatever libraries for stores raise
        if is_remote(place):
            return None
        raise UserError(f"data: {place}: its index cannot be read ({error}): see to its permissions") from None


def _checked(manifest: Any, place: str, config: TrainConfig) -> tuple[Part, dict[tuple[int, int], int], int]:
    """The dataset, the samples of its buckets, and the tokens of a caption.

    Raises:
        UserError: its manifest makes no sense, or it holds what the network does not take.
    """
    try:
        found, latents = _read(manifest, place), manifest["layout"].get("latents")
        channels = None if latents is None else int(latents[1][0])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        why = f"there is no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"data: {place}: its index makes no sense ({why}): run `fmscale index` there") from None
    if channels is not None and channels != config.model.latent_channels:
        raise UserError(
            f"model.latent_channels is {config.model.latent_channels}, and the latents of {place} have {channels}"
        )
    return found


def _read(manifest: Mapping[str, Any], place: str) -> tuple[Part, dict[tuple[int, int], int], int]:
    """As of `_checked`."""
    shards = manifest["shards"]
    sizes, samples = [int(shard["size"]) for shard in shards], sum(int(shard["samples"]) for shard in shards)
    buckets = {(int(each["height"]), int(each["width"])): int(each["rows"]) for each in manifest["buckets"]}
    if not buckets or min(sizes, default=0) < 0 or min(map(min, buckets)) < 1 or min(buckets.values()) < 1:
        raise ValueError("it holds no samples, or fewer than none")
    if sum(buckets.values()) != samples:
        raise ValueError(f"buckets have {sum(buckets.values()):,} samples, shards {samples:,}")
    return Part(place, samples, len(shards), sum(sizes)), buckets, text_tokens(manifest)


def text_tokens(manifest: Mapping[str, Any]) -> int:
    """Text tokens that the network takes, as `encoders.text.assemble` makes them."""
    layout, made = manifest["layout"], manifest["made_by"] or {}
    t5_length = int(made.get("t5_length", T5_TOKENS))
    if not any(role in layout for role in (*CLIPS, "t5")):  # captions are encoded in training
        roles = {role: _length(role, made, t5_length) for role in made.get("text", {})}
        if made.get("pipeline") == "flux":
            return t5_length
    else:
        roles = {role: int(layout[role][1][0]) for role in (*CLIPS, "t5") if role in layout}
    clip = max((length for role, length in roles.items() if role in CLIPS), default=0)
    return clip + roles.get("t5", 1 if clip else 0)  # one token stands for all zeros of an absent T5


def _length(role: str, made: Mapping[str, Any], t5_length: int) -> int:
    return t5_length if role == "t5" else int(made.get("clip_length", CLIP_TOKENS))
