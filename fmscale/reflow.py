"""A trained run -> (noise, latent) pairs, in the same indexed shards; `train` takes them with flow.coupling=paired.

Work is shared as in `encode`: units, each so many pairs, which any number of workers claim (unfinished). A pair is a
function of the config and its number, to the byte on equal hardware with as many threads: its noise is not stored but
named, by a key from which `draw_noise` makes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fmscale.config import ReflowConfig
from fmscale.data import reasons
from fmscale.data.buckets import grouped
from fmscale.data.index import Index
from fmscale.data.shards import ShardWriter
from fmscale.data.tar import DamageError
from fmscale.distributed import world_from_environment
from fmscale.encode import interruptible
from fmscale.features import STORAGE
from fmscale.flow.coupling import NOISE_KEY
from fmscale.log import get_logger, progress
from fmscale.runs import Run
from fmscale.teacher import Caption, Captions, Teacher, check_drawing, identity, open_captions, open_teacher, unit_names
from fmscale.unfinished import Outcome, check_same, clear_up, is_finished, open_job, read_manifest, tally

log = get_logger(__name__)
# Settings that may differ among workers, and when the work is taken up again.
FREE = {"out", "claim_timeout_s", "text_encoders", "rounds", "student"}


class Plan(NamedTuple):
    """What there is to do.

    Attributes:
        run: whose weights generate.
        captions: to generate for.
        units: names of the pieces of work.
        description: of the pairs.
    """

    run: Run
    captions: Captions
    units: list[str]
    description: dict[str, Any]


def reflow(config: ReflowConfig, allow_pipe: bool = False) -> Index:
    """Generate pairs with a run's averaged weights, alone or beside others who do the same, or go on where it was left.

    Args:
        config: teacher, captions, solver, and where to write.
        allow_pipe: programs that it names may be started.

    Returns:
        The index of the pairs, once every unit is done, by whomever.

    Raises:
        UserError: teacher or captions cannot be used, or `out` holds something else or was begun otherwise.

    Source: Liu et al. 2022, arXiv:2209.03003, sec. 2.2.
    """
    plan = check_setup(config, allow_pipe)
    if not is_finished(config.out):
        with interruptible():
            take_part(config, plan)
    clear_up(config.out)
    index = Index.open(config.out)
    if world_from_environment().is_main:
        log.info("%s: %s pairs", config.out, f"{len(index):,}")
        if skipped := read_manifest(config.out)["failures"]:
            log.warning("%d captions were skipped (%s)", sum(skipped.values()), tally(skipped))
    return index


def check_setup(config: ReflowConfig, allow_pipe: bool = False) -> Plan:
    """Find out what there is to do, before anything is made.

    Raises:
        UserError: what of `reflow`'s can be known so early.
    """
    run = open_teacher(config)
    captions = open_captions(config, run, allow_pipe)
    settings = config.model_dump(mode="json", exclude=FREE)
    settings["teacher"] = str(Path(config.teacher).absolute())
    settings |= captions.settings  # what is in them, wherever they are
    check_drawing(config, run, captions)
    units = unit_names(captions.pairs, config.shard_samples)
    description = {"config": settings, "units": units, "teacher": identity(config, run)}
    check_same(config.out, description)
    return Plan(run, captions, units, description)


def take_part(config: ReflowConfig, plan: Plan) -> None:
    """Generate units until all are done, by whomever, and see to it that the dataset is put in place."""
    teacher = Teacher(config, plan.run, plan.captions)
    made_by = {**plan.run.made_by, "program": "fmscale reflow", "teacher": plan.description["teacher"]}
    made_by |= {"text_online": config.text == "captions"}
    with open_job(config.out, plan.description, config.claim_timeout_s) as job, progress("") as bar:
        task = bar.add_task("reflow", total=plan.captions.pairs)
        for unit in job.claimed():
            with job.attempt(unit) as folder:
                job.commit(unit, folder, make_unit(config, plan.captions, teacher, unit, folder))
            bar.update(task, completed=min(job.done * config.shard_samples, plan.captions.pairs))
        job.finish(lambda: stored_null(teacher), made_by, lambda facts: {"pairs": facts.get("pairs", 0)})


def make_unit(config: ReflowConfig, captions: Captions, teacher: Teacher, unit: str, folder: Path) -> Outcome:
    """Write the pairs of a unit: a function of its name alone."""
    outcome, first = Outcome(facts={"pairs": 0}), int(unit) * config.shard_samples
    numbers = range(first, min(first + config.shard_samples, captions.pairs))
    with ShardWriter(folder, prefix=f"{unit}-", samples_per_shard=config.shard_samples) as writer:
        for batch in grouped(_sound(captions, numbers, outcome), lambda caption: caption.size, config.batch):
            latents, text = teacher.draw(batch)
            for row, (caption, tokens) in enumerate(zip(batch, teacher.tokens(batch), strict=True)):
                key = f"pair{caption.number:09d}"
                if not bool(torch.isfinite(latents[row]).all()):
                    _skip(outcome, key, reasons.NOT_FINITE)
                    continue
                meta: dict[str, Any] = {"caption": caption.words, NOISE_KEY: list(caption.noise_key)}
                tensors = {name: value[row] for name, value in text.items()}
                writer.write(key, {"latents": latents[row], **tensors}, meta | ({"tokens": tokens} if tokens else {}))
                outcome.facts["pairs"] += 1
    return outcome


def _sound(captions: Captions, numbers: range, outcome: Outcome) -> Iterator[Caption]:
    """The captions that can be read; of the others the outcome is told."""
    for number in numbers:
        try:
            yield captions.by_number.read(number)
        except DamageError as error:
            _skip(outcome, f"pair{number:09d}", reasons.BROKEN, str(error))


def _skip(outcome: Outcome, key: str, reason: str, detail: str = "") -> None:
    log.warning("skipped %s: %s", key, f"{reason}: {detail}" if detail else reason)
    outcome.failures.append({"key": key, "reason": reason, "detail": detail})


def stored_null(teacher: Teacher) -> Mapping[str, torch.Tensor]:
    """The features of the empty caption, as the pairs' dataset holds them."""
    return {name: value.to(STORAGE["fp32"]) for name, value in teacher.null.items()}
