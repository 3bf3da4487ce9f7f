"""A run is submitted, and is the same run; what is printed for `sbatch` is what it accepts."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm.cluster import Cluster
from slurm.conftest import SITES, SLOW, Submitted, losses

from fmscale.config import TrainConfig, dump
from fmscale.starts import read


def test_a_submitted_run_is_the_one_that_local_ranks_train(
    cluster: Cluster,
    make_config: Callable[..., TrainConfig],
    tmp_path: Path,
    site: Path,
    undisturbed: Callable[[int], dict[int, float]],
    fmscale: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    config = make_config(tmp_path / "run", *SLOW)
    path = tmp_path / "train.yaml"
    path.write_text(dump(config))
    followed = fmscale("submit", "train", path, "--site", site, "--follow")
    assert followed.returncode == 0, followed.stderr
    (start,) = [record for record in read(config.run_dir) if "began" in record]
    job = Submitted(cluster, config.run_dir, str(start["job"]))
    assert job.endings() == ["done"]
    assert losses(config.run_dir) == undisturbed(8)
    assert "step 8 of 8" in followed.stdout
    assert followed.stdout == fmscale("logs", config.run_dir).stdout
    assert f"job {job.job}: COMPLETED" in followed.stderr
    row = fmscale("status", config.run_dir).stdout.splitlines()[1].split()
    assert row[:4] == [str(config.run_dir), job.job, "COMPLETED", "8/8"]


def test_a_run_that_a_job_has_is_not_given_to_another(
    cluster: Cluster,
    make_config: Callable[..., TrainConfig],
    tmp_path: Path,
    site: Path,
    fmscale: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    config = make_config(tmp_path / "run")
    path = tmp_path / "train.yaml"
    path.write_text(dump(config))
    command = ("submit", "train", path, "--site", site)
    refused = fmscale(*command, "site.partition=nowhere")
    assert refused.returncode == 1
    assert "invalid partition" in refused.stderr
    assert list((config.run_dir / "slurm").iterdir()) == [], "something is left of what Slurm refused"
    assert fmscale(*command, "site.sbatch={begin: now+1hour}").returncode == 0
    second = fmscale(*command)
    assert second.returncode == 2
    assert re.search(r"belongs to job \d+, which is PENDING; `fmscale stop", second.stderr)
    assert "is cancelled" in fmscale("stop", config.run_dir).stderr
    assert "nothing to stop" in fmscale("stop", config.run_dir).stderr


@pytest.mark.parametrize("path", sorted(SITES.glob("*.yaml")), ids=lambda path: path.stem)
def test_slurm_accepts_what_is_printed_for_each_example_site(
    path: Path,
    cluster: Cluster,
    make_config: Callable[..., TrainConfig],
    tmp_path: Path,
    fmscale: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(dump(make_config(tmp_path / "run")))
    printed = fmscale("submit", "train", config, "--site", path, "--dry-run")
    assert printed.returncode == 0, printed.stderr
    assert not (tmp_path / "run").exists()
    script = tmp_path / "job.sh"
    script.write_text(printed.stdout)
    cluster("sbatch", "--test-only", script)
