"""Nodes go away, with a bang or in silence, and other numbers of them come back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm.cluster import Cluster, wait_until
from slurm.conftest import Submitted, losses

from fmscale.config import TrainConfig
from fmscale.engine.checkpoint import find_all, open_checkpoint, verify

SLOW = ("steps=120", "micro_batch=1", "log.every_steps=1")
NOTICED_S = 120  # by when Slurm has given a node up and started the job elsewhere


@pytest.fixture
def start(
    make_config: Callable[..., TrainConfig], tmp_path: Path, submit: Callable[..., Submitted]
) -> Callable[..., Submitted]:
    """Submits the slow run, which saves every ten steps; overrides of the site."""
    return lambda *site: submit(make_config(tmp_path / "run", *SLOW, "checkpoint.every_steps=10"), *site)


def check_it_is_the_same_run(job: Submitted, undisturbed: Callable[..., dict[int, float]]) -> None:
    """The same losses, each step once, and nothing in the run directory that is not whole."""
    assert losses(job.run_dir) == undisturbed(*SLOW, "checkpoint.every_steps=1000")
    folders = find_all(job.run_dir / "checkpoints")
    assert folders[-1].name == "step-00000120"
    assert {entry.name for entry in (job.run_dir / "checkpoints").iterdir()} == {folder.name for folder in folders}
    for folder in folders:
        verify(open_checkpoint(folder))


def test_power_cut(
    cluster: Cluster, start: Callable[..., Submitted], undisturbed: Callable[..., dict[int, float]]
) -> None:
    job = start()
    job.wait_for("step 15", lambda: job.steps() >= 15)
    node = "n2" if job.told()["BatchHost"] == "n1" else "n3"
    cluster.cut_power(node)
    try:
        wait_until(lambda: job.restarts() >= 1, "the job's return", NOTICED_S)
        job.wait_for_end()
    finally:
        cluster.power_on(node)
        wait_until(lambda: cluster.states()[node] == "idle", "the node's return")
    resumed = re.findall(r"^run .* steps (\d+) to 120$", job.log(), flags=re.MULTILINE)
    assert resumed[0] == "0"
    assert int(resumed[-1]) >= 10
    check_it_is_the_same_run(job, undisturbed)


def test_a_rank_that_is_left_behind_cannot_write(
    cluster: Cluster, start: Callable[..., Submitted], undisturbed: Callable[..., dict[int, float]]
) -> None:
    """All ranks of a job train on, on a node that Slurm has given up and a disk that they share with the next start."""
    job = start("site.nodes=1", "site.tasks_per_node=4")
    job.wait_for("step 15", lambda: job.steps() >= 15)
    node, left_behind = job.told()["BatchHost"], job.processes(0)
    cluster.cut_link(node)
    try:
        wait_until(lambda: job.told()["BatchHost"] not in (node, "") and job.restarts() == 1, "the return", NOTICED_S)
        assert job.processes(0)[0] == left_behind[0], "nobody was left behind"
        wait_until(lambda: "so this start of it writes no more" in job.log(), "the fence", NOTICED_S)
        job.wait_for_end()
    finally:
        cluster.mend_link(node)
        wait_until(lambda: cluster.states()[node] == "idle", "the node's return", 120)
    assert job.restarts() == 1
    check_it_is_the_same_run(job, undisturbed)


@pytest.mark.parametrize(("nodes", "tasks"), [(1, 2), (2, 3)])
def test_another_world(
    nodes: int,
    tasks: int,
    cluster: Cluster,
    make_config: Callable[..., TrainConfig],
    tmp_path: Path,
    submit: Callable[..., Submitted],
    undisturbed: Callable[..., dict[int, float]],
) -> None:
    short = ("steps=16", "log.every_steps=1")
    submit(make_config(tmp_path / "run", "steps=8", "log.every_steps=1")).wait_for_end()
    job = submit(make_config(tmp_path / "run", *short), f"site.nodes={nodes}", f"site.tasks_per_node={tasks}")
    job.wait_for_end()
    assert f"{nodes * tasks} ranks" in job.log()
    ours, theirs = losses(job.run_dir), undisturbed(*short)
    worst = max(abs(ours[step] - theirs[step]) / theirs[step] for step in theirs)
    print(f"losses on {nodes} x {tasks} ranks differ by at most {worst:.1e}")
    assert len(ours) == 16
    assert worst <= 1e-5
    index = json.loads((job.run_dir / "checkpoints" / "step-00000016" / "index.json").read_text())
    assert index["world_size"] == nodes * tasks
