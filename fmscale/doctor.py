"""`fmscale doctor`: whether this machine can train, and what to do where it cannot.

Each row of `CHECKS` runs in a process of its own, so that a library that crashes, a driver that hangs or a file server
that is gone costs one row of the table and no more.
"""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from fmscale import checks
from fmscale.checks import CAUSE_LENGTH, FAILURE, WARNING, Finding, cause, python_command


class Check(NamedTuple):
    """A row of `CHECKS`.

    Attributes:
        name: what is looked at.
        run: folder -> findings; a function that another process can import.
        limit_s: after so many seconds it is ended, with all processes that it has started.
        remedy: what to do when it raises, dies or is ended.
        verdict: what that means.
    """

    name: str
    run: Callable[[Path], object]
    limit_s: float
    remedy: str
    verdict: str = FAILURE

    def fails(self, why: str) -> list[Finding]:
        """The findings of a check that could not be made."""
        return [Finding(self.name, why, self.verdict, self.remedy)]


def doctor(folder: Path, as_json: bool) -> int:
    """Make every check, and print what each has found as soon as it has.

    Args:
        folder: whose disk is checked.
        as_json: print data when all is done, and no table.

    Returns:
        Exit code: 0, or 1 where something failed.
    """
    findings: list[Finding] = []
    columns = _columns(shutil.get_terminal_size((120, 24)).columns)
    for line in [] if as_json else _lines(["check", "found", "verdict", "what to do"], columns):
        print(line)
    for check in CHECKS:
        for finding in examine(check, folder):
            findings.append(finding)
            for line in [] if as_json else _lines(finding, columns):
                print(line, flush=True)
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in (FAILURE, WARNING)}
    if as_json:
        rows = [finding._asdict() for finding in findings]
        print(json.dumps({"failures": counts[FAILURE], "warnings": counts[WARNING], "findings": rows}, indent=1))
    else:
        print(f"\n{len(findings)} rows: {counts[FAILURE]} failed, {counts[WARNING]} with a warning")
    return 1 if counts[FAILURE] else 0


def _columns(width: int) -> list[int]:
    """Widths of the table's columns: what was found and what to do share what the others leave."""
    check, verdict = 22, 7
    rest = max(width, 80) - check - verdict - 6  # two spaces between columns
    return [check, rest // 2, verdict, rest - rest // 2]


def _lines(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """One row, over as many lines as its fullest cell needs."""
    wrapped = [textwrap.wrap(cell, width) for cell, width in zip(cells, widths, strict=True)]
    return [
        "  ".join(f"{part:{width}}" for part, width in zip(parts, widths, strict=True)).rstrip()
        for parts in zip_longest(*wrapped, fillvalue="")
    ]


def examine(check: Check, folder: Path) -> list[Finding]:
    """Make one check in a process of its own, within its time; never raises for what the check does."""
    function = f"{check.run.__module__}:{check.run.__qualname__}"
    try:
        child = subprocess.Popen(
            python_command("from fmscale.doctor import answer; answer()", function, str(folder)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # so that what it starts can be ended with it
        )
    except OSError as error:
        return check.fails(cause(error))
    try:
        answered, said = child.communicate(timeout=check.limit_s)
        answer = json.loads(answered)
    except subprocess.TimeoutExpired:
        return check.fails(f"no answer within {check.limit_s:g} s")
    except ValueError:
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        return check.fails(f"ended with {how}; last words: {_last_line(said)}")
    finally:
        _end(child)
    return check.fails(answer) if isinstance(answer, str) else [Finding(*row) for row in answer]


def _end(child: subprocess.Popen[str]) -> None:
    """End a process, if it has not ended, and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # one that waits for a dead file server cannot be killed
        child.wait(1)


def answer() -> None:
    """The process of one check: writes its findings as JSON, or the text of what it raised."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print shall not spoil the answer
    found: object
    try:
        found = pkgutil.resolve_name(sys.argv[1])(Path(sys.argv[2]))
    except Exception as error:
        found = cause(error)
    with channel:
        json.dump(found, channel)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "none")[:CAUSE_LENGTH]


_COMPILE = "install g++, and triton for GPUs; or leave engine.compile=false"
_DISK = "give a folder that is there, that you may write to and that has room; its quota may be used up"
_NETWORK = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to a network interface that works"
_NVIDIA = "install NVIDIA's driver again; nvidia-smi must run"
CHECKS = (
    Check("packages", checks.versions, 60, "install fmscale: pip install . in its checkout"),
    Check("imports", checks.imports, 300, "install the package of the last words again"),
    Check("GPUs", checks.gpus, 120, _NVIDIA),
    Check("compilers", checks.compilers, 30, _COMPILE, WARNING),
    Check("torch.compile", checks.torch_compile, 300, _COMPILE, WARNING),
    Check("free space", checks.free_space, 30, _DISK),
    Check("writing", checks.writing, 60, _DISK),
    Check("renaming", checks.renaming, 60, _DISK),
    Check("locking", checks.locking, 30, "datasets behind URLs need it: data.remote.cache on another disk", WARNING),
    Check("shared memory", checks.shared_memory, 10, "give the container a /dev/shm, or set data.workers=0", WARNING),
    Check("open files", checks.open_files, 10, "see `ulimit -n`", WARNING),
    Check("two processes", checks.two_processes, 150, _NETWORK),
    Check("Slurm", checks.slurm, 10, "nothing, where there is no Slurm", WARNING),
)
