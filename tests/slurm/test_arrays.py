"""Tasks of an array share the work of encoding; one of them is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from encoding import assert_same, done, make_source, settings
from slurm.cluster import Cluster, wait_until
from slurm.conftest import START_S, Submitted

from fmscale.config import EncodeConfig, load
from fmscale.encode import encode

COMMAND = Callable[..., subprocess.CompletedProcess[str]]


def test_three_tasks_of_which_one_is_killed(cluster: Cluster, site: Path, tmp_path: Path, fmscale: COMMAND) -> None:
    make_source(tmp_path)
    config, *overrides = settings(tmp_path, tmp_path / "whole")
    whole = encode(load(EncodeConfig, Path(config), overrides))
    out = tmp_path / "array"
    words = settings(tmp_path, out, "workers=0", "claim_timeout_s=5")
    submitted = fmscale("submit", "encode", *words, "--site", site, "--workers", "3", "--at-once", "2")
    assert submitted.returncode == 0, submitted.stderr
    (record,) = [json.loads(file.read_text()) for file in (out / "slurm").glob("*/job.json")]
    array = str(record["job"])
    assert "ArrayTaskThrottle=2" in cluster("scontrol", "show", "job", "-o", array)
    try:
        tasks: dict[str, Submitted] = {}

        def found() -> bool:
            shown = cluster("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%K %A", "--jobs", array)
            tasks.update({line.split()[0]: Submitted(cluster, out, line.split()[1]) for line in shown.splitlines()})
            return any(task.processes(0) for task in tasks.values())

        wait_until(found, "the first worker", START_S)
        assert len(cluster("squeue", "--noheader", "--states=RUNNING", "--jobs", array).splitlines()) <= 2
        victim = next(task for task in tasks.values() if task.processes(0))
        process = victim.processes(0)[0]
        wait_until(lambda: done(out) >= 2, "the first units", START_S, every_s=0.01)  # all of them take but seconds
        os.kill(process, signal.SIGKILL)
        wait_until(lambda: not cluster("squeue", "--noheader", "--jobs", array), "the end of the array", 2 * START_S)
        assert victim.restarts() == 1
        assert "== job" in fmscale("logs", out, "--rank", "2").stdout
        states = cluster("sacct", "-X", "-n", "-P", "-o", "State", "-j", array).split()
        assert states == ["COMPLETED"] * 3
    finally:
        subprocess.run(["scancel", array], env=cluster.environment, check=False, capture_output=True)
    assert_same(out, whole)
