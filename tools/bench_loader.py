"""How much CPU time a sample costs on its way from tar to batch: fmscale's loader against stock webdataset.

    python tools/bench_loader.py [--samples 512] [--repeats 7] [--json FILE]

Samples are those of a 512 px run: latents 16 x 64 x 64, T5 128 x 4096, CLIP 77 x 2048, pooled 2048, in bf16. All
sides shuffle, decode and batch in one process, over the same samples, from the page cache, in turns:

    fmscale             byte ranges from the index, checksum, one safetensors member; batches of one bucket
    webdataset, st      WebDataset(...).shuffle().map(safetensors).batched(), one safetensors member
    webdataset, pth     WebDataset(...).shuffle().decode().batched(), four .pth members, as its documentation shows

And what it costs to know which 1,024 of a billion samples a step trains on, at the start of a run and far into it: a
run that is resumed pays the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import webdataset
from safetensors.torch import load as load_tensors
from torch import Tensor

from fmscale.data.index import Index
from fmscale.data.index_build import build_index
from fmscale.data.loader import build_loader
from fmscale.data.mixture import Mixture
from fmscale.data.order import Generation, Order, split
from fmscale.data.shards import ShardWriter

BATCH = 16
SHUFFLED_SAMPLES = 256  # webdataset's buffer
SHAPES = {
    "latents": (16, 64, 64),
    "t5": (128, 4096),
    "clip": (77, 2048),
    "pooled": (2048,),
}


def main() -> None:
    """Write both datasets, time every side over them, print the table."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours, members = Path(folder, "indexed"), Path(folder, "members")
        write_indexed(ours, args.samples)
        write_members(members, args.samples)
        began = time.perf_counter()
        index = build_index(ours, None)
        megabytes = sum(shard.size for shard in index.shards) / 1e6
        indexed = megabytes / (time.perf_counter() - began)
        sides: dict[str, Callable[[], Iterator[Any]]] = {
            "fmscale": lambda: read_fmscale(index),
            "webdataset, st": lambda: read_safetensors(ours),
            "webdataset, pth": lambda: read_members(members),
        }
        times = measure(sides, args.samples, args.repeats)
    report = summarise(times, args.samples)
    print(table(report))
    print(f"\nindex of {megabytes:.0f} MB built at {indexed:.0f} MB/s")
    steps = order_times(args.repeats)
    print("\norder of 10^9 samples: " + ", ".join(f"{ms:.2f} ms at step {step:,}" for step, ms in steps.items()))
    if args.json:
        figures = {"sides": report, "index_mb_per_s": indexed, "order_ms": steps}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare fmscale's loader with stock webdataset.")
    parser.add_argument("--samples", type=int, default=512, help="per side and repeat, a multiple of 16 (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args()


def make_tensors(number: int) -> dict[str, Tensor]:
    """The number-th sample: `SHAPES` in bf16, random."""
    generator = torch.Generator().manual_seed(number)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


def write_indexed(folder: Path, samples: int) -> None:
    """Four shards as `fmscale encode` writes them; the index comes later."""
    with ShardWriter(folder, samples_per_shard=samples // 4) as writer:
        for number in range(samples):
            writer.write(f"{number:06d}", make_tensors(number), {"caption": "a caption"})


def write_members(folder: Path, samples: int) -> None:
    """Four shards with one .pth member for each tensor."""
    folder.mkdir()
    for shard in range(4):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
            for number in range(shard * samples // 4, (shard + 1) * samples // 4):
                members = {f"{name}.pth": tensor for name, tensor in make_tensors(number).items()}
                tar.write({"__key__": f"{number:06d}", "json": {"caption": "a caption"}, **members})


def read_fmscale(index: Index) -> Iterator[Any]:
    """Batches of fmscale's loader, in this process."""
    mixture = Mixture([index])
    batches = len(index) // BATCH
    return build_loader(
        mixture,
        mixture.order(BATCH, seed=0),
        split(BATCH, 1, BATCH),
        rank=0,
        start_step=0,
        stop_step=batches,
        noise=lambda shape, step, slot, read_meta: torch.zeros(()),  # the other sides draw none
    )


def read_safetensors(folder: Path) -> Iterator[Any]:
    """Batches of stock webdataset over one safetensors member per sample."""

    def decode(sample: dict[str, Any]) -> tuple[Tensor, ...]:
        tensors = load_tensors(sample["safetensors"])
        return tuple(tensors[name] for name in SHAPES)

    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    return iter(webdataset.WebDataset(tars, shardshuffle=4).shuffle(SHUFFLED_SAMPLES).map(decode).batched(BATCH))


def read_members(folder: Path) -> Iterator[Any]:
    """Batches of stock webdataset over .pth members."""
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(tars, shardshuffle=4).shuffle(SHUFFLED_SAMPLES).decode()
    return iter(dataset.to_tuple(*(f"{name}.pth" for name in SHAPES)).batched(BATCH))


def measure(sides: dict[str, Callable[[], Iterator[Any]]], samples: int, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each side and repeat, one side after another in each repeat; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, start in sides.items():
            began = time.process_time()
            batches = sum(1 for _ in start())
            seconds = time.process_time() - began
            assert batches == samples // BATCH, (name, batches)
            if repeat:
                times[name].append(seconds)
    return times


def order_times(repeats: int) -> dict[int, float]:
    """Milliseconds, by step, in which an order of ten buckets that was just made gives 1,024 samples: the median."""
    data = [Generation(0, {str(bucket): (10**8,) for bucket in range(10)})]
    times: dict[int, list[float]] = {step: [] for step in (0, 10**3, 10**6, 10**9)}
    for repeat in range(10 * repeats):
        for step, seconds in times.items():
            began = time.perf_counter()
            Order(data, global_batch=1024, seed=0).batch(step + repeat)
            seconds.append(time.perf_counter() - began)
    return {step: 1000 * statistics.median(seconds) for step, seconds in times.items()}


def summarise(times: dict[str, list[float]], samples: int) -> dict[str, dict[str, float]]:
    """CPU milliseconds per sample of each side: median, least, most; and the median against fmscale's."""
    ours = statistics.median(times["fmscale"])
    return {
        name: {
            "ms_per_sample": 1000 * statistics.median(seconds) / samples,
            "ms_min": 1000 * min(seconds) / samples,
            "ms_max": 1000 * max(seconds) / samples,
            "times_ours": statistics.median(seconds) / ours,
        }
        for name, seconds in times.items()
    }


def table(report: dict[str, dict[str, float]]) -> str:
    """The figures as Markdown."""
    rows = ["| loader | CPU ms per sample (min … max) | against fmscale |", "|---|---|---|"]
    for name, side in report.items():
        spread = f"{side['ms_per_sample']:.3f} ({side['ms_min']:.3f} … {side['ms_max']:.3f})"
        rows.append(f"| {name} | {spread} | {side['times_ours']:.2f} x |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
