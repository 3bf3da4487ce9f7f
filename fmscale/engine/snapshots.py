"""Snapshots of power-function averages on disk -> the average of another width, one parameter at a time.

A snapshot is a checkpoint folder that holds nothing but these averages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fmscale.engine.checkpoint import Checkpoint, Fragments, find_all, open_checkpoint, step_of, verify
from fmscale.engine.optim import sigma_name
from fmscale.engine.posthoc import WIDEST, Response, combine
from fmscale.errors import UserError
from fmscale.log import get_logger

log = get_logger(__name__)
ROUGH = 0.05  # of a response function: more than that lacking is worth a warning
NEGLIGIBLE = 1e-9  # a coefficient that float32 does not notice; its snapshot need not be read

Term = tuple[Checkpoint, float, float]  # where an average is, its width, its coefficient


def make_average(root: Path, end: Checkpoint, tracked: Sequence[float], sigma_rel: float) -> Callable[[str], Tensor]:
    """The average of any width, from snapshots of tracked ones.

    Args:
        root: folder of the snapshots; those of later steps than the average are left out.
        end: checkpoint or snapshot of the step at which the average ends; what is in it counts too.
        tracked: relative widths that training averaged over.
        sigma_rel: relative width that is wanted, in (0, `WIDEST`).

    Returns:
        A function of a parameter's name that gives its average, float32, in its shape, summed in float64; it may be
        called by several threads.

    Raises:
        UserError: no such width, no snapshots, or one is damaged.

    Source: Karras et al. 2024, arXiv:2312.02696, sec. 3.2.
    """
    if not 0 < sigma_rel < WIDEST:
        raise UserError(f"the relative width of an average is between 0 and {WIDEST}, given {sigma_rel:g}")
    snapshots = [open_checkpoint(path) for path in find_all(root) if step_of(path) <= end.step]
    others = [snapshot for snapshot in snapshots if snapshot.step < end.step]
    sources = [source for source in (*others, end) if source.index["updates"] > 0]
    if not (tracked and snapshots and sources):
        raise UserError(
            f"{root}: no snapshots up to step {end.step} to make an average of width {sigma_rel:g} from; "
            "a run leaves them that is trained with ema.sigma_rels and ema.snapshot_every_steps"
        )
    places = [(source, width) for source in sources for width in tracked]
    known = [Response(source.index["updates"], width) for source, width in places]
    found = combine(known, Response(end.index["updates"], sigma_rel))
    terms = [(*place, x) for place, x in zip(places, found.coefficients.tolist(), strict=True) if abs(x) > NEGLIGIBLE]
    _tell(terms, end, sigma_rel, found.error)
    used = {source.path: source for source, _, _ in terms}
    for source in used.values():
        verify(source, [sigma_name(width) for width in tracked])
    fragments = {path: Fragments(source) for path, source in used.items()}

    def average(name: str) -> Tensor:
        shape = end.index["parameters"][name]
        total = torch.zeros(prod(shape), dtype=torch.float64)
        for source, width, coefficient in terms:
            for at, values in fragments[source.path].chunks(sigma_name(width), name):
                total[at : at + len(values)].add_(values, alpha=coefficient)
        return total.float().reshape(shape)

    return average


def _tell(terms: Sequence[Term], end: Checkpoint, sigma_rel: float, error: float) -> None:
    """What was solved, and how near it comes."""
    for source, width, coefficient in terms:
        log.info("width %g at update %s: coefficient %+.6f", width, f"{source.index['updates']:,}", coefficient)
    shown = (sigma_rel, f"{end.index['updates']:,}", 100 * error)
    log.info("average of width %g at update %s: off by %.2g %% of its response", *shown)
    if error > ROUGH:
        log.warning("that is rough; a width nearer to the tracked ones, or denser snapshots, would do better")
