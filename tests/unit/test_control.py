"""What a run is asked for by signals and files."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from fmscale.control import Requests, Wish
from fmscale.starts import SAVE, STOP


def test_another_thread_hears_of_a_signal(tmp_path: Path) -> None:
    heard = threading.Event()
    requests = Requests(tmp_path, reads_files=True, hurry=heard.set)
    with requests.listening():
        os.kill(os.getpid(), signal.SIGUSR2)
        assert heard.wait(5)
        assert requests.heard() == Wish(stop=True)
        assert not requests.for_good
    threads = [thread for thread in threading.enumerate() if thread.name == "signals"]
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_files_end_a_run_for_good(tmp_path: Path) -> None:
    requests = Requests(tmp_path, reads_files=True)
    (tmp_path / SAVE).touch()
    assert requests.heard() == Wish(save=True)
    assert requests.heard() == Wish()
    (tmp_path / STOP).touch()
    assert requests.heard() == Wish(stop=True)
    assert requests.for_good
    requests.forget_files()
    assert not (tmp_path / STOP).exists()
    assert Requests(tmp_path, reads_files=False).heard() == Wish()
