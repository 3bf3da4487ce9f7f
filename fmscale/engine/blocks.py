"""What is done to a network's blocks, one by one, to save memory or time; the network does not know of it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from torch import nn
from torch.utils.checkpoint import checkpoint

from fmscale.errors import UserError


def prepare(blocks: Iterable[nn.Module], every: int, parts: Sequence[str], compiled: bool) -> None:
    """Do to a network's blocks what is asked for: `recompute` first, so that what is compiled recomputes.

    Raises:
        UserError: no block has a part of such a name.
    """
    blocks = list(blocks)
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
    known = parts_of(blocks)
    if unknown := [name for name in parts if name not in known]:
        raise UserError(f"engine.recompute: the blocks have no {unknown[0]!r}, only {', '.join(known)}")
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
    module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile each block with torch.compile: once for each bucket's shape, the same code for all blocks."""
    for block in blocks:
        block.compile(dynamic=False)
