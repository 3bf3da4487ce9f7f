"""The same without submitit: `sbatch launch/sbatch.sh`, and `srun` within an allocation."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm.cluster import Cluster, wait_until
from slurm.conftest import SLOW, START_S, Submitted, losses

from fmscale.config import TrainConfig, dump
from fmscale.starts import read

ROOT = Path(__file__).parents[2]
WORLD = ("--nodes=2", "--ntasks-per-node=2")


@pytest.fixture
def by_hand(cluster: Cluster) -> Iterator[Callable[..., Submitted]]:
    jobs = []

    def run(config: TrainConfig) -> Submitted:
        path = config.run_dir.with_suffix(".yaml")
        path.write_text(dump(config))
        log = f"--output={config.run_dir.parent}/log.txt"
        jobs.append(cluster("sbatch", "--parsable", *WORLD, log, ROOT / "launch" / "sbatch.sh", path))
        return Submitted(cluster, config.run_dir, jobs[-1])

    yield run
    for job in jobs:
        cluster("scancel", job)


def test_the_script_leaves_and_comes_back_too(
    cluster: Cluster,
    by_hand: Callable[..., Submitted],
    make_config: Callable[..., TrainConfig],
    tmp_path: Path,
    undisturbed: Callable[[int], dict[int, float]],
) -> None:
    job = by_hand(make_config(tmp_path / "run", *SLOW, "steps=40", "checkpoint.every_steps=1000"))
    job.wait_for("step 20", lambda: job.steps() >= 20)
    cluster("scancel", "--signal=USR2", job.job)
    job.wait_for_end()
    assert (job.restarts(), job.endings()) == (1, ["left", "done"])
    assert f"== job {job.job} left as asked; requeued" in (tmp_path / "log.txt").read_text()
    assert losses(job.run_dir) == undisturbed(40)


def test_ranks_of_srun_find_one_another(
    cluster: Cluster,
    make_config: Callable[..., TrainConfig],
    tmp_path: Path,
    undisturbed: Callable[[int], dict[int, float]],
) -> None:
    config = make_config(tmp_path / "run", *SLOW)
    path = tmp_path / "run.yaml"
    path.write_text(dump(config))
    command = ["salloc", *WORLD, "srun", sys.executable, "-m", "fmscale", "train", str(path)]
    subprocess.run(command, env=cluster.environment, check=True, timeout=START_S, capture_output=True)
    assert losses(config.run_dir) == undisturbed(8)
    assert [record["ranks"] for record in read(config.run_dir) if "began" in record] == [4]
    assert list((config.run_dir / "slurm").iterdir()) == [], "the address is of no use once they have met"
    wait_until(lambda: cluster("squeue", "--noheader") == "", "the end of the allocation")
