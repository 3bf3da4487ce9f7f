"""How much of the time of `fmscale reflow` is the network's, and how fast it is against diffusers' pipeline.

    python tools/bench_reflow.py quickstart/run quickstart/latents [--pairs 128] [--steps 12] [--guidance-scale 4]

1. Pairs are made as the program makes them, into a folder that is thrown away: seconds inside forward passes over
   seconds from the first unit's begin to the last one's end.
2. The same captions, noise, steps, guidance and batch through `StableDiffusion3Pipeline` of the exported run, with text
   embeddings made beforehand and latents as output; both sides in turn, median of the ratios. The stock pipeline feeds
   256 tokens of zeros for a T5 that is not there, where fmscale feeds one that counts 256 times.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fmscale.batch import Conditioning
from fmscale.config import ReflowConfig, check
from fmscale.encoders.text import expand
from fmscale.export import export
from fmscale.reflow import Plan, check_setup, make_unit
from fmscale.runs import open_run
from fmscale.teacher import Caption, Teacher

Action = Callable[[], object]


class Timed(torch.nn.Module):
    """A network that adds up the seconds of its forward passes."""

    def __init__(self, network: torch.nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network, self.device, self.seconds = network, device, 0.0

    def forward(self, *given: Any, **named: Any) -> torch.Tensor:
        """Its own, timed; a GPU is waited for."""
        began = now(self.device)
        found = self.network(*given, **named)
        self.seconds += now(self.device) - began
        return found


class WrittenOut(Teacher):
    """One that is fed each token as often as it counts."""

    def _assemble(self, text: Mapping[str, torch.Tensor]) -> Conditioning:
        return expand(super()._assemble(text))


def now(device: torch.device) -> float:
    """The time at which the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Print both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--same-tokens", action="store_true", help="fmscale too is fed each of the zeros")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        config = settings(args, Path(place) / "pairs")
        plan = check_setup(config)
        teacher = (
            WrittenOut(config, plan.run, plan.captions)
            if args.same_tokens
            else Teacher(config, plan.run, plan.captions)
        )
        teacher.model = timed = Timed(teacher.model, teacher.device)
        batch = first_batch(plan, args.batch)
        teacher.draw(batch)  # the first pass of all allocates
        timed.seconds, began = 0.0, now(teacher.device)
        for unit in plan.units:
            folder = Path(place) / unit
            folder.mkdir()
            make_unit(config, plan.captions, teacher, unit, folder)
        wall = now(teacher.device) - began
        print(f"{args.pairs} pairs in {wall:.1f} s, {timed.seconds / wall:.3f} of it inside forward passes")
        theirs = stock(args, plan, batch, Path(place) / "export", teacher.device)
        ratios = compare(lambda: teacher.draw(batch), theirs, args.repeats, teacher.device)
        shown = ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
        print(f"diffusers' time over ours: {statistics.median(ratios):.3f}, median of {shown}")


def settings(args: argparse.Namespace, out: Path) -> ReflowConfig:
    """What is made."""
    data = {"path": str(args.data)}
    made = {"pairs": args.pairs, "batch": args.batch, "solver_steps": args.steps, "shard_samples": args.pairs}
    values = {"teacher": str(args.run), "data": data, "out": str(out), "guidance_scale": args.guidance_scale, **made}
    return check(ReflowConfig, values, "bench_reflow")


def first_batch(plan: Plan, count: int) -> list[Caption]:
    """The first captions of one size."""
    captions = [plan.captions.by_number.read(number) for number in range(20 * count)]
    return [caption for caption in captions if caption.size == captions[0].size][:count]


def stock(args: argparse.Namespace, plan: Plan, batch: list[Caption], folder: Path, device: torch.device) -> Action:
    """The same pictures by diffusers."""
    from diffusers import StableDiffusion3Pipeline

    from fmscale.flow.noise import draw_noise

    export(open_run(args.run), folder, dtype="fp32")
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embedded = dict(zip(names, pipeline.encode_prompt([caption.words for caption in batch], None, None), strict=True))
    shape = (plan.run.config.model.latent_channels, *batch[0].size)
    noise = torch.stack([draw_noise(shape, *caption.noise_key) for caption in batch]).to(device)
    height, width = (side * pipeline.vae_scale_factor for side in batch[0].size)

    def run() -> object:
        return pipeline(
            **embedded,
            latents=noise,
            height=height,
            width=width,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            output_type="latent",
        )

    return run


def compare(ours: Action, theirs: Action, repeats: int, device: torch.device) -> list[float]:
    """Their seconds over ours, both in turn."""
    ratios = []
    for number in range(repeats + 1):
        seconds = []
        for run in (ours, theirs):
            began = now(device)
            run()
            seconds.append(now(device) - began)
        if number:  # the first round warms up
            ratios.append(seconds[1] / seconds[0])
    return ratios


if __name__ == "__main__":
    main()
