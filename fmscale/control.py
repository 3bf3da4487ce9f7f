"""What a run is asked for from outside, and how its ranks agree on it.

    SIGTERM, SIGINT, SIGUSR2, or the file RUN/STOP    save, then end with exit code 0; a second SIGINT ends without
    the file RUN/SAVE                                 save, and go on

A rank that hears of it tells the others in the one small all-reduce of each step. What they agreed on in a step they
read when they are through with the next one: by then it has arrived, and nobody had to wait for the GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor

from fmscale.distributed import STOP_SIGNALS
from fmscale.starts import SAVE, STOP

LAST_MINUTE_S = 60


class Wish(NamedTuple):
    """What is asked for: by this rank's signals and files, or by anybody's."""

    stop: bool = False
    save: bool = False


class Requests:
    """What this rank has heard from outside.

    Args:
        run_dir: where files may say it.
        reads_files: True on the one rank that looks for them.
        hurry: called by another thread as soon as a signal comes, even if this one waits in a collective.

    Attributes:
        for_good: the end was asked for by the user, by the file or SIGINT, and not by signals that schedulers send.
    """

    def __init__(self, run_dir: Path, reads_files: bool, hurry: Callable[[], None] = lambda: None) -> None:
        self._run_dir, self._reads_files, self._hurry = run_dir, reads_files, hurry
        self._told = self._interrupted = self.for_good = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of signals while the block runs, instead of dying of them."""
        ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        woken = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        threading.Thread(target=self._wake, args=(ear,), name="signals", daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(woken)
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
            os.close(mouth)  # which ends the thread

    def _wake(self, ear: int) -> None:
        """Read the numbers of signals, which Python writes before it comes to run their handlers."""
        with os.fdopen(ear, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in STOP_SIGNALS:
                    self._hurry()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._told, self._interrupted = True, self._interrupted or number == signal.SIGINT
        self.for_good = self.for_good or self._interrupted

    def heard(self) -> Wish:
        """What is asked for now."""
        if not self._reads_files:
            return Wish(self._told)
        self.for_good = self.for_good or (self._run_dir / STOP).exists()
        return Wish(self._told or self.for_good, _take(self._run_dir / SAVE))

    def forget_files(self) -> None:
        """Remove what files asked of this start, when it ends."""
        if self._reads_files:
            forget_files(self._run_dir)


def forget_files(run_dir: Path) -> None:
    """Remove what files asked of a start of the run that has ended."""
    _take(run_dir / STOP)
    _take(run_dir / SAVE)


def _take(file: Path) -> bool:
    """Whether a file is there; it is removed."""
    if not file.is_file():
        return False
    with suppress(OSError):  # a file system that hiccups is no reason to end a run
        file.unlink()
    return True


class Delayed:
    """A vector of every step, read on the host one step later, so that nothing waits for the device."""

    def __init__(self) -> None:
        self._waiting: tuple[Tensor, torch.cuda.Event | None] | None = None

    def exchange(self, values: Tensor) -> Tensor | None:
        """Hand in this step's vector; returns the one of the step before, None at first."""
        before, self._waiting = self._waiting, _to_host(values)
        return _read(before)


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if not values.is_cuda:
        return values.clone(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    return host, torch.cuda.current_stream(values.device).record_event()


def _read(waiting: tuple[Tensor, torch.cuda.Event | None] | None) -> Tensor | None:
    if waiting is None:
        return None
    host, arrived = waiting
    if arrived is not None:
        arrived.synchronize()
    return host


def outlive_signals(worker: int) -> None:
    """For processes that read the data: schedulers signal every process of a job, and the trainer still needs these.

    They live on for a minute after the first SIGTERM, and no longer than the second: who ends them in earnest sends it
    again, or waits.
    """

    def leave_later(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(LAST_MINUTE_S)  # whose default is to end the process

    for number in STOP_SIGNALS:
        signal.signal(number, leave_later if number == signal.SIGTERM else signal.SIG_IGN)


def release_readers() -> None:
    """Tell this process's readers that their first SIGTERM has come, so that they leave with the next."""
    for reader in multiprocessing.active_children():
        if reader.pid is not None:
            os.kill(reader.pid, signal.SIGTERM)
