"""`fmscale doctor`: a real run here, and real conditions under which a check has to fail."""

from __future__ import annotations

import ast
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from crashing import crash

from fmscale import checks, doctor
from fmscale.checks import FAILURE, OK, WARNING, Finding
from fmscale.cli import main
from fmscale.doctor import CHECKS, Check, examine

PACKAGE = Path(doctor.__file__).parent
TABLE = {check.name: check for check in CHECKS}
SECOND_RANK = "all_reduce(1"
PATIENCE_S = 120
ON_DISK = ("free space", "writing", "renaming", "locking")


def only(check: Check, folder: Path) -> Finding:
    """The one row of a check that was really made, in a process of its own."""
    (finding,) = examine(check, folder)
    return finding


@contextmanager
def limited(what: int, most: int) -> Iterator[None]:
    """A limit of the system, which processes that are started inherit."""
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


def processes(text: str) -> list[int]:
    """Every process whose command line holds a text."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and text in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


@pytest.mark.slow
def test_a_whole_run_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["failures"] == 0
    rows = {row["check"]: Finding(**row) for row in said["findings"]}
    assert len(rows) == len(said["findings"]) > 30
    assert all(bool(row.remedy) == (row.verdict != OK) for row in rows.values())
    assert rows["python"].found == ".".join(map(str, sys.version_info[:3]))
    assert rows["imports"].found.startswith(f"all {len(checks.IMPORTS)} load")
    assert rows["gloo, 2 processes"].found.startswith("all-reduce of 16 MiB in ")
    assert rows["renaming"].found == "20 files replaced at once"
    assert rows["locking"].found == "a lock keeps others out"
    assert not any(tmp_path.iterdir())


def test_the_table_and_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in place of the folder: its rows fail, the others are there all the same."""
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(doctor, "CHECKS", [TABLE[name] for name in ("writing", "renaming", "Slurm")])
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["doctor", str(file)]) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    lines = captured.out.splitlines()
    assert lines[0].split() == ["check", "found", "verdict", "what", "to", "do"]
    assert all(len(line) <= 100 for line in lines)
    starts = [lines[0].index(word) for word in ("found", "verdict", "what")]
    assert starts == [24, 24 + 32 + 2, 24 + 32 + 2 + 9]
    rows = {line[:22].strip(): line[starts[1] :][:7].strip() for line in lines[1:] if not line.startswith(" ")}
    assert (rows["writing"], rows["renaming"], rows["Slurm"]) == (FAILURE, FAILURE, OK)
    assert "Not a directory: " in captured.out
    assert lines[-1] == "3 rows: 2 failed, 0 with a warning"


@pytest.mark.parametrize("name", ON_DISK)
def test_a_folder_that_is_not_there(tmp_path: Path, name: str) -> None:
    finding = only(TABLE[name], tmp_path / "nowhere")
    assert finding.verdict == (WARNING if name == "locking" else FAILURE)
    assert finding.found.startswith("No such file or directory: ")
    assert finding.remedy == TABLE[name].remedy


def test_a_full_disk(tmp_path: Path) -> None:
    with limited(resource.RLIMIT_FSIZE, 2**20):
        finding = only(TABLE["writing"], tmp_path)
    assert finding.verdict == FAILURE
    assert "File too large" in finding.found
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("free", "verdict"), [(5 * 10**8, FAILURE), (5 * 10**9, WARNING), (50 * 10**9, OK)], ids=["none", "little", "much"]
)
def test_room_for_checkpoints(free: int, verdict: str) -> None:
    assert checks.space(free, 10**12).verdict == verdict


def test_few_open_files() -> None:
    with limited(resource.RLIMIT_NOFILE, 256):
        assert only(TABLE["open files"], Path()) == Finding("open files", "up to 256", WARNING, "ulimit -n 65536")


def test_the_shared_memory_that_docker_gives() -> None:
    finding = checks.shared_room(64 * 2**20)
    assert (finding.found, finding.verdict) == ("0.07 GB in /dev/shm", WARNING)


@pytest.mark.parametrize(
    ("requirement", "found"),
    [
        ("no-such-package-of-fmscale>=1", "not installed"),
        ("numpy<1", "fmscale needs <1"),
        ("numpy>=1000", "fmscale needs >=1000"),
    ],
    ids=["missing", "too new", "too old"],
)
def test_packages_that_do_not_fit(requirement: str, found: str) -> None:
    finding = checks.package(requirement)
    assert finding.found.endswith(found)
    assert finding.verdict == FAILURE
    assert finding.remedy == f'pip install "{requirement}"'


