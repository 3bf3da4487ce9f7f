"""A Slurm of three nodes for all tests of this folder, and what they do with it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from slurm.cluster import Cluster, missing, wait_until

from fmscale.config import TrainConfig, dump
from fmscale.starts import read

STEPS = 40
SLOW = ("micro_batch=1", "log.every_steps=1")  # a few steps a second
SAVING = (*SLOW, f"steps={STEPS}", "checkpoint.every_steps=10")
START_S = 600  # four ranks import what they need on two cores, which may have other work
SITES = Path(__file__).parents[2] / "launch" / "sites"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="fm", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # munged wants to be reached by everybody
        cluster = Cluster(Path(folder), 3, {"main": 10, "low": 1, "high": 20, "gpu": 10})
        try:
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Two nodes of two tasks."""
    path = tmp_path / "site.yaml"
    path.write_text("nodes: 2\ntasks_per_node: 2\ncpus_per_task: 1\ntime_min: 30\n")
    return path


class Submitted(NamedTuple):
    """A job that was submitted.

    Attributes:
        cluster: it is on.
        run_dir: of the run.
        job: its number.
    """

    cluster: Cluster
    run_dir: Path
    job: str

    def told(self) -> dict[str, str]:
        """What Slurm says of it."""
        return dict(
            word.partition("=")[::2] for word in self.cluster("scontrol", "show", "job", "-o", self.job).split()
        )

    def state(self) -> str:
        return self.told()["JobState"]

    def restarts(self) -> int:
        return int(self.told()["Restarts"])

    def steps(self) -> int:
        """Lines of metrics.jsonl."""
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    def log(self, rank: int = 0) -> str:
        """What a rank has printed so far."""
        return "".join(path.read_text() for path in (self.run_dir / "slurm").glob(f"*/{self.job}_{rank}_log.out"))

    def processes(self, rank: int) -> list[int]:
        """A rank, as this machine numbers its processes, and those that it has started."""
        found = []
        for folder in Path("/proc").glob("[1-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_bytes()
            except (OSError, NotADirectoryError):
                continue
            wanted = {f"SLURM_JOB_ID={self.job}".encode(), f"SLURM_PROCID={rank}".encode()}
            if wanted <= set(variables) and b"/code\0" in command and not command.startswith(b"srun"):
                found.append(int(folder.name))
        return sorted(found)

    def wait_for(self, what: str, reached: Callable[[], bool], seconds: float = START_S) -> None:
        """Wait for something that the job does before it ends."""

        def look() -> bool:
            state = self.state()
            if reached():
                return True
            assert state not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), state
            return False

        try:
            wait_until(look, what, seconds)
        except AssertionError as error:
            logs = "\n".join(f"rank {rank}:\n{self.log(rank)}" for rank in range(4))
            raise AssertionError(f"{error}\n{logs}\n{self.told()}") from None

    def wait_for_end(self, state: str = "COMPLETED", seconds: float = 2 * START_S) -> None:
        self.wait_for(state, lambda: self.state() == state, seconds)

    def endings(self) -> list[str]:
        """How each start of the run has ended, as it says itself."""
        return [record["how"] for record in read(self.run_dir) if "ended" in record]


@pytest.fixture
def fmscale(cluster: Cluster) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command of fmscale where the cluster's users log in."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fmscale", *map(str, arguments)]
        return subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=START_S)

    return run


@pytest.fixture
def submit(
    cluster: Cluster, site: Path, fmscale: Callable[..., subprocess.CompletedProcess[str]]
) -> Iterator[Callable[..., Submitted]]:
    """Submits a training; overrides as on the command line. What still runs when a test ends is cancelled."""
    submitted: list[Submitted] = []

    def run(config: TrainConfig, *overrides: str) -> Submitted:
        path = config.run_dir.with_suffix(".yaml")
        path.write_text(dump(config))
        done = fmscale("submit", "train", path, "--site", site, *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
        newest = max((config.run_dir / "slurm").glob("*/job.json"))
        submitted.append(Submitted(cluster, config.run_dir, str(json.loads(newest.read_text())["job"])))
        return submitted[-1]

    yield run
    for one in submitted:
        cluster("scancel", one.job)
        wait_until(lambda one=one: one.state() not in ("RUNNING", "COMPLETING", "PENDING"), "the end of a job")


@pytest.fixture
def start(
    make_config: Callable[..., TrainConfig], tmp_path: Path, submit: Callable[..., Submitted]
) -> Callable[..., Submitted]:
    """Submits the slow run, which saves every ten steps; overrides of the site."""
    return lambda *site: submit(make_config(tmp_path / "run", *SAVING), *site)


@pytest.fixture(scope="session")
def undisturbed(
    make_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[int, float]]:
    """Losses of so many steps of the slow run, on four local ranks that nobody disturbs."""
    known: dict[int, float] = {}

    def run(steps: int) -> dict[int, float]:
        if steps > len(known):
            slow = (f"steps={max(steps, STEPS)}", *SLOW, "checkpoint.every_steps=1000")
            config = make_config(tmp_path_factory.mktemp("undisturbed") / "run", *slow)
            path = config.run_dir.with_suffix(".yaml")
            path.write_text(dump(config))
            command = [sys.executable, "-m", "fmscale", "train", str(path), "--nproc", "4"]
            subprocess.run(command, check=True, timeout=2 * START_S)
            known.update(losses(config.run_dir))
        return {step: known[step] for step in range(1, steps + 1)}

    return run


def losses(run_dir: Path) -> dict[int, float]:
    """A run's losses by step, each of which must stand there once and in order."""
    records: list[dict[str, Any]] = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return {record["step"]: record["loss"] for record in records}
