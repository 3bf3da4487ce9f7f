"""What a training step costs beside forward, backward and AdamW, and what each setting of its tail saves.

    python tools/bench_step.py [--layers 8] [--heads 4] [--images 8] [--latent-px 32] [--stage 1] [--repeats 15]
                               [--millions 20] [--only {step,tail} …] [--json FILE]

    step    `train_step` of fmscale with the real engine, over one batch that stays in memory, against a bare loop over
            the same tensors: the same model, torch's fused AdamW and clip_grad_norm_. Without averages and with one;
            then where the milliseconds of both sides go
    tail    each setting of the step's tail against what DeepSpeed does by default, on a model of so many million
            parameters that sees one token, so that little but the tail takes time: three steps in a row, in bf16.
            `nothing` has the same on both sides. Under torchrun, all ranks

Both sides of each in one process, in turns; medians. `step` is in fp32 on a CPU; on a GPU in bf16, where the bare loop
has fp32 weights and autocast.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fmscale import log
from fmscale.batch import Batch
from fmscale.building import build_engine, check_setup, kernels_of
from fmscale.config import TrainConfig, check, merge
from fmscale.control import Wish
from fmscale.data.index_build import build_index
from fmscale.data.order import split
from fmscale.data.shards import ShardWriter
from fmscale.distributed import World, world_from_environment
from fmscale.draws import draw_step, drop_text
from fmscale.encoders.null import save_null
from fmscale.encoders.text import assemble
from fmscale.engine.optim import AdamWEMA, parameter_groups
from fmscale.engine.saver import Retention, Saver
from fmscale.engine.zero import Engine, deepspeed_config, init_process_group
from fmscale.flow.loss import velocity_mse
from fmscale.flow.path import interpolate
from fmscale.guards import LossGuard, Stopwatch
from fmscale.runs import build_model
from fmscale.starts import new_start
from fmscale.tally import BINS
from fmscale.train import Job, batches_of, train_step
from fmscale.watchdog import Limits, Watchdog

PARTS = ("step", "tail")
TEXT = {"clip_l": (77, 768), "clip_l_pooled": (768,), "clip_g": (77, 1280), "clip_g_pooled": (1280,)}
WARM_UP = 2
IN_A_ROW = 3  # steps of a measurement of the tail: what the host does ahead of the device counts
SIDE = 1024
DECAY = 0.999
GRADIENT = ("scaled_global_norm", "_get_norm_groups", "unscale_and_clip_grads")
BUCKETS = "reduce_independent_p_g_buckets_and_remove_grads"
# What is measured -> DeepSpeed's own settings, and which of its methods it gets back. In turns with ours.
TAIL: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "bf16.check_grad_overflow": ({"bf16": {"check_grad_overflow": True}}, ()),
    "norm in fp64, read and clipped by DeepSpeed": ({"gradient_clipping": 1.0}, GRADIENT),
    "timers.throughput": ({"timers": {"throughput": {"enabled": True}}}, ()),
    "use_multi_rank_bucket_allreduce": ({"zero_optimization": {"use_multi_rank_bucket_allreduce": True}}, ()),
    "overlap_comm": ({"zero_optimization": {"overlap_comm": True}}, ()),
    "buckets for one rank": ({}, (BUCKETS,)),
}


def main() -> None:
    """Time what is asked for, print the figures."""
    args = parse_args()
    log.setup()
    world = world_from_environment()
    init_process_group(world)
    results: dict[str, Any] = {}
    if "step" in args.only:
        with tempfile.TemporaryDirectory() as folder:
            results["step"] = compare_steps(args, world, Path(folder))
    if "tail" in args.only:
        results["tail"] = compare_tails(args, world)
    if not world.is_main:
        return
    cuda = world.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}, {world.world_size} ranks, ZeRO-{args.stage}, median of {args.repeats}, milliseconds")
    for part, rows in results.items():
        for what, figures in rows.items():
            print(f"{part}  {what:44}" + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    if args.json:
        args.json.write_text(json.dumps({"device": name, **results}, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare a training step with a bare loop, and its tail's settings.")
    parser.add_argument("--layers", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="of 64 channels each (%(default)s)")
    parser.add_argument("--images", type=int, default=8, help="in a step (%(default)s)")
    parser.add_argument("--latent-px", type=int, default=32, help="side of the square latents (%(default)s)")
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2, 3), help="of ZeRO (%(default)s)")
    parser.add_argument("--millions", type=int, default=20, help="parameters of the model of `tail` (%(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="(%(default)s)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="(both)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args()


class Clock:
    """Times blocks by name, on a device with all that they left to it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = self._now()
        yield
        self.spent.setdefault(name, []).append(self._now() - began)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def medians(self) -> dict[str, float]:
        """Milliseconds."""
        return {name: 1000 * statistics.median(times[WARM_UP:]) for name, times in self.spent.items()}


