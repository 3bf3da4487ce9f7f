"""What it costs to export a model from a sharded checkpoint.

    python tools/bench_export.py [--layers 9] [--heads 16] [--ranks 4] [--repeats 5] [--folder DIR] [--json FILE]

So many ranks, each a process, hold a model under ZeRO 2 and save it twice: as fmscale does, and with DeepSpeed's
`save_checkpoint`. Then, in turns, each time in a process of its own and with the files in the page cache:

    ours        the network's part of `fmscale export`, which checks what it reads: EMA to bfloat16
    deepspeed   `get_fp32_state_dict_from_zero_checkpoint`, into the network, to bfloat16, `save_file` of safetensors

Memory is anonymous memory, which a full machine cannot give back: its peak above what the imports hold. DeepSpeed's
route knows no EMA, so the raw weights are exported by ours too, and both files are compared bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from math import prod
from os import environ
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fmscale.config import TrainConfig, check
from fmscale.distributed import World, free_port, rank_environment, world_from_environment
from fmscale.engine.optim import AdamWEMA, ema_name, parameter_groups
from fmscale.engine.saver import Retention, Saver
from fmscale.engine.zero import Engine, deepspeed_config, init_process_group
from fmscale.export import write_transformer
from fmscale.models.families import blueprint
from fmscale.models.mmdit import MMDiT
from fmscale.models.mmdit_names import DIFFUSERS_POSITIONS, to_diffusers
from fmscale.runs import build_model, checkpoints_dir, open_run, start_run_dir, use_run

WEIGHTS = "diffusion_pytorch_model.safetensors"
SAMPLE_S = 0.002
BEGINS = "begins"


def main() -> None:
    """Make the checkpoints, time both sides, compare what they wrote, print the figures."""
    args = parse_args()
    if args.part:
        PARTS[args.part](args)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        args.folder = Path(folder)
        save_both_forms(args)
        parameters = sum(map(prod, open_run(args.folder, weights=None).checkpoint.index["parameters"].values()))
        sides: dict[str, list[dict[str, float]]] = {"ours": [], "deepspeed": []}
        for _ in range(args.repeats):
            for side, figures in sides.items():
                figures.append(timed(args, side))
        in_process(args, "ours_raw")
        compared = int(in_process(args, "compare"))
    ours, deepspeed = ({key: statistics.median(row[key] for row in rows) for key in rows[0]} for rows in sides.values())
    weights_mb = 4e-6 * parameters
    print(f"{parameters:,} parameters, {args.ranks} partitions, {weights_mb:,.0f} MB in fp32, median of {args.repeats}")
    for side, rows in sides.items():
        times = [row["seconds"] for row in rows]
        peak = statistics.median(row["peak_mb"] for row in rows)
        print(f"{side:10} {statistics.median(times):.2f} s ({min(times):.2f} … {max(times):.2f}), peak {peak:,.0f} MB")
    result = {
        "parameters": parameters,
        "ours": ours,
        "deepspeed": deepspeed,
        "faster": deepspeed["seconds"] / ours["seconds"],
        "memory_of_weights": ours["peak_mb"] / weights_mb,
        "tensors_equal_to_the_bit": compared,
    }
    print(f"{result['faster']:.2f} x as fast, {result['memory_of_weights']:.3f} of the fp32 weights' size in memory")
    print(f"{compared} tensors equal to the bit")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare exports of a sharded checkpoint.")
    parser.add_argument("--layers", type=int, default=9, help="of the model (%(default)s)")
    parser.add_argument("--heads", type=int, default=16, help="of the model, 64 wide each (%(default)s)")
    parser.add_argument("--ranks", type=int, default=4, help="that saved it (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--folder", type=Path, help="where everything is written (the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def command(args: argparse.Namespace, part: str) -> list[str]:
    """A part of this program as a process."""
    sizes = ["--layers", str(args.layers), "--heads", str(args.heads), "--ranks", str(args.ranks)]
    return [sys.executable, __file__, *sizes, "--folder", str(args.folder), "--part", part]


def in_process(args: argparse.Namespace, part: str) -> str:
    """Run a part; returns its last line."""
    output = subprocess.run(command(args, part), stdout=subprocess.PIPE, text=True, check=True).stdout
    return output.splitlines()[-1]


def make_config(args: argparse.Namespace) -> TrainConfig:
    """Of the model; nothing is trained, so there is no data."""
    model = {"layers": args.layers, "heads": args.heads, "head_dim": 64, "qk_norm": True}
    data = {"run_dir": str(args.folder), "steps": 1, "global_batch": 1, "micro_batch": 1, "data": {"path": "none"}}
    return check(TrainConfig, {**data, "model": model, "ema": {"decays": [0.999]}}, "the benchmark")


def save_both_forms(args: argparse.Namespace) -> None:
    """Let the ranks save."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            command(args, "rank"),
            env={**environ, **rank_environment(World(rank, rank, args.ranks), "127.0.0.1", port)}
            | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(args.ranks)
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit("a rank has failed")


