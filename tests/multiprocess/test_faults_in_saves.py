"""kill -9, a full disk, a slow rank, at each point of a save: what is left, and whether the run goes on to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from running import environment

from fmscale.config import TrainConfig

PROGRAM = Path(__file__).parent / "faults_in_saves.py"
FAULTS = ("kill -9", "no space", "slow rank")
# The newest whole checkpoint after each fault in the save of step 4, in a run of 6 steps that saves every second one
# and keeps one: a save that came to its rename counts, and the removal of older ones makes room for the next.
NEWEST = {
    "before write": (2, 2, 6),
    "mid-file": (2, 2, 6),
    "after files": (2, 2, 6),
    "after index": (2, 6, 6),
    "after rename": (4, 6, 6),
    "during retention": (4, 6, 6),
    "during background write": (2, 2, 6),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "points", [["mid-file"], pytest.param(list(NEWEST), marks=pytest.mark.slow)], ids=["one point", "every point"]
)
def test_a_run_goes_on_to_the_bit_whatever_met_its_save(
    tmp_path: Path, make_config: Callable[..., TrainConfig], points: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two real ranks, real signals, a real full file system; the second start goes on to step 8."""
    settings = ("global_batch=4", "micro_batch=2", "checkpoint.every_steps=2", "checkpoint.keep=1")
    faults = FAULTS if may_mount() else [fault for fault in FAULTS if fault != "no space"]
    lines = run(make_config(tmp_path / "runs", *settings), faults, points)
    rows = [json.loads(line.removeprefix("ROW ")) for line in lines if line.startswith("ROW ")]
    with capsys.disabled():
        print(f"\n{'fault':10} {'point':24} exit codes  newest whole  resumed at  weights bit-equal")
        for row in rows:
            codes = "{} {}".format(*row["codes"])
            end = f"{row['newest']:12}  {row['resumed'][0]:10}  {'yes' if row['same'] else 'NO'}"
            print(f"{row['fault']:10} {row['point']:24} {codes:10}  {end}")
    assert [(row["point"], row["fault"]) for row in rows] == [(point, fault) for fault in faults for point in points]
    for row in rows:
        check_row(row)
    if faults != FAULTS:
        pytest.skip("rows of 'no space' were not tried: no mount is permitted here; the others have passed")


def may_mount() -> bool:
    """Whether a process may have a mount namespace of its own, with a file system of a few megabytes."""
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def run(config: TrainConfig, faults: Sequence[str], points: Sequence[str]) -> list[str]:
    arguments = [sys.executable, str(PROGRAM), config.model_dump_json(), ",".join(faults), ",".join(points)]
    if "no space" in faults:
        arguments = ["unshare", "--map-root-user", "--mount", *arguments, "--mount"]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    restored = next(line for line in done.stdout.splitlines() if line.startswith("RESTORE "))
    assert json.loads(restored.removeprefix("RESTORE ")) == {
        "codes": [2, 2],
        "complaints": ["fmscale train: rank 1: the disk of one rank hiccups"],
    }
    return done.stdout.splitlines()


def check_row(row: dict) -> None:
    newest = NEWEST[row["point"]][FAULTS.index(row["fault"])]
    assert (row["newest"], row["resumed"], row["same"]) == (newest, [newest], True), row
    assert row["left"] == ["step-00000008"], row  # no debris
    if row["fault"] == "kill -9":
        assert -9 in row["codes"], row
        return
    assert row["codes"] == ([0, 0] if newest == 6 else [2, 2]), row
    said = [line.split(": the checkpoint could not be written: ")[0][-1] for line in row["complaints"]]
    assert said == ([] if newest == 6 else ["4", "6"]), row  # one line for each save that failed, from one rank
