"""Rounds of reflow: pairs of a teacher, a student that trains on them and is the next teacher; how straight each is.

OUT/round-1/pairs, pairs.yaml    what the teacher made of noise
OUT/round-1/run, train.yaml      the student
OUT/settled.json                 the config that all rounds follow
OUT/rounds.json                  straightness, and the error of few steps, of the teacher and of each student
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmscale.config import ReflowConfig, TrainConfig, check, dump, load, merge
from fmscale.data.index import Index
from fmscale.data.mixture import Mixture
from fmscale.distributed import check_can_spawn, spawn, spawn_workers, world_from_environment
from fmscale.errors import UserError
from fmscale.evaluate import read_pictures
from fmscale.files import replace_text
from fmscale.imported import open_run_or_published
from fmscale.judging import Settings, trace
from fmscale.log import get_logger
from fmscale.pictures import default_solver, guidance_of
from fmscale.reflow import check_setup, reflow
from fmscale.runs import Run, open_run
from fmscale.sample import open_generator
from fmscale.train import train

log = get_logger(__name__)
ROUNDS, SETTLED = "rounds.json", "settled.json"
STEPS, LEAPS, TRACE_STEPS, IMAGES, BATCH = (1, 2, 4, 8, 25), (1, 2, 4, 8), 100, 64, 16


def rounds(config: ReflowConfig, nproc: int = 1, allow_pipe: bool = False) -> list[dict[str, Any]]:
    """Make pairs, train a student on them, measure, and again with the student as teacher; or go on where it was left.

    Args:
        config: teacher, captions, solver, and what the student trains otherwise.
        nproc: local workers, and local ranks that train.
        allow_pipe: programs that the config names may be started.

    Returns:
        What `rounds.json` holds: for the teacher and each student, `run`, `straightness` and `relative_error` by steps.

    Raises:
        UserError: a part refused, or was stopped.

    Source: Liu et al. 2022, arXiv:2209.03003, sec. 2.2.
    """
    assert config.rounds is not None
    if world_from_environment().world_size > 1:
        raise UserError("rounds: start it once, with --nproc N for the ranks of this machine")
    if nproc > 1:
        check_can_spawn(nproc)
    first = part_of(config, 1, config.teacher)
    check(TrainConfig, student_of(config, check_setup(first, allow_pipe).run, 1), "student")
    _settle(config)
    measured, teacher = _read(config.out / ROUNDS), config.teacher
    for number in range(1, config.rounds + 1):
        part = part_of(config, number, teacher)
        log.info("round %d of %d: pairs of %s", number, config.rounds, teacher)
        make_pairs(part, nproc, allow_pipe)
        if number == 1:
            measure(config, measured, teacher, guidance_scale=config.guidance_scale)
        teacher = train_student(config, open_run_or_published(teacher), number, nproc)
        measure(config, measured, teacher, guidance_scale=1.0)  # what guidance did, it has learned
    return measured


def _settle(config: ReflowConfig) -> None:
    """Write down what all rounds do, or refuse to do otherwise than those before; their number may grow.

    Raises:
        UserError: names what differs.
    """
    free = {"rounds", "claim_timeout_s", "text_encoders", "out"}
    now, file = config.model_dump(mode="json", exclude=free), config.out / SETTLED
    if not file.is_file():
        config.out.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(now, indent=1) + "\n")
        return
    before = json.loads(file.read_text())
    if wrong := [key for key in now if now[key] != before.get(key)]:
        was, is_now = json.dumps(before.get(wrong[0])), json.dumps(now[wrong[0]])
        raise UserError(
            f"{config.out}: its rounds were begun with {wrong[0]} {was}, and not {is_now}; give another `out`"
        )


def part_of(config: ReflowConfig, number: int, teacher: Path) -> ReflowConfig:
    """What makes the pairs of a round; each has noise of its own, and only the first is guided."""
    changes: dict[str, Any] = {"teacher": teacher, "out": config.out / f"round-{number}" / "pairs"}
    changes |= {"rounds": None, "student": {}, "seed": config.seed + number - 1}
    if number > 1:
        changes |= {"guidance_scale": 1.0, "ema_std": None, "step": None, "solver": "auto"}
    return config.model_copy(update=changes)


def student_of(config: ReflowConfig, teacher: Run, number: int) -> dict[str, Any]:
    """The training of a round's student: that of the teacher, with what `student` says otherwise.

    Raises:
        UserError: `student` says nothing of steps.
    """
    if "steps" not in config.student:
        raise UserError("student.steps: say for how many steps each round's student trains")
    if unsaid := [key for key in ("global_batch", "micro_batch") if teacher.is_imported and key not in config.student]:
        raise UserError(f"student.{unsaid[0]}: {teacher.path} does not say how it was trained; give that")
    folder = (config.out / f"round-{number}").absolute()
    settings = teacher.config.model_dump(mode="json")
    settings |= {"phases": [], "validation": None, "run_dir": str(folder / "run")}
    settings["data"] |= {"path": str(folder / "pairs"), "mixture": []}
    settings["flow"] |= {"coupling": "paired", "transport": "none"}
    settings["model"] |= {"init_from": str(teacher.path.absolute())}
    return merge(settings, config.student)


def make_pairs(part: ReflowConfig, nproc: int, allow_pipe: bool) -> None:
    """Make the pairs of a round, in this process or in several."""
    file = part.out.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, dump(part))
    if nproc == 1:
        reflow(part, allow_pipe)
    elif code := spawn_workers(["reflow", *(["--allow-pipe"] if allow_pipe else []), str(file)], nproc):
        raise UserError(f"{part.out}: no worker came to its end (exit code {code}); see the lines above")


def train_student(config: ReflowConfig, teacher: Run, number: int, nproc: int) -> Path:
    """Train the student of a round, in this process or on several ranks; returns its run directory."""
    settings = check(TrainConfig, student_of(config, teacher, number), "student")
    file = settings.run_dir.with_name("train.yaml")
    replace_text(file, dump(settings))
    if nproc == 1:
        train(load(TrainConfig, file))
    elif code := spawn(["train", str(file)], nproc):
        raise UserError(f"{file}: training ended with exit code {code}; see the lines above")
    if open_run(settings.run_dir, weights=None).checkpoint.step < settings.steps:
        raise UserError(f"training was stopped; the same command goes on with {settings.run_dir}")
    return settings.run_dir


def measure(config: ReflowConfig, measured: list[dict[str, Any]], run: Path, guidance_scale: float) -> None:
    """Add to what was measured how straight the ways of a run are, and how far few steps lead astray; only once."""
    if any(record["run"] == str(run) for record in measured):
        return
    generator, mixture = open_generator(run), Mixture([Index.open(config.out / "round-1" / "pairs")])
    pictures, _ = read_pictures(mixture, IMAGES)
    solver = default_solver(generator.flow)
    steps = STEPS if generator.flow.objective == "velocity" else LEAPS
    guidance = guidance_of(guidance_scale, generator.takes_guidance)
    traces, _ = trace(generator, mixture, pictures, Settings(steps, solver, guidance, config.seed, BATCH, TRACE_STEPS))
    errors = {number: row["relative_error"] for number, row in traces.by_steps().items()}
    record = {"run": str(run), "straightness": traces.record()["straightness"]["mean"], "relative_error": errors}
    measured.append(record)
    replace_text(config.out / ROUNDS, json.dumps(measured, indent=1) + "\n")
    told = ", ".join(f"{number}: {error:.3f}" for number, error in errors.items())
    log.info("%s: straightness %.4f; relative error by steps %s", run, record["straightness"], told)


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(file.read_text()) if file.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); remove it, and it is measured again") from None
    if not isinstance(found, list) or not all(isinstance(row, Mapping) and "run" in row for row in found):
        raise UserError(f"{file}: is not what rounds are written to; remove it, and they are measured again")
    return found
