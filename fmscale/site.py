"""A site file: where a command runs on a Slurm cluster. What runs is another file's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from fmscale.section import Section

Positive = Annotated[int, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
Option = Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")]
Nodes = Annotated[
    str,
    BeforeValidator(lambda given: str(given) if isinstance(given, int) else given),
    Field(pattern=r"^[1-9]\d*(-[1-9]\d*)?$"),
]
# Options of sbatch that are keys here, or that a job which comes back depends on.
OURS = {
    *("partition", "account", "qos", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem"),
    *("time", "signal", "array", "requeue", "no-requeue", "output", "error", "open-mode", "chdir", "job-name"),
    *("comment", "wckey"),
}


class Site(Section):
    partition: Text | None = None
    """Slurm's partition; null is the cluster's default, as for the two keys below."""
    account: Text | None = None
    qos: Text | None = None
    nodes: Nodes = "1"
    """So many, or a range such as 2-4: a job that comes back may get another number, and goes on all the same."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """One process runs per GPU."""
    device: Text | None = None
    """What these are, such as h100: then `submit` says what `plan` finds. null says no figures."""
    tasks_per_node: Positive | None = None
    """Processes on a node without GPUs; null is 1."""
    cpus_per_task: Positive = 1
    """Cores of each process: one for itself, one for each of data.workers."""
    mem_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of a node; null is the cluster's default."""
    time_min: Positive
    """Time limit of each start of the job, in minutes."""
    signal_delay_s: Annotated[int, Field(ge=30, le=65535)] = 90
    """So long before the time limit Slurm sends USR2, and the job saves, ends and is requeued."""
    write_gb_per_s: Annotated[float, Field(gt=0)] = 1.0
    """What the disk of the run directory takes from all ranks together; tells whether a save fits into the delay."""
    python: Text | None = None
    """Python on the nodes; null is the one that submits, or that of `venv`."""
    modules: tuple[Text, ...] = ()
    """Loaded by `module load` before anything else."""
    venv: Path | None = None
    """Folder of a virtual environment that is activated."""
    environment: dict[Variable, str] = Field(default={})
    """Variables of the job, such as NCCL_SOCKET_IFNAME."""
    setup: tuple[Text, ...] = ()
    """More lines of shell, which run once, on the job's first node."""
    srun: tuple[Text, ...] = ()
    """More arguments of srun."""
    sbatch: dict[Option, str | int | bool] = Field(default={})
    """More options of sbatch, without dashes: `constraint: h100`, `exclusive: true`; those with a key here are not."""

    @model_validator(mode="after")
    def _one_way_to_count_processes(self) -> Site:
        if self.gpus_per_node and self.tasks_per_node:
            raise ValueError("`tasks_per_node` is for nodes without GPUs: there is one process per GPU")
        low, _, high = self.nodes.partition("-")
        if high and int(high) < int(low):
            raise ValueError("`nodes` is a range from few to many")
        return self

    @model_validator(mode="after")
    def _fit_for_a_script(self) -> Site:
        if taken := sorted(OURS & self.sbatch.keys()):
            raise ValueError(
                f"`sbatch` may not hold {', '.join(taken)}: use the site's own keys, as far as there are any"
            )
        if odd := [text for text in _texts(self.model_dump(exclude={"setup"})) if not text.isprintable()]:
            raise ValueError(f"{odd[0]!r} holds a line break or another character that cannot be printed")
        return self


def _texts(value: Any) -> Iterator[str]:
    """Every text within a value, paths too."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _texts(part)


def processes_per_node(site: Site) -> int:
    """Ranks on each node."""
    return site.gpus_per_node or site.tasks_per_node or 1


def worlds(site: Site) -> tuple[int, int]:
    """The least and the most ranks that a job may get."""
    low, _, high = site.nodes.partition("-")
    return int(low) * processes_per_node(site), int(high or low) * processes_per_node(site)
