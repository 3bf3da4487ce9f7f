from __future__ import annotations

import signal
import sys
import threading

import pytest

from fmscale.encode import interruptible

BOTH = (signal.SIGINT, signal.SIGTERM)


def test_two_signals_at_once_interrupt_once_and_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches a local worker from the terminal and from its parent."""
    complaints: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    before = signal.getsignal(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, BOTH)
    for number in BOTH:
        signal.pthread_kill(threading.get_ident(), number)  # a process may have other threads, which block nothing
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BOTH)
    assert complaints == []
    assert signal.getsignal(signal.SIGTERM) == before
