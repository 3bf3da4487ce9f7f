"""`fmscale submit`: checks, a copy of the code, and a batch script whose last line decides whether the job comes back.

    FOLDER/slurm/DATE-TIME/code/          the package as it was: a job that comes back runs what was submitted
                           COMMAND.yaml   the merged config
                           site.yaml      the merged site file
                           job.sh         the batch script
                           job.json       what Slurm made of it
                           JOB_RANK_log.out

FOLDER is the run directory, or the dataset that is made. Nothing here is pickled; submitit writes the script.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fmscale import config as configs
from fmscale import slurm
from fmscale.beforehand import check_encode, check_reflow, check_train
from fmscale.errors import OutageError, UserError
from fmscale.jobs import MARK, describe, ended, newest_job
from fmscale.log import get_logger
from fmscale.logs import follow
from fmscale.plan import tell
from fmscale.requeue import OPENING
from fmscale.runs import git_hash
from fmscale.section import dump
from fmscale.site import Site, processes_per_node
from fmscale.starts import STOP

log = get_logger(__name__)
MAIN = """from fmscale.__main__ import main

if __name__ == "__main__":
    main()
"""
FLAGS = {"encode": set[str](), "reflow": {"--allow-pipe"}}  # that a command takes; `train` takes all
UNCERTAIN = ("timed out", "no answer")  # then Slurm may have taken the job all the same
WAIT_S = 10  # from the end of a rank to that of the others, which name it meanwhile


class Order(NamedTuple):
    """What is to be submitted.

    Attributes:
        command: `train`, `encode` or `reflow`.
        config: of the command.
        site: where it runs.
        flags: of the command, such as `--allow-append`.
        workers: tasks of an array that share the work; None for one job.
        at_once: most of them that run at the same time; None for all.
    """

    command: str
    config: Any
    site: Site
    flags: Sequence[str] = ()
    workers: int | None = None
    at_once: int | None = None

    @property
    def folder(self) -> Path:
        """What the work is about: the run directory, or the dataset that is made."""
        folder: Path = self.config.run_dir if self.command == "train" else self.config.out
        return folder.absolute()


def read_order(command: str, config: str, site: str, overrides: Sequence[str], **more: Any) -> Order:
    """What a command line asks for.

    Args:
        command: `train`, `encode` or `reflow`.
        config, site: YAML files.
        overrides: `key=value` for the config, `site.key=value` for the site.
        more: the other attributes of `Order`.

    Raises:
        UserError: as `config.load` does.
    """
    for_site = [override.removeprefix("site.") for override in overrides if override.startswith("site.")]
    for_config = [override for override in overrides if not override.startswith("site.")]
    loaded = configs.load(configs.CONFIGS[command], config, for_config)
    return Order(command, loaded, configs.load(Site, site, for_site), **more)


def submit(order: Order, dry_run: bool = False, then_follow: bool = False) -> int:
    """Check an order and submit it.

    Args:
        order: what to run where.
        dry_run: print the batch script, and write nothing.
        then_follow: show the log of rank 0 until the job has ended.

    Returns:
        Exit code: 0, or that of `follow`.

    Raises:
        UserError: the job could not run; says which key is wrong.
        OutageError: Slurm refuses it, or does not answer.
    """
    check(order)
    if order.command == "train":
        tell(order.config, order.site)
    folder = order.folder / slurm.FOLDER / time.strftime("%Y-%m-%d-%H%M%S")
    script = batch_script(order, folder)
    if dry_run:
        print(script, end="")
        return 0
    if order.command == "train":
        refuse_a_second_job(order.folder)
        (order.folder / STOP).unlink(missing_ok=True)  # it was meant for a job that has ended
    try:
        write(order, folder, script)
        job = slurm.ask("sbatch", "--parsable", str(folder / "job.sh")).strip().partition(";")[0]
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    except OutageError as error:
        if not any(words in str(error) for words in UNCERTAIN):
            shutil.rmtree(folder)  # of what never was
        raise
    facts = {"job": int(job), "command": order.command, "workers": order.workers, "time": time.time()}
    (folder / "job.json").write_text(json.dumps(facts) + "\n")
    log.info("job %s: %s, with logs in %s", job, order.folder, folder)
    return follow(order.folder) if then_follow else 0


def check(order: Order) -> None:
    """Refuse what could not run.

    Raises:
        UserError: says which key, or which argument, is wrong.
    """
    if order.command == "train" and order.workers is not None:
        raise UserError("--workers: only `encode` and `reflow` are shared by an array's tasks; to train set site.nodes")
    if order.at_once is not None and order.workers is None:
        raise UserError("--at-once: says how many of --workers run at the same time; give those too")
    if strange := set(order.flags) - FLAGS.get(order.command, set(order.flags)):
        raise UserError(f"{min(strange)}: is for `train`")
    try:
        if order.command == "train":
            check_train(order.config, order.site, order.flags)
        elif order.command == "reflow":
            check_reflow(order.config, order.site, order.flags)
        else:
            check_encode(order.config, order.site)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be looked at: {error.strerror or error}") from error


def refuse_a_second_job(folder: Path) -> None:
    """Refuse to train where a job does, or will.

    Raises:
        UserError: names it.
        OutageError: Slurm does not answer.
    """
    job = newest_job(folder)
    told = describe(job)
    if "error" in told:
        raise OutageError(told["error"])
    if job and not ended(told["JobState"]):
        raise UserError(
            f"run_dir: {folder} belongs to job {job}, which is {told['JobState']}; `fmscale stop {folder}` ends it"
        )


def write(order: Order, folder: Path, script: str) -> None:
    """Leave everything that the job needs in a new folder, which only the user may read."""
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700)
    package = Path(__file__).parent
    unwritten = shutil.ignore_patterns("*.pyc.*")  # what another process is about to rename
    # With its bytecode: else each rank would compile it anew.
    shutil.copytree(package, folder / "code" / package.name, ignore=unwritten)
    (folder / "code" / "__main__.py").write_text(MAIN)
    (folder / "code" / "commit").write_text(git_hash() or "")
    (folder / f"{order.command}.yaml").write_text(dump(order.config))
    (folder / "site.yaml").write_text(dump(order.site))
    (folder / "job.sh").write_text(script)


def batch_script(order: Order, folder: Path) -> str:
    """What `sbatch` is given.

    Args:
        order: what to run where.
        folder: of this submission.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    site, array = order.site, order.workers is not None
    program = f"{shlex.quote(python(site))} {shlex.quote(str(folder / 'code'))}"
    comes_back = f"{program} requeue {shlex.quote(str(order.folder))}"
    words = [order.command, *order.flags, str(folder / f"{order.command}.yaml")]
    per_node = 1 if array else processes_per_node(site)
    # Ranks wait for one another; workers that share nothing go on where one has ended.
    together = (f"--wait={WAIT_S}",) if order.command == "train" else ("--wait=0",)
    srun = ("--kill-on-bad-exit=0", *together, "--open-mode=append", f"--cpus-per-task={site.cpus_per_task}")
    text: str = _make_sbatch_string(
        command=f"{program} {shlex.join(words)}",
        folder=folder,
        job_name=re.sub(r"[^\w.-]", "_", order.folder.name),
        comment=f"{MARK}{order.folder}",
        partition=site.partition,
        account=site.account,
        qos=site.qos,
        time=site.time_min,
        ntasks_per_node=per_node,
        cpus_per_task=site.cpus_per_task,
        gpus_per_node=min(site.gpus_per_node, per_node) or None,
        mem=None if site.mem_gb is None else f"{round(1024 * site.mem_gb * per_node / processes_per_node(site))}M",
        signal_delay_s=site.signal_delay_s,
        setup=[*setup(site), f"cd {shlex.quote(str(Path.cwd()))} || exec {comes_back} 1"],  # where relative paths start
        teardown=[f"{comes_back} $?"],
        map_count=order.workers,
        array_parallelism=order.at_once or order.workers or 1,
        stderr_to_stdout=True,
        wckey=None,  # type: ignore[arg-type]
        srun_args=[*srun, *site.srun],
        additional_parameters={"nodes": 1 if array else site.nodes, "requeue": True, **more_options(site, array)},
    )
    return f"{text}\n"


def more_options(site: Site, array: bool) -> dict[str, str | int | bool]:
    """The site's own options of sbatch; tasks of an array use a part of a node each, so they share it."""
    given = {name: value for name, value in site.sbatch.items() if value is not False}
    return {name: value for name, value in given.items() if not (array and name == "exclusive")}


def setup(site: Site) -> list[str]:
    """Lines of shell before `srun`."""
    lines = [
        f'echo "{OPENING} $SLURM_JOB_ID, restart ${{SLURM_RESTART_COUNT:-0}}, on $SLURM_JOB_NODELIST"',
        "umask 077",
    ]
    lines += [f"module load {shlex.quote(module)}" for module in site.modules]
    lines += [f"source {shlex.quote(str(site.venv.expanduser() / 'bin' / 'activate'))}"] if site.venv else []
    lines += [f"export {slurm.DELAY}={site.signal_delay_s} OMP_NUM_THREADS={site.cpus_per_task}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    return [*lines, *site.setup]


def python(site: Site) -> str:
    """The interpreter of the nodes."""
    if site.python:
        return os.path.expanduser(site.python)
    return str(site.venv.expanduser() / "bin" / "python") if site.venv else os.path.abspath(sys.executable)
