"""A run as a programme: phases, each of which goes on with the settings of the one before, but for what it changes.

    phases: [{until_step: 1000}, {until_step: 2000, data: {path: latents_512}, flow: {shift: 2}}, {data: {…}}]

The values outside are those of the first phase, which may change them too; the last phase ends with the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fmscale.config import TrainConfig, check, merge
from fmscale.engine.schedule import learning_rate
from fmscale.errors import UserError
from fmscale.section import flatten

UNTIL = "until_step"
# Keys that a phase may change, and parts whose every key it may.
PARTS = ("data.", "flow.", "conditioning.", "optimizer.", "ema.", "guard.", "log.", "validation")
KEYS = {
    "global_batch",
    "micro_batch",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.keep_every_steps",
    "engine.attention",
    "engine.recompute",
    "engine.recompute_every",
    "model.base_size",
    "model.position_origin",
    "model.position_step",
}
# Why it may not change the others, by what they begin with.
BUILT_ONCE = {
    "model.": "the network is built once",
    "engine.": "weights, moments and hooks are laid out once",
    "": "it belongs to the run as a whole",
}
READING = {"data.workers", "data.max_bad_fraction", "data.remote", "data.text_encoders", "data.vae"}


class Phase(NamedTuple):
    """Some steps of a run.

    Attributes:
        number: counted from 0.
        start: first step, counted from 0.
        until: steps that are done at its end.
        config: all settings of these steps.
        images_before: images seen before them.
        data_start: first step of the order of its data: phases in a row with the same data and batch share one.
        rate_start: first step of its learning rate's schedule: phases in a row with the same optimizer share one.
        rate_until: steps that are done at the end of that schedule.
    """

    number: int
    start: int
    until: int
    config: TrainConfig
    images_before: int = 0
    data_start: int = 0
    rate_start: int = 0
    rate_until: int = 0

    def images_seen(self, done: int) -> int:
        """Images seen after so many steps, the last of which is in this phase."""
        return self.images_before + (done - self.start) * self.config.global_batch


def phases_of(config: TrainConfig) -> tuple[Phase, ...]:
    """The phases of a run, in order; one where the config names none.

    Raises:
        UserError: steps that do not follow one another, or a key that no phase may change: names phase and key.
    """
    plain = config.model_dump(mode="json")
    phases: list[Phase] = []
    for number, given in enumerate(plain.pop("phases") or [{}]):
        where = f"phases.{number}"
        start = phases[-1].until if phases else 0
        until = _until(given, where, start, config, number == max(len(config.phases), 1) - 1)
        changes = {key: value for key, value in given.items() if key != UNTIL}
        before, plain = plain, merge(plain, changes)
        whole = check(TrainConfig, plain, where)
        if fixed := [key for key in _changed(before, whole) if not _may_change(key)]:
            raise UserError(f"{where}.{fixed[0]}: is the same in all phases, as {_why(fixed[0])}; leave it out there")
        phases.append(_follow(phases, number, start, until, whole))
    if odd := next((phase for phase in phases if _averages(phase) != _averages(phases[0])), None):
        raise UserError(
            f"phases.{odd.number}.ema: keep as many decays ({len(phases[0].config.ema.decays)}) and the same "
            "sigma_rels in all phases, whose averages go on"
        )
    ends = {phase.rate_start: phase.until for phase in phases}
    return tuple(phase._replace(rate_until=ends[phase.rate_start]) for phase in phases)


def _averages(phase: Phase) -> tuple[int, tuple[float, ...]]:
    return len(phase.config.ema.decays), phase.config.ema.sigma_rels


def _until(given: Mapping[str, Any], where: str, start: int, config: TrainConfig, last: bool) -> int:
    until = given.get(UNTIL, config.steps if last else None)
    if not isinstance(until, int) or isinstance(until, bool):
        raise UserError(f"{where}.{UNTIL}: give the steps that are done at its end")
    if until <= start:
        raise UserError(f"{where}.{UNTIL}: {until} is not after {start}, where the phase begins")
    if until > config.steps or (last and until < config.steps):
        raise UserError(f"{where}.{UNTIL}: {until}; the run ends at steps={config.steps}, and with it the last phase")
    return until


def changes(before: TrainConfig, after: TrainConfig) -> list[str]:
    """What one phase does otherwise than another, one text each."""
    old, new = flatten(before), flatten(after)
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]


def _changed(before: Mapping[str, Any], whole: TrainConfig) -> list[str]:
    old, new = flatten(check(TrainConfig, dict(before), "phases")), flatten(whole)
    return [key for key in {**old, **new} if old.get(key) != new.get(key)]


def _may_change(key: str) -> bool:
    return key in KEYS or key.startswith(PARTS)


def _why(key: str) -> str:
    return next(why for part, why in BUILT_ONCE.items() if key.startswith(part))


def _follow(phases: Sequence[Phase], number: int, start: int, until: int, config: TrainConfig) -> Phase:
    if not phases:
        return Phase(number, start, until, config)
    before = phases[-1]
    same_data = _data(before.config) == _data(config)
    same_rate = before.config.optimizer == config.optimizer
    return Phase(
        number,
        start,
        until,
        config,
        before.images_seen(before.until),
        before.data_start if same_data else start,
        before.rate_start if same_rate else start,
    )


def _data(config: TrainConfig) -> dict[str, Any]:
    """What the order of samples follows from."""
    found = {key: value for key, value in flatten(config).items() if key.startswith("data.")}
    kept = {key: value for key, value in found.items() if not any(key.startswith(name) for name in READING)}
    return {**kept, "global_batch": config.global_batch}


def phase_of(phases: Sequence[Phase], done: int) -> Phase:
    """The phase of the last of so many steps that are done; the first where none is."""
    return next((phase for phase in phases if phase.start < done <= phase.until), phases[0] if not done else phases[-1])


def learning_rate_at(phase: Phase, step: int) -> float:
    """The learning rate of a step of a phase, counted from 0."""
    options = phase.config.optimizer
    return learning_rate(
        step - phase.rate_start,
        peak=options.lr,
        warmup_steps=options.warmup_steps,
        schedule=options.schedule,
        decay_steps=options.decay_steps or phase.rate_until - phase.rate_start,
    )
