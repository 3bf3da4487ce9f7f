"""A run is submitted, and is the same run; what is printed for `sbatch` is what it accepts."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm.cluster import Cluster
from slurm.conftest import SITES, Submitted, losses

from fmscale.config import TrainConfig


def test_a_submitted_run_is_the_one_that_local_ranks_train(
    make_config: Callable[..., TrainConfig],
    tmp_path: Path,
    submit: Callable[..., Submitted],
    undisturbed: Callable[..., dict[int, float]],
    fmscale: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    job = submit(make_config(tmp_path / "run"))
    job.wait_for_end()
    assert losses(job.run_dir) == undisturbed()
    assert job.endings() == ["done"]
    assert "done: 8 steps" in fmscale("logs", job.run_dir).stdout
    row = fmscale("status", job.run_dir).stdout.splitlines()[1].split()
    assert row[:4] == [str(job.run_dir), job.job, "COMPLETED", "8/8"]


@pytest.mark.parametrize("path", sorted(SITES.glob("*.yaml")), ids=lambda path: path.stem)
def test_slurm_accepts_what_is_printed_for_each_example_site(
    path: Path,
    cluster: Cluster,
    make_config: Callable[..., TrainConfig],
    tmp_path: Path,
    fmscale: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    from fmscale.config import dump

    config = tmp_path / "train.yaml"
    config.write_text(dump(make_config(tmp_path / "run")))
    printed = fmscale("submit", "train", config, "--site", path, "--dry-run")
    assert printed.returncode == 0, printed.stderr
    assert not (tmp_path / "run").exists()
    script = tmp_path / "job.sh"
    script.write_text(printed.stdout)
    cluster("sbatch", "--test-only", script)