def be_rank(args: argparse.Namespace) -> None:
    """Hold a share of a model whose weights, moments and average are all different, and save it in both forms."""
    world, config = world_from_environment(), make_config(args)
    init_process_group(world)
    torch.set_default_dtype(torch.bfloat16)  # the ranks share a machine: no fp32 copy of the whole model in each
    model = build_model(config)
    torch.set_default_dtype(torch.float32)
    optimizer = AdamWEMA(parameter_groups(model, 0.01), lr=1e-4, ema_decays=config.ema.decays)
    engine = Engine(model, optimizer, deepspeed_config(2, "bf16", 1), 1.0)
    generator = torch.Generator().manual_seed(world.rank)
    for piece in engine.pieces():
        for tensor in piece.tensors.values():
            tensor.normal_(generator=generator)
    engine.engine.save_checkpoint(str(args.folder / "deepspeed"), tag="all")
    if world.is_main:
        start_run_dir(config, ["cpu"], {})
    saver = Saver(checkpoints_dir(args.folder), world, Retention(1))
    description = {"config": config.model_dump(mode="json")}
    saver.start(engine.pieces(), step=1, updates=1, shapes=engine.shapes, description=description)
    saver.wait()


def watched(action: Any) -> None:
    """Do it, let the parent know when it begins, and print how long it took."""
    torch.empty(1, device="meta").normal_()  # imports much, which is no part of the time
    os.sync()  # else one side would wait for the disk to take what the other has written
    print(BEGINS, flush=True)
    began = time.perf_counter()
    action()
    print(time.perf_counter() - began)


def timed(args: argparse.Namespace, side: str) -> dict[str, float]:
    """Run a side in a process of its own: its seconds, and how far its anonymous memory rose meanwhile.

    The memory is looked at from here: a thread in that process would take turns with those that work.
    """
    with subprocess.Popen(command(args, side), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while (line := process.stdout.readline().strip()) != BEGINS:
            if not line and process.poll() is not None:
                raise SystemExit(f"{side} has failed")
        before = peak = anonymous_mb(process.pid)
        while process.poll() is None:
            peak = max(peak, anonymous_mb(process.pid))
            time.sleep(SAMPLE_S)
        return {"seconds": float(process.stdout.read().splitlines()[-1]), "peak_mb": peak - before}


def anonymous_mb(pid: int) -> float:
    """Memory of a process that no file backs."""
    with suppress(OSError, IndexError):  # it has just ended
        return int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0]) * 1024e-6
    return 0.0


def export_ours(args: argparse.Namespace, weights: str = "ema") -> None:
    """The network's part of `fmscale export`."""
    from diffusers import SD3Transformer2DModel  # noqa: F401  # as the other side's imports, not part of the time

    target = args.folder / f"ours-{weights}"
    shutil.rmtree(target, ignore_errors=True)
    watched(
        lambda: use_run(args.folder, 1, weights, lambda run: write_transformer(run, target, weights, torch.bfloat16))
    )


def export_deepspeed(args: argparse.Namespace) -> None:
    """What DeepSpeed's users do."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    config = make_config(args)

    def export() -> None:
        state = get_fp32_state_dict_from_zero_checkpoint(str(args.folder / "deepspeed"), tag="all")
        with torch.device("meta"):
            model = build_model(config)
        model.load_state_dict(state, assign=True)
        weights = to_diffusers(model.to(torch.bfloat16).state_dict(), cast(MMDiT, model))
        save_file({name: value.contiguous() for name, value in weights.items()}, args.folder / "deepspeed" / WEIGHTS)

    (args.folder / "deepspeed" / WEIGHTS).unlink(missing_ok=True)
    watched(export)


def compare(args: argparse.Namespace) -> None:
    """Raw weights of both sides; ours of the EMA, and what a reader of the whole checkpoint finds. Prints how many."""
    run = open_run(args.folder, 1)
    assert run.weight_kind("ema") == ema_name(0.999)
    count = 0
    with (
        safe_open(args.folder / "deepspeed" / WEIGHTS, "pt") as theirs,
        safe_open(args.folder / "ours-raw" / WEIGHTS, "pt") as raw,
        safe_open(args.folder / "ours-ema" / WEIGHTS, "pt") as ema,
    ):
        assert set(theirs.keys()) == set(raw.keys()) == set(ema.keys())
        for name in raw.keys():  # noqa: SIM118  # it is no dictionary
            assert torch.equal(raw.get_tensor(name), theirs.get_tensor(name)), name
            count += 1
        averages = to_diffusers(run.state("ema"), blueprint("mmdit", run.config.model.model_dump()))
        for name, value in averages.items():
            assert torch.equal(ema.get_tensor(name), value if name == DIFFUSERS_POSITIONS else value.bfloat16()), name
            count += 1
    print(count)


PARTS = {
    "rank": be_rank,
    "ours": export_ours,
    "ours_raw": lambda args: export_ours(args, "raw"),
    "deepspeed": export_deepspeed,
    "compare": compare,
}

if __name__ == "__main__":
    main()
