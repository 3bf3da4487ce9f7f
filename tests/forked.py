"""Ranks of tests, forked from a server that has imported what they need: each is there at once, and not after 8 s.

They are processes of their own all the same. What must begin as a user begins it is started by `running` instead.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["deepspeed", "fmscale.train", "torch._dynamo"])  # the first optimizer wants the last


def start(program: Path, arguments: tuple[str, ...], environment: Mapping[str, str], output: Path) -> BaseProcess:
    """Run a program for Python in a new process, which prints to a file."""
    process = SERVER.Process(target=_run, args=(program, arguments, dict(environment), output))
    process.start()
    return process


def _run(program: Path, arguments: tuple[str, ...], environment: dict[str, str], output: Path) -> None:
    gc.freeze()  # ZeRO-3 collects garbage as it begins, and what was imported is none
    with output.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.update(environment)
    sys.argv = [str(program), *arguments]
    sys.path.insert(0, str(program.parent))  # as Python does
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    runpy.run_path(str(program), run_name="__main__")
