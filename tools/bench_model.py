"""Forward and backward of our networks against diffusers' own, with the same weights and inputs.

    python tools/bench_model.py [--family flux] [--compile] [--json FILE]
    python tools/bench_model.py --layers 24 --heads 24 --images 8 --latent-px 64 --text-tokens 333 --compile   (a GPU)

The outputs are compared first. Then the sides take turns, and neither is always the first. On a GPU both run in bf16,
and the MFU of a whole training step of ours, with clipping and fused AdamW, is measured too. The table is Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from fmscale.engine.blocks import compile_blocks
from fmscale.models.families import NAMES, build
from fmscale.models.flops import FLOPS, peak_flops

WARM_UP = 3
FARTHEST = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the output's norm


def main() -> None:
    """Compare the outputs, time both sides, print the table."""
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    values = model_values(args)
    ours, theirs = make_pair(args.family, values, device, dtype)
    inputs = draw_inputs(args, values, device, dtype)
    sides = {"fmscale": ours_call(ours, inputs), "diffusers": theirs_call(args.family, theirs, inputs)}
    compare(sides, dtype)
    rows = {"eager": in_turns(sides, args.repeats, device)}
    if args.compile:
        for model in (ours, theirs):
            compile_blocks(blocks_of(model))
        rows["compiled"] = in_turns(sides, args.repeats, device)
    flops = args.images * FLOPS[args.family](values, args.latent_px, args.latent_px, args.text_tokens).train_step
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    peak = peak_flops(name, "bf16" if dtype == torch.bfloat16 else "fp32")
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "settings": settings, "rows": rows}
    count = sum(parameter.numel() for parameter in ours.parameters())
    print(
        f"{args.family}, {count / 1e6:.1f} M parameters, {args.images} images of {args.latent_px} latent pixels, "
        f"{args.text_tokens} text tokens, {str(dtype).removeprefix('torch.')}; {name}; torch {torch.__version__}; "
        f"median of {args.repeats}\n"
    )
    print("| forward and backward | fmscale, ms | diffusers, ms | throughput against diffusers |\n|---|---|---|---|")
    for what, row in rows.items():
        print(
            f"| {what} | {row['fmscale']:.1f} | {row['diffusers']:.1f} "
            f"| {row['ratio']:.3f} ({row['least']:.3f} … {row['most']:.3f}) |"
        )
    if peak is not None:
        step_s = statistics.median(full_steps(ours, sides["fmscale"], args.repeats, device))
        result["mfu"] = flops / step_s / peak
        print(f"\na whole step: {1000 * step_s:.1f} ms, {flops / step_s / 1e12:.1f} TFLOP/s, MFU {result['mfu']:.1%}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare our networks with diffusers' own.")
    parser.add_argument("--family", choices=("mmdit", "flux"), default="mmdit", help="(%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of flux, of two streams (%(default)s)")
    parser.add_argument("--single-layers", type=int, default=4, help="of flux (%(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--head-dim", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--qk-norm", action="store_true", help="of mmdit, as SD3.5 has it")
    parser.add_argument("--images", type=int, default=4, help="in a batch (%(default)s)")
    parser.add_argument("--latent-px", type=int, default=32, help="side of the square latents (%(default)s)")
    parser.add_argument("--text-tokens", type=int, default=154, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="(%(default)s)")
    parser.add_argument("--compile", action="store_true", help="also with each block compiled, on both sides")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args()


def model_values(args: argparse.Namespace) -> dict[str, Any]:
    """What both networks are made with."""
    values = {"layers": args.layers, "heads": args.heads, "head_dim": args.head_dim, "latent_channels": 16}
    values |= {"patch_size": 2, "context_dim": 4096}
    if args.family == "mmdit":
        more = {"pooled_dim": 2048, "qk_norm": args.qk_norm, "pos_embed_max_size": 192, "base_size": 16}
        return {**values, **more, "dual_attention_layers": ()}
    axis = 2 * (args.head_dim * 7 // 32)
    rope = (args.head_dim - 2 * axis, axis, axis)
    return {**values, "single_layers": args.single_layers, "pooled_dim": 768, "rope_dims": rope, "guidance_embed": True}


def make_pair(
    family: str, values: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, nn.Module]:
    """Both networks with the same random weights."""
    torch.manual_seed(0)
    ours = build(family, values)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=parameter.shape[-1] ** -0.5 / 2)
    names: Any = NAMES[family]
    if family == "mmdit":
        theirs: nn.Module = SD3Transformer2DModel(**names.diffusers_config(values, 128))
    else:
        theirs = FluxTransformer2DModel(**names.diffusers_config(values))
    theirs.load_state_dict(names.to_diffusers(ours.state_dict(), ours))
    return ours.to(device, dtype), theirs.to(device, dtype)


def draw_inputs(
    args: argparse.Namespace, values: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Latents, text and times."""
    shapes = {
        "latents": (args.images, values["latent_channels"], args.latent_px, args.latent_px),
        "context": (args.images, args.text_tokens, values["context_dim"]),
        "pooled": (args.images, values["pooled_dim"]),
    }
    inputs = {name: torch.randn(shape, device=device, dtype=dtype) for name, shape in shapes.items()}
    return {**inputs, "t": torch.rand(args.images, device=device), "weight": torch.randn_like(inputs["latents"])}


