"""Which noise belongs to which sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fmscale.errors import UserError
from fmscale.flow.noise import draw_noise

NOISE_KEY = "noise_key"  # in a reflow pair's json: the key that `draw_noise` regenerates its noise from


ReadMeta = Callable[[], Mapping[str, Any]]


def independent(shape: Sequence[int], read_meta: ReadMeta, place: tuple[int | str, ...]) -> Tensor:
    """Fresh noise for each sample and step.

    Args:
        shape: of the sample's latents, (C, H, W).
        read_meta: reads the sample's json; has no part in it.
        place: seed, step and slot in the global batch.

    Returns:
        Noise, float32, `shape`.
    """
    return draw_noise(shape, "noise", *place)


def paired(shape: Sequence[int], read_meta: ReadMeta, place: tuple[int | str, ...]) -> Tensor:
    """The noise from which a teacher made this sample.

    Args:
        shape: of the sample's latents, (C, H, W).
        read_meta: reads the pair's json, which holds the key of its noise.
        place: has no part in it.

    Returns:
        Noise, float32, `shape`.

    Raises:
        UserError: the sample is not a reflow pair.

    Source: Liu et al. 2022, arXiv:2209.03003, sec. 2.2 (reflow).
    """
    meta = read_meta()
    if NOISE_KEY not in meta:
        raise UserError(
            "flow.coupling: `paired` needs a dataset made by `fmscale reflow`; this one's samples name no noise"
        )
    return draw_noise(shape, *meta[NOISE_KEY])


COUPLINGS: dict[str, Callable[[Sequence[int], ReadMeta, tuple[int | str, ...]], Tensor]] = {
    "independent": independent,
    "paired": paired,
}
