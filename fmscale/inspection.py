"""`fmscale inspect`: what a dataset holds, in a few lines and on one HTML page that needs nothing else."""

from __future__ import annotations

import argparse
import base64
import html
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fmscale.data.index import Index
from fmscale.data.reader import Sample, read_sample
from fmscale.data.remote import RemoteOptions, open_index
from fmscale.data.sequence import permute
from fmscale.data.tar import DamageError
from fmscale.encoders.vae import load_vae
from fmscale.errors import UserError
from fmscale.log import get_logger, progress

log = get_logger(__name__)
BARS = 20
THUMBNAIL_PX = 160


@dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes:
        index: of the dataset.
        captions: of the samples that were read.
        bad: key and reason of those that could not be.
        pictures: (data URI, caption) of some.
    """

    index: Index
    captions: list[str]
    bad: list[tuple[str, str]]
    pictures: list[tuple[str, str]]

    @property
    def words(self) -> list[int]:
        """Length of each caption in words."""
        return [len(caption.split()) for caption in self.captions]


def inspect_command(args: argparse.Namespace) -> None:
    """`fmscale inspect`."""
    out = Path(args.html)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--html: {out} cannot be written; give a file in a folder that is there")
    index = open_index(args.dataset, RemoteOptions(allow_pipe=args.allow_pipe))
    survey = survey_dataset(index, args.samples, args.thumbnails if args.vae else 0, args.vae)
    print("\n".join(summary(survey)))
    out.write_text(page(survey), encoding="utf-8")
    print(f"page      {out}")


def survey_dataset(index: Index, samples: int, thumbnails: int, vae: str | None) -> Survey:
    """Read some samples, spread over the whole dataset.

    Args:
        index: of the dataset.
        samples: how many are read, at most.
        thumbnails: how many of them are decoded.
        vae: folder of the VAE that made the latents; needed for thumbnails.

    Raises:
        UserError: no such VAE, one of another number of channels, or a dataset of images.
    """
    if "latents" not in index.layout:
        raise UserError(f"{index.place} holds images that training encodes; inspect shows what `fmscale encode` makes")
    decoder = load_vae(vae) if vae and thumbnails else None
    channels = index.layout["latents"][1][0]
    if decoder and decoder.channels != channels:
        raise UserError(f"--vae: {vae} has {decoder.channels} channels, the dataset's latents have {channels}")
    found = Survey(index, [], [], [])
    for key, sample in _some_samples(index, min(samples, len(index))):
        if isinstance(sample, str):
            found.bad.append((key, sample))
            continue
        caption = str(sample.read_meta().get("caption", ""))
        found.captions.append(caption)
        if decoder and len(found.pictures) < thumbnails:
            pixels = decoder.decode(sample.tensors["latents"][None].float())[0]
            found.pictures.append((_data_uri(pixels.add(1).mul(127.5).clamp(0, 255).permute(1, 2, 0).numpy()), caption))
    return found


def _some_samples(index: Index, count: int) -> Iterator[tuple[str, Sample | str]]:
    """Key and sample, or why it cannot be read."""
    with progress() as bar:
        for row in bar.track(permute(np.arange(count), len(index), key=0).tolist(), description="inspect"):
            yield index.key(row), _read(index, row)


def _read(index: Index, row: int) -> Sample | str:
    try:
        return read_sample(index.storage, index.location(row))
    except DamageError as error:
        return str(error)


def _data_uri(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels.astype(np.uint8))
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    png = io.BytesIO()
    image.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def summary(survey: Survey) -> list[str]:
    """The dataset in lines of text."""
    index, words = survey.index, survey.words
    size, count = sum(shard.size for shard in index.shards), len(index)
    lines = [
        f"dataset   {index.place}",
        f"samples   {count:,} in {len(index.shards):,} shards, {size / 1e9:.3f} GB, {size / count:,.0f} bytes each",
        f"finger    {index.fingerprint}",
        f"made by   {_made_by(index)}",
    ]
    lines += [f"bucket    {b.name:>9}  {b.count:>12,}  {b.count / count:6.1%}" for b in index.buckets]
    lines += [f"tensor    {name}  {dtype} {list(shape)}" for name, (dtype, shape) in index.layout.items()]
    if words:
        low, middle, high = (int(value) for value in np.percentile(words, [5, 50, 95]))
        repeated = len(words) - len(set(survey.captions))
        lines.append(
            f"captions  {low} to {high} words (5 % to 95 %), median {middle}; {words.count(0)} empty, "
            f"{repeated} repeated, of {len(words):,} read"
        )
    lines += [f"damaged   {key}: {reason}" for key, reason in survey.bad]
    return lines


def _made_by(index: Index) -> str:
    made_by = index.made_by or {}
    parts = [str(made_by.get("program", "not stated"))]
    if vae := made_by.get("vae"):
        parts.append(
            f"VAE of {vae['channels']} channels, factor {vae['factor']}, scale {vae['scale']}, shift {vae['shift']}"
        )
    parts += [f"{role} of {text['width']}" for role, text in made_by.get("text", {}).items()]
    return ", ".join(parts)


def page(survey: Survey) -> str:
    """The dataset as one HTML page; whatever stands in captions is shown as text."""
    index = survey.index
    sizes = {bucket.name: bucket.count for bucket in index.buckets}
    common = dict(Counter(survey.captions).most_common(10))
    pictures = "".join(
        f'<figure><img src="{uri}" alt=""><figcaption>{html.escape(caption)}</figcaption></figure>'
        for uri, caption in survey.pictures
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(index.place)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ overflow-x: auto; background: #f4f4f4; padding: 1rem }}
figure {{ display: inline-block; width: {THUMBNAIL_PX}px; margin: .4rem; vertical-align: top }}
figcaption {{ font-size: 12px; overflow-wrap: anywhere }}
</style>
<h1>{html.escape(index.place)}</h1>
<pre>{html.escape(chr(10).join(summary(survey)))}</pre>
<h2>Samples by bucket</h2>{_bars(sizes)}
<h2>Captions by words</h2>{_bars(_histogram(survey.words))}
<h2>Commonest captions</h2>{_bars(common)}
{"<h2>Pictures</h2>" + pictures if pictures else ""}
</html>
"""


def _histogram(values: Sequence[int]) -> dict[str, int]:
    if not values:
        return {}
    width = max(1, -(-(max(values) + 1) // BARS))
    counts = Counter(value // width for value in values)
    return {f"{i * width} to {(i + 1) * width - 1}": counts.get(i, 0) for i in range(max(counts) + 1)}


def _bars(counts: Mapping[str, int]) -> str:
    """Counts as horizontal bars, drawn in SVG."""
    most = max(counts.values(), default=0) or 1
    rows = "".join(
        f'<text x="290" y="{20 * i + 15}" text-anchor="end">{html.escape(name[:44])}</text>'
        f'<rect x="300" y="{20 * i + 3}" width="{500 * count / most:.1f}" height="14" fill="#48a"/>'
        f'<text x="{306 + 500 * count / most:.1f}" y="{20 * i + 15}">{count:,}</text>'
        for i, (name, count) in enumerate(counts.items())
    )
    return f'<svg viewBox="0 0 900 {20 * len(counts) + 5}" font-size="12" width="100%">{rows}</svg>'
