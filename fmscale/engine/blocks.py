"""What is done to a network's blocks, one by one, to save memory or time; the network does not know of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(blocks: Sequence[nn.Module], every: int) -> None:
    """Forget the activations of every so many-th block, and compute them again in the backward pass.

    Args:
        blocks: in the order in which they run.
        every: 1 for all of them, 2 for every second, …; 0 for none.

    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    for block in blocks[::every] if every else ():
        # The blocks draw nothing at random, so there is no state of generators to keep.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile each block with torch.compile: once for each bucket's shape, the same code for all blocks."""
    for block in blocks:
        block.compile(dynamic=False)
