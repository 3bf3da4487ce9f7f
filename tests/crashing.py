"""A function that a process of its own can import, and does not survive."""

from __future__ import annotations

import signal
from pathlib import Path


def crash(folder: Path) -> None:
    signal.raise_signal(signal.SIGSEGV)