def test_libraries_that_do_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spoiled_library.py").write_text("raise OSError('undefined symbol\\nand more')")
    monkeypatch.syspath_prepend(tmp_path)
    missing, spoiled = checks.import_all(["json", "no_such_library", "spoiled_library:name"])
    assert (missing.check, missing.verdict) == ("import no_such_library", FAILURE)
    assert (spoiled.check, spoiled.found) == ("import spoiled_library", "OSError: undefined symbol")


def test_every_library_that_fmscale_imports_is_tried() -> None:
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    used = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    used |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    foreign = {name.split(".")[0] for name in used} - sys.stdlib_module_names - {"fmscale", "_typeshed"}
    of_extras = {"torchao", "ot", "torchdiffeq", "torchmetrics", "matplotlib", "gradio"}  # who needs one is told
    foreign -= of_extras
    assert foreign <= {name.partition(":")[0].split(".")[0] for name in checks.IMPORTS}


@pytest.mark.slow
def test_a_compiler_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    compiler, *_ = examine(TABLE["compilers"], tmp_path)
    assert (compiler.check, compiler.found, compiler.verdict) == ("C++ compiler", "none", WARNING)
    finding = only(TABLE["torch.compile"], tmp_path)
    assert finding.verdict == WARNING
    assert "No working C++ compiler found" in finding.found


@pytest.mark.parametrize(
    ("driver", "built", "verdict"),
    [((13, 0), "13.2", OK), ((13, 4), "12.8", OK), ((12, 8), "13.0", FAILURE), (None, "13.0", FAILURE)],
)
def test_a_driver_too_old_for_torch(driver: tuple[int, int] | None, built: str, verdict: str) -> None:
    assert checks.cuda(driver, built).verdict == verdict


def test_a_torch_without_cuda_beside_a_gpu() -> None:
    assert checks.cuda((13, 0), None).verdict == FAILURE


@pytest.mark.parametrize(
    ("capability", "verdict"),
    [((7, 0), FAILURE), ((7, 5), WARNING), ((8, 0), OK), ((8, 9), OK), ((9, 0), OK), ((11, 0), OK), ((12, 1), OK)],
)
def test_gpus_that_torch_has_code_for(capability: tuple[int, int], verdict: str) -> None:
    """sm_86 runs on 8.9 and not on 9.0; compute_90 is compiled for whatever comes later."""
    built_for = ["sm_75", "sm_80", "sm_86", "sm_90a", "compute_90", "sm_120"]
    finding = checks.gpu(0, "a GPU", 80 * 2**30, capability, built_for)
    assert finding.verdict == verdict
    assert finding.found.startswith(f"a GPU, 80 GiB, compute capability {capability[0]}.{capability[1]}")


@pytest.mark.slow
def test_a_network_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_network")
    finding = only(TABLE["two processes"], tmp_path)
    assert finding.verdict == FAILURE
    assert "no_such_network" in finding.found


@pytest.mark.slow
def test_a_collective_that_hangs_is_ended_with_its_processes(tmp_path: Path) -> None:
    """The second process is stopped before it joins: the first waits until its time is up."""
    before, stopped = processes(SECOND_RANK), []
    deadline = time.monotonic() + PATIENCE_S

    def stop_second() -> None:
        while not (started := [process for process in processes(SECOND_RANK) if process not in before]):
            assert time.monotonic() < deadline
        os.kill(started[0], signal.SIGSTOP)
        stopped.append(started[0])

    stopping = threading.Thread(target=stop_second)
    stopping.start()
    finding = only(TABLE["two processes"]._replace(limit_s=12), tmp_path)
    stopping.join()
    assert finding == Finding("two processes", "no answer within 12 s", FAILURE, TABLE["two processes"].remedy)
    while stopped[0] in processes(SECOND_RANK):  # it has no command line once it is dead
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("run", "limit_s", "found"),
    [
        (Path.read_text, 3, "no answer within 3 s"),  # of a pipe that nobody writes to
        (Path.rmdir, PATIENCE_S, "Not a directory: "),
        (sys.exit, PATIENCE_S, "ended with exit code 1; last words: "),
        (crash, PATIENCE_S, "ended with signal 11"),
    ],
    ids=["hangs", "raises", "leaves", "crashes"],
)
def test_whatever_a_check_does_it_costs_one_row(
    tmp_path: Path, run: Callable[[Path], object], limit_s: float, found: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    finding = only(Check("name", run, limit_s, "do this"), tmp_path / "pipe")
    assert finding.found.startswith(found)
    assert (finding.check, finding.verdict, finding.remedy) == ("name", FAILURE, "do this")
