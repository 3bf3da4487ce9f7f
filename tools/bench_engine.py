"""What the engine costs beside the training: averaged weights, and checkpoints in the background.

    python tools/bench_engine.py [--millions 100] [--repeats 7] [--folder DIR] [--json FILE]

    average     one update of one average: fmscale's, on the flat partition that ZeRO hands the optimizer, against
                `EMAModel.step` of diffusers over the same weights
    save        what a checkpoint of weights, both moments and an average adds to the time of the training thread, which
                multiplies matrices meanwhile: in the background, against waiting until it is on disk

Both sides of each in one process, in turns. On a GPU the weights and the matrices are there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from fmscale.distributed import World
from fmscale.engine.optim import AdamWEMA, ema_name
from fmscale.engine.saver import Retention, Saver
from fmscale.engine.zero import Piece

SIDE = 1024
DECAY = 0.999
KINDS = ("weight", "exp_avg", "exp_avg_sq", ema_name(DECAY))


def main() -> None:
    """Time both pairs, print the figures."""
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    average = compare_averages(args.millions, args.repeats, device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        save = compare_saves(args.millions, args.repeats, device, Path(folder))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{args.millions} million parameters, {name}, median of {args.repeats}")
    for what, figures in (("average", average), ("save", save)):
        print(f"{what:8} " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    if args.json:
        args.json.write_text(json.dumps({"device": name, "average": average, "save": save}, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare what the engine costs beside the training.")
    parser.add_argument("--millions", type=int, default=100, help="parameters (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args()


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of an action, with all that it left to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare_averages(millions: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of an update, of this program and of diffusers, and the first over the second."""
    model = nn.ModuleList([nn.Linear(SIDE, SIDE, bias=False) for _ in range(max(1, millions * 10**6 // SIDE**2))])
    model = model.to(device).requires_grad_(False)
    flat = torch.cat([p.flatten() for p in model.parameters()])
    optimizer = AdamWEMA([flat], ema_decays=(DECAY,))
    optimizer.init_state(flat)
    theirs = EMAModel(list(model.parameters()), decay=DECAY)
    times: dict[str, list[float]] = {"ours": [], "diffusers": []}
    for repeat in range(repeats + 1):
        ours = seconds(lambda: optimizer.update_averages([flat]), device)
        other = seconds(lambda: theirs.step(model.parameters()), device)
        if repeat:
            times["ours"].append(ours)
            times["diffusers"].append(other)
    ours, other = (statistics.median(found) for found in times.values())
    return {"ours_ms": 1000 * ours, "diffusers_ms": 1000 * other, "ratio": ours / other}


def compare_saves(millions: int, repeats: int, device: torch.device, folder: Path) -> dict[str, float]:
    """Seconds that a save adds to the work of the training thread: in the background, blocking; and their ratio."""
    tensors = {kind: torch.randn(millions * 10**6, device=device) for kind in KINDS}
    piece = Piece("model", 0, tensors)
    matrix = torch.randn(SIDE, SIDE, device=device)
    saver = Saver(folder, World(0, 0, 1), Retention(1))

    def work() -> None:
        for _ in range(rounds):
            matrix @ matrix

    rounds = 10
    start(saver, piece, 1)
    saver.wait()
    blocking_s = statistics.median(save_and_wait(saver, piece, device) for _ in range(3))
    rounds = max(1, round(rounds * 1.5 * blocking_s / seconds(work, device)))  # longer than a save is written
    times: dict[str, list[float]] = {"alone": [], "background": [], "blocking": []}
    for _ in range(repeats):
        times["alone"].append(seconds(work, device))
        times["background"].append(seconds(lambda: (start(saver, piece, 2), work()), device))
        saver.wait()
        times["blocking"].append(seconds(lambda: (start(saver, piece, 3), saver.wait(), work()), device))
    alone, background, blocking = (statistics.median(found) for found in times.values())
    shutil.rmtree(folder, ignore_errors=True)
    added = {"background_s": background - alone, "blocking_s": blocking - alone}
    return {**added, "ratio": added["background_s"] / added["blocking_s"], "snapshot_gb": 4e-9 * 4 * millions * 1e6}


def start(saver: Saver, piece: Piece, step: int) -> None:
    """Begin a save of one parameter."""
    shape: Tensor = piece.tensors["weight"]
    saver.start([piece], step=step, updates=step, shapes={"model": shape.shape}, description={})


def save_and_wait(saver: Saver, piece: Piece, device: torch.device) -> float:
    """Seconds of a save that is waited for."""
    return seconds(lambda: (start(saver, piece, 1), saver.wait()), device)


if __name__ == "__main__":
    main()
