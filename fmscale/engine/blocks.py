"""What is done to a network's blocks, one by one, to save memory or time; the network does not know of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fmscale.engine.recomputed import check_recompute
from fmscale.engine.zero import gather_whole

VERSIONS = 4096  # of compiled code: more than a run has


def prepare(blocks: Iterable[nn.Module], every: int, parts: Sequence[str], compiled: bool) -> None:
    """Do to a network's blocks what is asked for, and no longer what was done before.

    `recompute` comes first, so that what is compiled recomputes.

    Raises:
        UserError: no block has a part of such a name.
    """
    blocks = list(blocks)
    for module in (module for block in blocks for module in block.modules()):
        vars(module).pop("forward", None)
    recompute(blocks, every, parts)
    if compiled:
        compile_blocks(blocks)


def recompute(blocks: Sequence[nn.Module], every: int, parts: Sequence[str] = ()) -> None:
    """Forget activations, and compute them again in the backward pass.

    Args:
        blocks: in the order in which they run.
        every: so many-th blocks forget all that happens in them: 1 for all, 2 for every second, …; 0 for none.
        parts: names of modules within the blocks, from `parts_of`; these forget in the blocks that do not.

    Raises:
        UserError: no block has a part of such a name.

    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    check_recompute(parts, parts_of(blocks))
    for number, block in enumerate(blocks):
        if every and number % every == 0:
            _forget(block)
        else:
            for part in [part for name, part in block.named_modules() if name.rpartition(".")[2] in parts]:
                _forget(part)


def parts_of(blocks: Sequence[nn.Module]) -> list[str]:
    """Names of the modules within blocks that are called and made of modules themselves: the others keep too little."""
    return sorted(
        {
            name.rpartition(".")[2]
            for block in blocks
            for name, part in block.named_modules()
            if name and any(True for _ in part.children()) and type(part).forward is not nn.Module.forward
        }
    )


def _forget(module: nn.Module) -> None:
    # The blocks draw nothing at random, so there is no state of generators to keep.
    forward = module.forward

    def forgetful(*inputs: Any) -> Any:  # a frame of ours: torch.compile passes over those of checkpoint itself
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)

    module.forward = forgetful


@contextmanager
def backward_at_once(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Blocks that run forward in the `with` block run backward at once, so that both directions are compiled.

    No weight gets a gradient, and what comes out of a block is cut off from what went in.
    """
    # First of the hooks: under ZeRO-3 the next one lets go of the block's weights.
    handles = [block.register_forward_hook(_run_backward, prepend=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run_backward(block: nn.Module, inputs: Sequence[Any], outputs: Tensor | tuple[Tensor, ...]) -> Any:
    found = (outputs,) if isinstance(outputs, Tensor) else outputs
    ends = [tensor for tensor in found if tensor.requires_grad]
    if not ends:
        return outputs
    starts = [tensor for tensor in inputs if isinstance(tensor, Tensor) and tensor.requires_grad]
    torch.autograd.grad(ends, starts, [torch.zeros_like(end) for end in ends], allow_unused=True)
    cut = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in found)
    return cut[0] if isinstance(outputs, Tensor) else cut


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile each block with torch.compile: once for each bucket's shape, the same code for all blocks of a kind."""
    # Beyond 8 versions of one function torch would leave it uncompiled; kinds of blocks times buckets are more.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = VERSIONS
    for block in blocks:
        gather_whole(block)  # hooks within it would cut the code to pieces
        block.forward = torch.compile(block.forward, dynamic=False)  # without the hooks around it
