"""Linear layers that multiply in 8-bit floats. Weights, gradients, names and all other arithmetic stay as they are.

This file alone knows torchao.
"""

from __future__ import annotations

import torch
from torch import nn

from fmscale.errors import UserError

MULTIPLE = 16  # of which both sides of a weight must be: tensor cores take 8-bit matrices in such pieces
CAPABILITY = (8, 9)  # of the first GPUs, Ada, that multiply 8-bit floats


def check_fp8(dtype: str, device: torch.device) -> None:
    """Refuse what cannot multiply in 8 bits.

    Args:
        dtype: of the rest of the network, `bf16` or `fp32`.
        device: that trains.

    Raises:
        UserError: says what is missing.
    """
    if dtype != "bf16":
        raise UserError(f"engine.fp8: is for engine.dtype=bf16, not {dtype}; change one of the two")
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        raise UserError(f"engine.fp8: needs torchao ({error}): pip install fmscale[fp8]") from None
    if device.type != "cuda":
        raise UserError("engine.fp8: needs a GPU of compute capability 8.9 or more, there is none; leave it out")
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise UserError(
            f"engine.fp8: needs a GPU of compute capability 8.9 or more, {torch.cuda.get_device_name(device)} has "
            f"{found[0]}.{found[1]}; leave it out"
        )


def convert(blocks: nn.Module, emulate: bool = False) -> None:
    """Let the linear layers within blocks multiply in 8 bits, forward and backward.

    Weights, activations and gradients are rounded as they are used, each tensor with a scale of its own.

    Args:
        blocks: whose linear layers are replaced by others that hold the same parameters by the same names.
        emulate: round to 8 bits, and multiply in fp32: the same mathematics on any device.

    Source: Micikevicius et al. 2022, arXiv:2209.05433.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # Gradients of weights sum over tokens, whose number need be no multiple of 16: they are padded with zeros.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(blocks, module_filter_fn=_fits, config=config)


def _fits(layer: nn.Module, name: str) -> bool:
    assert isinstance(layer, nn.Linear)
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0
