"""How near a plan comes to what happens: seconds of a step and memory of a rank, bucket by bucket.

    python tools/bench_plan.py CONFIG [--sizes 32x32 24x40] [--nproc N] [--steps 20] [key=value …]

In turns: `fmscale plan --calibrate` on this machine, and `fmscale train` of the same config on random latents of these
sizes. A step's seconds are the median of the second half of a bucket's steps. On a GPU memory is what torch allocated,
which is what `plan` counts; on a CPU it is that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from fmscale.config import TrainConfig, dump, load
from fmscale.data.index_build import build_index
from fmscale.data.shards import ShardWriter
from fmscale.encoders.null import save_null

CLIP_TOKENS, POOLED_L = 77, 768
SAMPLES = 64  # of each size


def main() -> None:
    """Plan, train, print both."""
    parser = argparse.ArgumentParser(description="Compare a plan with a run.")
    parser.add_argument("config", metavar="CONFIG", help="of `train`")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--sizes", nargs="+", default=["32x32", "24x40"], metavar="HxW", help="latent pixels")
    parser.add_argument("--nproc", type=int, default=1, help="ranks (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="(%(default)s)")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        path, run = Path(folder) / "train.yaml", Path(folder) / "run"
        short = [f"steps={args.steps}", f"run_dir={run}", f"data.path={folder}/data", "log.tensorboard=false"]
        config = load(TrainConfig, args.config, [*args.overrides, *short])
        write_data(Path(folder) / "data", config, [tuple(map(int, size.split("x"))) for size in args.sizes])
        path.write_text(dump(config))
        words = ["plan", str(path), "--calibrate", "--json", "--world-size", str(args.nproc)]
        plan = json.loads(fmscale(*words))
        fmscale("train", str(path), *(["--nproc", str(args.nproc)] if args.nproc > 1 else []))
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}, {args.nproc} ranks, {plan['rates']}")
    for line in compared(plan, steps):
        print(line)


def fmscale(*words: str) -> str:
    """What a command prints; its log goes to ours."""
    return subprocess.run(
        [sys.executable, "-m", "fmscale", *words], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def write_data(folder: Path, config: TrainConfig, sizes: list[tuple[int, ...]]) -> None:
    """Random latents with the text of two CLIPs, indexed."""
    generator = torch.Generator().manual_seed(0)
    pooled = {"clip_l_pooled": (POOLED_L,), "clip_g_pooled": (config.model.pooled_dim - POOLED_L,)}
    shapes = {"clip_l": (CLIP_TOKENS, 768), "clip_g": (CLIP_TOKENS, 1280)} | pooled
    if config.model.pooled_dim == POOLED_L:  # FLUX's, whose text is T5's
        shapes = {"clip_l_pooled": (POOLED_L,), "t5": (256, config.model.context_dim)}
    text = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    with ShardWriter(folder, samples_per_shard=SAMPLES) as writer:
        for number in range(SAMPLES * len(sizes)):
            shape = (config.model.latent_channels, *sizes[number % len(sizes)])
            writer.write(f"{number:06d}", {"latents": torch.randn(shape, generator=generator), **text}, {"caption": ""})
    save_null(folder, text)
    build_index(folder, {"program": "bench_plan", "t5_length": 256})


def compared(plan: dict[str, Any], steps: list[dict[str, Any]]) -> list[str]:
    """A line for each bucket, and one for the memory."""
    times = defaultdict[str, list[float]](list)
    for step in steps:
        times[step["bucket"]].append(step["step_s"])
    (phase,) = plan["phases"]
    lines = []
    for bucket in phase["buckets"]:
        measured = statistics.median(times[bucket["name"]][len(times[bucket["name"]]) // 2 :])
        planned = bucket["step"]["total"]
        lines.append(f"{bucket['name']}: {planned:.4f} s planned, {measured:.4f} measured, {planned / measured:.3f}")
    planned = max(bucket["memory"]["total"] for bucket in phase["buckets"]) / 1e9
    measured = max(step["memory_gb"] for step in steps)
    return [*lines, f"memory: {planned:.3f} GB planned, {measured:.3f} measured, {planned / measured:.3f}"]


if __name__ == "__main__":
    main()
