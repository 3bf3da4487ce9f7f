"""Randomness keyed by place: whatever is drawn depends on the key alone, not on rank, device or history."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator that is a function of `key`, such as ("noise", seed, step, slot).

    The key is hashed to 64 bits; torch's Mersenne twister starts from the lower 32 of them, so among 2^16 keys two
    are expected to share a stream. For noise in training that is harmless.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def draw_noise(shape: Sequence[int], *key: int | str) -> Tensor:
    """Standard normal noise, float32, on the CPU, a function of `shape` and `key`.

    To the bit on every CPU with AVX2; torch's kernel for others differs by some 2e-6.

    Args:
        shape: of one sample's latents, (C, H, W).
        key: what the noise belongs to.
    """
    return torch.randn(tuple(shape), generator=keyed_generator(*key))
