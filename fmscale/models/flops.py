"""What a network costs, in closed form, and what devices can do at most: together they give the MFU.

One multiplication with its addition counts as 2 FLOPs; only matrix products count, as in
`torch.utils.flop_counter.FlopCounterMode`, whose figures these are to the last digit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from fmscale.models.shapes import TIMESTEP_FEATURES


class Flops(NamedTuple):
    """What one image costs.

    Attributes:
        forward: of the forward pass.
        train_step: of forward and backward; MFU is counted in these.
        attention: what of these is between tokens: queries with keys, and what comes of it with values.
        recomputation: what it costs beyond that to compute forgotten activations again.
    """

    forward: int
    train_step: int
    attention: int
    recomputation: int


def mmdit_flops(model: Mapping[str, Any], height: int, width: int, text_tokens: int, recompute_every: int = 0) -> Flops:
    """The cost of an `MMDiT` for one image; a batch of B costs B times as much.

    Args:
        model: what `MMDiT` was made with, by name.
        height, width: of the latents, in latent pixels.
        text_tokens: L, as the network gets them: one that stands for many counts once.
        recompute_every: every so many-th block is computed again in the backward pass; 0 for none.
    """
    inner, patch_values = model["heads"] * model["head_dim"], model["latent_channels"] * model["patch_size"] ** 2
    image_tokens = (height // model["patch_size"]) * (width // model["patch_size"])
    # Products of the first layers: their inputs need no gradient, so the backward pass costs these once, not twice.
    first = image_tokens * patch_values * inner + text_tokens * model["context_dim"] * inner
    told = 2 if model.get("leap_embed") else 1
    first += (told * TIMESTEP_FEATURES + model["pooled_dim"]) * inner
    last_layer = model["layers"] - 1
    blocks = [
        _joint_block(inner, image_tokens, text_tokens, layer in model["dual_attention_layers"], layer == last_layer)
        for layer in range(model["layers"])
    ]
    rows = sum(9 if layer in model["dual_attention_layers"] else 6 for layer in range(model["layers"]))
    rows += 6 * last_layer + 2 + 2  # of modulation: the text's, the last text's, the last norm's
    rest = (told + 1 + rows) * inner**2 + image_tokens * inner * patch_values  # conditioning, modulation, projection
    forward = first + sum(blocks) + rest
    again = sum(blocks[::recompute_every]) if recompute_every else 0
    between = model["layers"] * _attention(inner, image_tokens + text_tokens)
    between += len(set(model["dual_attention_layers"])) * _attention(inner, image_tokens)
    return Flops(2 * forward, 2 * (3 * forward - first), 6 * between, 2 * again)


def flux_flops(model: Mapping[str, Any], height: int, width: int, text_tokens: int, recompute_every: int = 0) -> Flops:
    """The cost of a `Flux` for one image; arguments as for `mmdit_flops`."""
    inner, patch_values = model["heads"] * model["head_dim"], model["latent_channels"] * model["patch_size"] ** 2
    image_tokens = (height // model["patch_size"]) * (width // model["patch_size"])
    tokens = image_tokens + text_tokens
    told = 1 + sum(bool(model.get(name)) for name in ("guidance_embed", "leap_embed"))
    first = image_tokens * patch_values * inner + text_tokens * model["context_dim"] * inner
    first += (told * TIMESTEP_FEATURES + model["pooled_dim"]) * inner
    joint = _joint_block(inner, image_tokens, text_tokens, dual=False, last=False)
    single = tokens * (7 + 5) * inner**2 + _attention(inner, tokens)
    blocks = [joint] * model["layers"] + [single] * model["single_layers"]
    rows = 12 * model["layers"] + 3 * model["single_layers"] + 2
    rest = (told + 1 + rows) * inner**2 + image_tokens * inner * patch_values
    forward = first + sum(blocks) + rest
    again = sum(blocks[::recompute_every]) if recompute_every else 0
    between = len(blocks) * _attention(inner, tokens)
    return Flops(2 * forward, 2 * (3 * forward - first), 6 * between, 2 * again)


def _joint_block(width: int, image: int, text: int, dual: bool, last: bool) -> int:
    """Multiplications of one block, for streams of `image` and `text` tokens."""
    square = width**2
    qkv, out, mlp = 3, 1, 8  # weights of each, in squares of the width
    image_stream = image * (qkv + out + mlp) * square
    text_stream = text * (qkv if last else qkv + out + mlp) * square
    joint = _attention(width, image + text)
    alone = image * (qkv + out) * square + _attention(width, image) if dual else 0
    return image_stream + text_stream + joint + alone


def _attention(width: int, tokens: int) -> int:
    """Multiplications of queries with keys, and of what comes of it with values."""
    return 2 * tokens**2 * width


FLOPS = {"mmdit": mmdit_flops, "flux": flux_flops}

# A device's whole name, as CUDA gives it, without the maker -> most TFLOP/s of dense matrix products in bf16 (with sums
# in fp32) and in fp32 outside the tensor cores. From NVIDIA's data sheets, whose figures for sparse matrices are
# halved; of GeForce and RTX cards from the appendices of the GA102, Ada and Blackwell white papers.
PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    r"B200": (2250, 75),
    r"GH200 .*": (989.4, 66.9),
    r"H200": (989.4, 66.9),
    r"H200 NVL": (835.5, 60),
    r"H100 80GB HBM3": (989.4, 66.9),
    r"H100 PCIe": (756.5, 51.2),
    r"H100 NVL": (835.5, 60),
    r"A100[- ].*": (312, 19.5),
    r"A10": (125, 31.2),
    r"A40": (149.7, 37.4),
    r"L4": (121, 30.3),
    r"L40": (181.05, 90.5),
    r"L40S": (362.05, 91.6),
    r"RTX A6000": (154.8, 38.7),
    r"RTX 6000 Ada Generation": (364.2, 91.1),
    r"GeForce RTX 3090": (71, 35.6),
    r"GeForce RTX 4090": (165.2, 82.6),
    r"GeForce RTX 5090": (209.5, 104.8),
}


def peak_flops(device: str, dtype: str) -> float | None:
    """Most FLOP/s that a device is made for, or None where that is not known.

    Args:
        device: name from `torch.cuda.get_device_name`. A slice of a GPU (MIG) is none of those that are known.
        dtype: `bf16` or `fp32`.
    """
    name = device.removeprefix("NVIDIA ")
    found = [peaks for pattern, peaks in PEAK_TFLOPS.items() if re.fullmatch(pattern, name) and "MIG" not in name]
    return found[0][("bf16", "fp32").index(dtype)] * 1e12 if found else None
