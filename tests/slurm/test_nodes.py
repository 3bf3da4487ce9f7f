"""Nodes go away, with a bang or in silence, and other numbers of them come back."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slurm.cluster import Cluster, wait_until
from slurm.conftest import SLOW, START_S, STEPS, Submitted, losses

from fmscale.config import TrainConfig
from fmscale.engine.checkpoint import find_all, open_checkpoint, verify
from fmscale.starts import read

NOTICED_S = 120  # by when Slurm has given a node up, or taken it back


def check_it_is_the_same_run(job: Submitted, undisturbed: Callable[[int], dict[int, float]]) -> None:
    """The same losses, each step once, and nothing in the run directory that is not whole."""
    assert losses(job.run_dir) == undisturbed(STEPS)
    folders = find_all(job.run_dir / "checkpoints")
    assert folders[-1].name == f"step-{STEPS:08d}"
    assert {entry.name for entry in (job.run_dir / "checkpoints").iterdir()} == {folder.name for folder in folders}
    for folder in folders:
        verify(open_checkpoint(folder))


def test_power_cut(
    cluster: Cluster, start: Callable[..., Submitted], undisturbed: Callable[[int], dict[int, float]]
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
    resumed = re.findall(rf"^run .* steps (\d+) to {STEPS}$", job.log(), flags=re.MULTILINE)
    assert resumed[0] == "0"
    assert int(resumed[-1]) >= 10
    check_it_is_the_same_run(job, undisturbed)


def test_a_rank_that_is_left_behind_cannot_write(
    cluster: Cluster, start: Callable[..., Submitted], undisturbed: Callable[[int], dict[int, float]]
) -> None:
    """All ranks of a job wake on a node that Slurm has given up, with a disk that they share with the next start."""
    job = start("site.nodes=1", "site.tasks_per_node=4")
    job.wait_for("step 15", lambda: job.steps() >= 15)
    node, left_behind = job.told()["BatchHost"], [job.processes(rank)[0] for rank in range(4)]
    cluster.cut_link(node)
    for process in left_behind:
        os.kill(process, signal.SIGSTOP)
    try:
        wait_until(lambda: len(began(job)) == 2, "the job's return", NOTICED_S + START_S)
        assert job.told()["BatchHost"] != node
        for process in left_behind:
            os.kill(process, signal.SIGCONT)
        wait_until(lambda: "so this start of it writes no more" in job.log(), "the fence", START_S)
        job.wait_for_end()
    finally:
        cluster.mend_link(node)
        wait_until(lambda: cluster.states()[node] == "idle", "the node's return", NOTICED_S)
    assert job.restarts() == 1
    assert not any(Path(f"/proc/{process}").exists() for process in left_behind)
    check_it_is_the_same_run(job, undisturbed)


def test_a_range_of_nodes(
    cluster: Cluster, start: Callable[..., Submitted], undisturbed: Callable[[int], dict[int, float]]
) -> None:
    cluster("scontrol", "update", "NodeName=n2,n3", "State=DRAIN", "Reason=test")
    try:
        job = start("site.nodes=1-2")
        job.wait_for("step 15", lambda: job.steps() >= 15)
    finally:
        cluster("scontrol", "update", "NodeName=n2,n3", "State=RESUME")
    cluster("scancel", "--signal=USR2", job.job)
    job.wait_for_end()
    assert [record["ranks"] for record in began(job)] == [2, 4]
    ours, theirs = losses(job.run_dir), undisturbed(STEPS)
    assert max(abs(ours[step] - theirs[step]) / theirs[step] for step in theirs) <= 1e-5


def began(job: Submitted) -> list[dict[str, Any]]:
    """The starts of a run."""
    return [record for record in read(job.run_dir) if "began" in record]


def test_another_world(
    cluster: Cluster,
    make_config: Callable[..., TrainConfig],
    tmp_path: Path,
    submit: Callable[..., Submitted],
    undisturbed: Callable[[int], dict[int, float]],
) -> None:
    nodes, tasks = 2, 3
    submit(make_config(tmp_path / "run", *SLOW, "steps=8")).wait_for_end()
    job = submit(
        make_config(tmp_path / "run", *SLOW, "steps=16"), f"site.nodes={nodes}", f"site.tasks_per_node={tasks}"
    )
    job.wait_for_end()
    assert f"{nodes * tasks} ranks" in job.log()
    ours, theirs = losses(job.run_dir), undisturbed(16)
    worst = max(abs(ours[step] - theirs[step]) / theirs[step] for step in theirs)
    print(f"losses on {nodes} x {tasks} ranks differ by at most {worst:.1e}")
    assert len(ours) == 16
    assert worst <= 1e-5
    index = json.loads((job.run_dir / "checkpoints" / "step-00000016" / "index.json").read_text())
    assert index["world_size"] == nodes * tasks
