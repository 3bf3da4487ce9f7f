"""What the engine costs beside the training: averaged weights, and checkpoints in the background.

    python tools/bench_engine.py [--layers 4] [--millions 100] [--repeats 7] [--folder DIR] [--json FILE]

    average     one update of one average of an MMDiT as wide as Stable Diffusion 3's: fmscale's, on the flat partition
                that ZeRO hands the optimizer, against `EMAModel.step` of diffusers over the same weights, as it is by
                default and with foreach=True
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
from functools import partial
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from fmscale.distributed import World
from fmscale.engine.optim import AdamWEMA, ema_name
from fmscale.engine.saver import Retention, Saver
from fmscale.engine.zero import Piece
from fmscale.models.mmdit import MMDiT

SIDE = 1024
DECAY = 0.999
KINDS = ("weight", "exp_avg", "exp_avg_sq", ema_name(DECAY))


def main() -> None:
    """Time both pairs, print the figures."""
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    average = compare_averages(args.layers, args.repeats, device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        save = compare_saves(args.millions, args.repeats, device, Path(folder))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}, median of {args.repeats}")
    for what, figures in (("average", average), ("save", save)):
        print(f"{what:8} " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    if args.json:
        args.json.write_text(json.dumps({"device": name, "average": average, "save": save}, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare what the engine costs beside the training.")
    parser.add_argument("--layers", type=int, default=4, help="of the model that is averaged, 85 million each")
    parser.add_argument("--millions", type=int, default=100, help="parameters of a checkpoint (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args()


def seconds(device: torch.device, *actions: Callable[[], object]) -> float:
    """Wall-clock time of actions one after another, with all that they left to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for action in actions:
        action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare_averages(layers: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of an update, of this program and of diffusers, and the former over the latter.

    On a GPU also the most memory that an update takes, over that of the average.
    """
    with device:
        model = MMDiT(layers=layers, heads=24, head_dim=64)
    params = list(model.parameters())  # which require gradients: of others diffusers makes copies, not averages
    flat = torch.cat([p.detach().flatten() for p in params])
    optimizer = AdamWEMA([flat], ema_decays=(DECAY,))
    optimizer.init_state(flat)
    optimizer.set_updates(flat, 1000)
    theirs = EMAModel(params, decay=DECAY)

    def step(foreach: bool) -> None:
        theirs.foreach = foreach
        theirs.step(params)

    actions: dict[str, Callable[[], object]] = {
        "ours": lambda: optimizer.update_averages([flat]),
        "diffusers": lambda: step(False),
        "foreach": lambda: step(True),
    }
    times: dict[str, list[float]] = {key: [] for key in actions}
    extra = {f"{key}_extra_memory": peak_bytes(action, device) / flat.nbytes for key, action in actions.items()}
    for _ in range(repeats):
        for key, action in actions.items():
            times[key].append(seconds(device, action))
    found = {key: statistics.median(values) for key, values in times.items()}
    ratios = {f"ours/{key}": found["ours"] / found[key] for key in ("diffusers", "foreach")}
    figures = {"million_parameters": flat.numel() / 1e6, **{f"{key}_ms": 1000 * value for key, value in found.items()}}
    return {**figures, **ratios, **(extra if device.type == "cuda" else {})}


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Most memory of a GPU that an action takes beside what is there; 0 on a CPU, which does not tell."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    action()
    return torch.cuda.max_memory_allocated() - before if cuda else 0


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
    rounds = max(1, round(rounds * 1.5 * blocking_s / seconds(device, work)))  # longer than a save is written
    times: dict[str, list[float]] = {"alone": [], "background": [], "blocking": []}
    for _ in range(repeats):
        times["alone"].append(seconds(device, work))
        times["background"].append(seconds(device, partial(start, saver, piece, 2), work))
        saver.wait()
        times["blocking"].append(seconds(device, partial(start, saver, piece, 3), saver.wait, work))
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
    return seconds(device, partial(start, saver, piece, 1), saver.wait)


if __name__ == "__main__":
    main()