def in_turns(clock: Clock, sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of both sides, and the median of the first over the second, pair by pair."""
    for repeat in range(WARM_UP + repeats):
        for name in sorted(sides, reverse=bool(repeat % 2)):  # neither is always the first
            with clock(name):
                sides[name]()
    first, second = (clock.spent[name][WARM_UP:] for name in sides)  # in the order in which they were given
    ratios = [one / other for one, other in zip(first, second, strict=True)]
    return {**{name: clock.medians()[name] for name in sides}, "ratio": statistics.median(ratios)}


def compare_steps(args: argparse.Namespace, world: World, folder: Path) -> dict[str, dict[str, float]]:
    """Steps of the trainer against bare ones; then the parts of each."""
    make_dataset(folder / "data", args.images, args.latent_px)
    (folder / "run").mkdir()
    results = {}
    for decays in ((), (DECAY,)):
        config = make_config(args, folder, decays)
        with Watchdog(world, config.run_dir, Limits(config.guard.silent_s, config.guard.stalled_s)) as watch:
            job = make_job(config, world, watch)
            batch = next(batches_of(job, 0))
            clocks = {name: Clock(world.device) for name in ("whole", "bare", "trainer")}
            bare, trainer = bare_step(job, batch, clocks["bare"]), trainer_step(job, batch, clocks["trainer"])
            figures = in_turns(clocks["whole"], {"trainer": trainer, "bare": bare}, args.repeats)
        count = sum(torch.Size(shape).numel() for shape in job.engine.shapes.values())
        what = f"{count / 1e6:.1f} M, {len(decays)} averages"
        results[what] = figures
        for side in ("trainer", "bare"):
            parts = clocks[side].medians()
            results[f"{what}: {side}"] = {**parts, "rest": figures[side] - sum(parts.values())}
    return results


def make_dataset(folder: Path, images: int, latent_px: int) -> None:
    """Random latents and text features, stored in bf16 as `fmscale encode` does."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    with ShardWriter(folder) as writer:
        for number in range(images):
            text = {name: draw(shape) for name, shape in TEXT.items()}
            writer.write(f"s{number}", {"latents": draw((16, latent_px, latent_px)), **text}, {"caption": ""})
    save_null(folder, {name: draw(shape) for name, shape in TEXT.items()})
    build_index(folder, {"program": "bench", "t5_length": 256})


def make_config(args: argparse.Namespace, folder: Path, decays: Sequence[float]) -> TrainConfig:
    """A run over that dataset, a batch of which is all of it."""
    data = {
        "run_dir": str(folder / "run"),
        "steps": 10**6,
        "global_batch": args.images,
        "micro_batch": args.images,
        "data": {"path": str(folder / "data"), "workers": 0},
        "model": {"layers": args.layers, "heads": args.heads, "qk_norm": True, "context_dim": 2048},
        "ema": {"decays": list(decays)},
        "engine": {"dtype": "bf16" if torch.cuda.is_available() else "fp32", "zero_stage": args.stage},
    }
    return check(TrainConfig, data, "bench")


def make_job(config: TrainConfig, world: World, watch: Watchdog) -> Job:
    """The run, as `train` makes it."""
    portions = split(config.global_batch, world.world_size, config.micro_batch)
    engine = build_engine(config, world.device, portions.micro_batch)
    saver = Saver(config.run_dir / "checkpoints", world, Retention(1))
    guard = LossGuard(BINS, config.guard.max_loss_ratio, world.device)
    programme = check_setup(config, world.world_size)
    phase, dataset = programme.phases[0], programme.datasets[0].to(world.device)
    start = new_start(config.run_dir, world)
    kernels, _ = kernels_of(programme, config.run_dir, world)
    tools = start, saver, watch, guard, Stopwatch(world.device), programme, phase, kernels
    return Job(config, dataset, engine, world, portions, *tools)


class Timed:
    """An engine whose three verbs are timed."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine, self._clock = engine, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *inputs: Any) -> Any:
        with self._clock("forward"):
            return self._engine(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        with self._clock("backward"):
            self._engine.backward(loss, last)

    def step(self, *settings: Any) -> Any:
        with self._clock("tail"):
            return self._engine.step(*settings)


def trainer_step(job: Job, batch: Batch, clock: Clock) -> Callable[[], object]:
    """Steps of the trainer, one after another, on one batch."""
    timed = job._replace(engine=cast(Engine, Timed(job.engine, clock)))
    steps = iter(range(job.config.steps))

    def run() -> object:
        step = next(steps)
        return train_step(timed, iter([replace(batch, step=step)]), step, Wish())

    return run


def bare_step(job: Job, batch: Batch, clock: Clock) -> Callable[[], None]:
    """Steps of the loop that anyone would write first, its inputs made beforehand."""
    config, dataset, device = job.config, job.dataset, job.world.device
    torch.manual_seed(config.seed)
    model = build_model(config).to(device)
    options = config.optimizer
    groups = parameter_groups(model, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)
    drawn = draw_step(config, 0, len(dataset.encoders), batch.bucket).of(batch.slots, device)
    t, text = drawn.times.t, drop_text(batch.tensors, dataset.encoders, drawn.dropped, dataset.null)
    given = assemble(text, context_dim=config.model.context_dim, t5_length=dataset.t5_length)
    noisy_latents, velocity = interpolate(batch.tensors["latents"].float(), batch.noise, t)

    def run() -> None:
        with clock("forward"), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            predicted = model(noisy_latents, t, given.context, given.pooled, given.repeats)
        with clock("backward"):
            velocity_mse(predicted, velocity).mean().backward()
        with clock("tail"):
            nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
            optimizer.step()
            optimizer.zero_grad()

    return run


def compare_tails(args: argparse.Namespace, world: World) -> dict[str, dict[str, float]]:
    """Milliseconds of steps with DeepSpeed's default of one setting, and with ours."""
    results = {}
    for name, (settings, methods) in {"nothing": ({}, ()), **TAIL}.items():
        theirs = tail_step(args, world, settings, methods)
        if theirs is not None:
            ours = cast(Callable[[], None], tail_step(args, world))  # anew: what has run long has larger pages
            results[name] = in_turns(Clock(world.device), {"DeepSpeed": theirs, "ours": ours}, args.repeats)
            del theirs, ours
            gc.collect()
    return results


def tail_step(
    args: argparse.Namespace, world: World, settings: Mapping[str, Any] | None = None, methods: Sequence[str] = ()
) -> Callable[[], None] | None:
    """Steps of an engine in which little but the tail takes time; None where it has none of those methods replaced.

    Args:
        args: size and stage.
        world: the ranks.
        settings: DeepSpeed's, laid over ours.
        methods: of DeepSpeed's optimizer, which it gets back.
    """
    torch.manual_seed(0)
    layers = [nn.Linear(SIDE, SIDE, bias=False) for _ in range(max(1, args.millions * 10**6 // SIDE**2))]
    model = nn.Sequential(*layers).to(world.device)
    optimizer = AdamWEMA(parameter_groups(model, 0.0), lr=1e-4, ema_decays=(DECAY,))
    config = merge(deepspeed_config(args.stage, "bf16", 1), dict(settings or {}))
    engine = Engine(model, optimizer, config, clip_norm=1.0)
    replaced = [method for method in methods if vars(engine.zero).pop(method, None)]
    if methods and not replaced:
        return None
    token = torch.ones(1, SIDE, device=world.device, dtype=torch.bfloat16)

    def run() -> None:
        for _ in range(IN_A_ROW):
            engine.backward(engine(token).float().sum(), last=True)
            engine.step(1e-4)

    return run


if __name__ == "__main__":
    main()
