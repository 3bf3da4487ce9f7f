"""Who does what, among workers that share nothing but a folder: any number, on any machines, that come, go and die.

A worker keeps one file in the folder and touches it: its heartbeat. To claim a piece of work is to make a hard link to
that file under the work's name, which exactly one worker can do, on NFS too, where locks are not to be relied on. The
link bears the owner's name and its heartbeat, since it is the same file.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from pathlib import Path
from secrets import token_hex
from typing import Any

from fmscale.errors import UserError
from fmscale.log import get_logger

log = get_logger(__name__)
BEATS = 10  # heartbeats in the time after which a claim is dead
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Claims:
    """The claims of one worker; use it in a `with` block, which ends with every claim of the worker released.

    Claims save work and do not guard it: a worker that was slow and not dead finds its claim taken, and where two find
    a dead claim at the same moment both may get it. Whoever publishes a result must see to it that one does.

    Args:
        folder: exists, and is shared by all workers.
        timeout_s: a claim whose owner has not been heard of for so long is dead.

    Attributes:
        worker: a name that no other worker has.
        mine: what this worker has claimed.

    Raises:
        UserError: the folder's file system has no hard links.
    """

    def __init__(self, folder: Path, timeout_s: float) -> None:
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{token_hex(4)}"
        self._folder, self._timeout_s = folder, timeout_s
        self._own = folder / f"{self.worker}.worker"
        self.mine: set[str] = set()
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Claims:
        self._own.write_text(json.dumps({"worker": self.worker, "machine": machine(), **process(os.getpid())}))
        self._heart.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._heart.join()
        for name in list(self.mine):
            self.release(name)
        self._own.unlink(missing_ok=True)

    def take(self, name: str) -> bool:
        """Claim a piece of work: whether it is this worker's from now on, and was not before.

        Args:
            name: fit for a file's name.
        """
        if name in self.mine:
            return False
        claim = self._path(name)
        if self._is_dead(claim):
            log.warning("%s: the worker that was at it is dead, so another takes it", name)
            claim.unlink(missing_ok=True)
        if self._link(claim):
            self.mine.add(name)
            return True
        return False

    def release(self, name: str) -> None:
        """Let go of a claim, unless it has become another's."""
        self.mine.discard(name)
        claim = self._path(name)
        try:
            if claim.samefile(self._own):
                claim.unlink()
        except FileNotFoundError:
            pass  # another took it, and has let go of it too; or all is done, and the folder gone

    def is_gone(self, worker: str) -> bool:
        """Whether a worker has left or is dead."""
        file = self._folder / f"{worker}.worker"
        return not file.exists() or self._is_dead(file)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.claim"

    def _link(self, claim: Path) -> bool:
        if link(self._own, claim):
            return True
        try:  # NFS says that it exists also where it made the link, and its first answer was lost
            return claim.samefile(self._own)
        except FileNotFoundError:  # whose it was has let go of it since
            return False

    def _is_dead(self, claim: Path) -> bool:
        try:
            with claim.open() as file:  # NFS asks its server when a file is opened; a mere stat may be minutes old
                content, beat_s = file.read(), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return False
        try:
            owner = json.loads(content)
        except ValueError:  # a power cut
            owner = {}
        return self._now() - beat_s > self._timeout_s or has_ended(owner)

    def _now(self) -> float:
        """The time by the clock that stamps the files, which machines need not agree with."""
        os.utime(self._own)
        return self._own.stat().st_mtime

    def _beat(self) -> None:
        while not self._over.wait(self._timeout_s / BEATS):
            try:
                os.utime(self._own)
            except FileNotFoundError:
                return  # all is done, and the folder gone
            except OSError as error:
                log.warning("%s cannot be touched (%s): others may take this worker for dead", self._own, error)


def link(file: Path, name: Path) -> bool:
    """Give a file another name, as one of many who try can do: whether it was this one.

    Raises:
        UserError: the file system has no hard links.
    """
    try:
        os.link(file, name)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in NO_LINKS:
            raise UserError(
                f"{name.parent}: its file system makes no hard links ({error.strerror}), by which workers agree; "
                "choose another for `out`"
            ) from error
        raise
    return True


def machine() -> str:
    """This machine since its start, and the process numbers that are seen from here; empty where the system is silent.

    Containers bear one name and number their processes each for itself.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def process(pid: int) -> dict[str, Any]:
    """A running process: its number, and when it started, in clock ticks since the machine did, since numbers return.

    Returns:
        Empty where there is none of this number, or it is dead and its parent has not asked yet.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # a program's name may hold anything
    except OSError:
        return {}
    return {} if fields[0] in "ZX" else {"pid": pid, "started": int(fields[19])}


def has_ended(owner: dict[str, Any]) -> bool:
    """Whether a worker is known to be dead: it ran on this machine, and no longer does."""
    here = machine()
    return (
        here != ""
        and owner.get("machine") == here
        and process(owner["pid"]) != {"pid": owner["pid"], "started": owner["started"]}
    )