def ours_call(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """One forward pass of ours."""
    return lambda: model(inputs["latents"], inputs["t"], inputs["context"], inputs["pooled"]) * inputs["weight"]


def theirs_call(family: str, model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """One forward pass of theirs; for FLUX the packing of latents, which its pipeline does, is part of neither."""
    latents, context, pooled, t = (inputs[name] for name in ("latents", "context", "pooled", "t"))
    if family == "mmdit":
        return lambda: model(latents, context, pooled, 1000 * t, return_dict=False)[0] * inputs["weight"]
    from diffusers import FluxPipeline

    shape = latents.shape
    packed = FluxPipeline._pack_latents(latents, *shape)
    image_ids = FluxPipeline._prepare_latent_image_ids(
        shape[0], shape[2] // 2, shape[3] // 2, latents.device, torch.float32
    )
    text_ids, guidance = torch.zeros(context.shape[1], 3, device=latents.device), torch.ones_like(t)

    def call() -> Tensor:
        tokens = model(packed, context, pooled, t, image_ids, text_ids, guidance, return_dict=False)[0]
        unpacked: Tensor = FluxPipeline._unpack_latents(tokens, 8 * shape[2], 8 * shape[3], 8)
        return unpacked * inputs["weight"]

    return call


def compare(sides: dict[str, Callable[[], Tensor]], dtype: torch.dtype) -> None:
    """Refuse to time networks that do not say the same."""
    with torch.no_grad():
        ours, theirs = (call().double() for call in sides.values())
    apart = ((ours - theirs).norm() / theirs.norm()).item()
    if not apart <= FARTHEST[dtype]:
        raise SystemExit(f"the outputs are {apart:.1e} of their norm apart")
    print(f"outputs {apart:.1e} of their norm apart\n")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a network, theirs or ours."""
    names = ("blocks", "transformer_blocks", "single_transformer_blocks")
    return [block for name in names for block in getattr(model, name, ())]


def in_turns(sides: dict[str, Callable[[], Tensor]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each, and the second over the first, pair by pair: their median and extremes."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(WARM_UP + repeats):
        for name in sorted(sides, reverse=bool(repeat % 2)):
            times[name].append(seconds(lambda name=name: sides[name]().sum().backward(), device))  # type: ignore[misc]
    ours, theirs = (times[name][WARM_UP:] for name in ("fmscale", "diffusers"))
    ratios = [other / one for one, other in zip(ours, theirs, strict=True)]
    figures = {name: 1000 * statistics.median(taken[WARM_UP:]) for name, taken in times.items()}
    return {**figures, "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def full_steps(model: nn.Module, forward: Callable[[], Tensor], repeats: int, device: torch.device) -> list[float]:
    """Seconds of training steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        forward().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return [seconds(step, device) for _ in range(WARM_UP + repeats)][WARM_UP:]


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time, with all that was left to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
