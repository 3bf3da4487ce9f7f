"""Steps that were not applied: they are named, and after too many in a row the run goes back to a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fmscale.distributed import World, everywhere
from fmscale.engine import checkpoint as checkpoints
from fmscale.engine.optim import ema_names
from fmscale.engine.saver import SaveError
from fmscale.engine.zero import Engine
from fmscale.errors import SharedError
from fmscale.files import append
from fmscale.log import get_logger
from fmscale.phases import phase_of
from fmscale.runs import checkpoints_dir, snapshots_dir

if TYPE_CHECKING:
    from fmscale.train import Job, StepResult

log = get_logger(__name__)
SKIPPED = "skipped_steps.jsonl"  # in the run directory: step and sample keys of those that were not applied


class Streak(NamedTuple):
    """Steps in a row that were not applied.

    Attributes:
        skipped: so many, up to the last one.
        went_back: before them the run went back, and nothing was applied since.
    """

    skipped: int = 0
    went_back: bool = False


def settle(job: Job, recent: Sequence[StepResult], streak: Streak) -> Streak:
    """Name steps that were not applied, for which the device is waited for; go back where too many were in a row."""
    for result in recent:
        if result.applied:
            streak = Streak()
        else:
            streak = streak._replace(skipped=streak.skipped + 1)
            keys = [key for key in result.keys if key]
            job.start.check()
            append(job.config.run_dir / SKIPPED, {"step": result.step + 1, "keys": keys})
    if streak.skipped < job.config.guard.max_skipped_steps:
        return streak
    go_back(job, recent[-1].step + 1, streak)
    return Streak(went_back=True)


def go_back(job: Job, done: int, streak: Streak) -> None:
    """Load the newest sound checkpoint from before the steps that were skipped; the data goes on where it is.

    Args:
        job: the run.
        done: steps done, the skipped ones included.
        streak: of those.

    Raises:
        UserError: there is no such checkpoint, or going back has not helped.
    """
    config, root = job.config, checkpoints_dir(job.config.run_dir)
    job.watch.at(done - 1, "going back to a checkpoint")
    wait_for_save(job)
    found = None if streak.went_back else checkpoints.choose(root, job.world, before=done - streak.skipped + 1)
    if found is None:
        raise SharedError(
            f"guard.max_skipped_steps: the last {streak.skipped} steps were dropped, each for a gradient that was not "
            "finite or a loss that leapt, and there is no checkpoint to go back to that would help; lower "
            f"optimizer.lr, or look at the samples in {config.run_dir / SKIPPED}"
        )
    then = phase_of(job.programme.phases, found.step).config.ema  # whose averages may have other decays
    load(job.engine, found, job.world, ema_names(then.decays, then.sigma_rels))
    if job.world.is_main:
        checkpoints.discard_after(snapshots_dir(config.run_dir), found.step)
    log.error("step %d: back to the weights of %s; the data goes on", done, found.path)


def load(engine: Engine, found: checkpoints.Checkpoint, world: World, averages: Sequence[str] = ()) -> None:
    """Weights, moments and averages of a checkpoint that fits.

    Args:
        engine: takes them.
        found: holds them.
        world: of the engine.
        averages: names that the engine's averages, in order, have there; none are the same names.

    Raises:
        SharedError: a rank could not read its part.
    """
    names = dict(zip(engine.optimizer.averages, averages or engine.optimizer.averages, strict=True))
    everywhere(lambda: checkpoints.restore(found, engine.pieces(), names), world.device)
    engine.updates = found.index["updates"]
    engine.refresh()


def wait_for_save(job: Job) -> None:
    """Let a save that is being written end; one that has failed is reported, and the run goes on without it."""
    try:
        job.saver.wait()
    except SaveError as error:
        if job.world.is_main:
            log.error("%s; the run goes on", error)
