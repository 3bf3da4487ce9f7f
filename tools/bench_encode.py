"""How much longer `fmscale encode` takes than the forward passes of its networks, and why.

    python tools/bench_encode.py [--images 64] [--repeats 5] [--workers 2] [--small] [--json FILE]

Photographs of many sizes, as JPEG in WebDataset tars, go through a VAE of SD3's kind and two CLIP encoders, all with
random weights. Two sides take turns over the same images, in the same batches:

    bare      the VAE's and the text encoders' forward passes, pixels and captions in memory
    encode    claims, reading, decoding, resizing, the same passes, writing, checksums, the index

The networks are loaded and the processes that decode are started before the clock is, as they are in a long run.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

from fmscale.config import EncodeConfig, check
from fmscale.data.buckets import grouped
from fmscale.data.index import Index
from fmscale.data.prepare import Prepared, as_floats
from fmscale.encode import Plan, check_setup, decoders, take_part
from fmscale.encoders.clip import random_clip
from fmscale.features import Encoder

IMAGES_PER_TAR = 16
SIDES_PX = (480, 640, 800)
SMALL = {"images": 16, "repeats": 2, "channels": (16, 32, 32, 32)}


def main() -> None:
    """Write images and networks, time both sides, print the table."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_images(folder / "images", args.images)
        write_networks(folder, args.channels)
        report = measure(config_of(folder, args), args.repeats)
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare fmscale encode with the bare forward passes.")
    parser.add_argument("--images", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of each side (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode (%(default)s)")
    parser.add_argument("--resolution-px", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--small", action="store_true", help="few images, a small VAE: whether it works, not how fast")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.set_defaults(channels=(64, 128, 128, 128))
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL)
    return args


def write_images(folder: Path, count: int) -> None:
    """Tars of JPEG images with structure at all scales, as photographs have, so that decoding costs what it does."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for first in range(0, count, IMAGES_PER_TAR):
        with webdataset.TarWriter(str(folder / f"{first // IMAGES_PER_TAR:05d}.tar")) as tar:
            for number in range(first, min(first + IMAGES_PER_TAR, count)):
                width, height = (int(side) for side in random.choice(SIDES_PX, 2))
                layers = [random.integers(0, 256, (side, side, 3), np.uint8) for side in (4, 16, 64, 256)]
                scaled = [np.asarray(Image.fromarray(layer).resize((width, height)), np.float32) for layer in layers]
                data = io.BytesIO()
                Image.fromarray(np.mean(scaled, axis=0).astype(np.uint8)).save(data, "JPEG", quality=92)
                words = " ".join(str(word) for word in random.integers(0, 1000, 20))
                tar.write({"__key__": f"{number:06d}", "jpg": data.getvalue(), "txt": words.encode()})


def write_networks(folder: Path, channels: tuple[int, ...]) -> None:
    """A VAE that makes latents of 1/8 of the side, and two text encoders."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(**blocks, block_out_channels=channels, norm_num_groups=8, latent_channels=16)
    vae.save_pretrained(folder / "vae")
    for role, width in (("clip_l", 256), ("clip_g", 320)):
        random_clip(folder / role, width=width, layers=4, heads=4, projection_dim=width, max_length=77, seed=0)


def config_of(folder: Path, args: argparse.Namespace) -> EncodeConfig:
    """What `fmscale encode` would read from a file."""
    data: dict[str, Any] = {
        "images": str(folder / "images"),
        "out": str(folder / "latents"),
        "vae": str(folder / "vae"),
        "text": {role: {"path": str(folder / role)} for role in ("clip_l", "clip_g")},
        "resolutions_px": [args.resolution_px],
        "batch": args.batch,
        "workers": args.workers,
    }
    return check(EncodeConfig, data, "bench")


def measure(config: EncodeConfig, repeats: int) -> dict[str, Any]:
    """Seconds of each side, in turns, the first turn of each thrown away."""
    plan = check_setup(config)
    bare: list[float] = []
    whole: list[float] = []
    waits: list[float] = []
    with decoders(config, plan) as decode:
        encoder = Encoder(config)
        batches = read_batches(config, plan)
        for number in range(repeats + 1):
            began = time.perf_counter()
            run_bare(encoder, batches)
            middle = time.perf_counter()
            here = config.model_copy(update={"out": config.out.with_name(f"latents-{number}")})
            meter = take_part(here, plan, encoder, decode)
            ended = time.perf_counter()
            assert len(Index.open(here.out)) == sum(map(len, batches))
            if number:
                bare.append(middle - began)
                whole.append(ended - middle)
                waits.append(1 - meter.busy_s / whole[-1])
    images = sum(map(len, batches))
    ratios = [one / other for one, other in zip(whole, bare, strict=True)]
    return {
        "device": str(encoder.vae.model.device),
        "images": images,
        "bare_images_per_s": images / statistics.median(bare),
        "encode_images_per_s": images / statistics.median(whole),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "device_waits": statistics.median(waits),
    }


def read_batches(config: EncodeConfig, plan: Plan) -> list[list[Prepared]]:
    """The batches that `fmscale encode` makes."""
    batches: list[list[Prepared]] = []
    for unit in plan.units.values():
        images = chain.from_iterable(map(plan.preparation.prepare, unit.read()))
        batches += grouped(images, lambda image: image.pixels.shape, config.batch)
    return batches


def run_bare(encoder: Encoder, batches: list[list[Prepared]]) -> None:
    """Nothing but the networks."""
    for batch in batches:
        encoder.vae.encode(as_floats(batch))
        encoder.text.encode([image.caption for image in batch])
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(report: dict[str, Any]) -> str:
    """The figures for people."""
    return (
        f"{report['images']} images on {report['device']}\n"
        f"bare forward passes  {report['bare_images_per_s']:8.2f} images/s\n"
        f"fmscale encode       {report['encode_images_per_s']:8.2f} images/s\n"
        f"encode / bare        {report['ratio']:8.3f}  ({min(report['ratios']):.3f} to {max(report['ratios']):.3f})\n"
        f"device waits         {report['device_waits']:8.1%}"
    )


if __name__ == "__main__":
    main()
