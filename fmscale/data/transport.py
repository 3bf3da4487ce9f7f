"""One request to a place that is no folder: fsspec for URLs, a program for `pipe:`. Who asks again is `remote`."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from fmscale.errors import UserError

SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf")
PIPE = "pipe:"
AGAIN = frozenset({408, 425, 429})  # HTTP's answers to a client that mean: later


class Transport(Protocol):
    """Reads files of one dataset, by name."""

    def where(self, name: str) -> str:
        """A file, for people."""

    def read(self, name: str, start: int, end: int | None) -> bytes:
        """Bytes start … end - 1 of a file, or those that there are; None for all that follow.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: this place cannot do that.
            Exception: anything else that the place, or the road to it, came up with.
        """

    def download(self, name: str, to: Path) -> None:
        """Write a whole file to a path; exceptions as for `read`."""

    def is_final(self, error: Exception) -> bool:
        """Whether asking again is of no use."""


def is_remote(place: str) -> bool:
    """Whether a dataset's place is no folder of this machine."""
    return "://" in place or place.startswith(PIPE)


def connect(place: str, timeout_s: float, allow_pipe: bool) -> Transport:
    """The transport for a place.

    Raises:
        UserError: the place may not be read, or not by this installation.
    """
    if place.startswith(PIPE):
        if not allow_pipe:
            raise UserError(
                "`pipe:` starts the program that a config names: add --allow-pipe if you trust "
                f"`{place.removeprefix(PIPE)}`"
            )
        return PipeTransport(place.removeprefix(PIPE), timeout_s)
    parts = urlsplit(place)
    shown = f"{parts.scheme}://{parts.hostname or ''}…"
    if parts.scheme not in SCHEMES:
        raise UserError(f"{shown} cannot be read: give a folder, or a URL of {', '.join(SCHEMES)}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"{shown} holds a password, query or fragment: give the bare URL of a folder; credentials belong in the "
            "environment, where fsspec finds them"
        )
    return FsspecTransport(place, timeout_s)


class FsspecTransport:
    """A folder that fsspec can read.

    Args:
        url: of the folder.
        timeout_s: seconds after which a request has failed.
    """

    def __init__(self, url: str, timeout_s: float):
        import fsspec

        self._url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self._url)
        except ImportError as error:
            raise UserError(f"{url}: {error}; install what it names") from error
        except (ValueError, OSError) as error:
            raise UserError(f"{url} cannot be read: {error}") from error
        self._timeout: dict[str, Any] = {"timeout": timeout_s} if self._files.async_impl else {}

    def where(self, name: str) -> str:
        """See `Transport`."""
        return f"{self._url}/{name}"

    def read(self, name: str, start: int, end: int | None) -> bytes:
        """See `Transport`."""
        limits = {} if (start, end) == (0, None) else {"start": start, "end": end}
        try:
            data = self._files.cat_file(f"{self._root}/{name}", **limits, **self._timeout)
        except Exception as error:
            if _status(error) == 416 or "InvalidRange" in str(error):  # the file ends before `start`
                return b""
            raise
        if end is not None and len(data) > end - start:
            raise UserError(f"{self.where(name)}: the server ignores byte ranges; give one that does not")
        return data

    def download(self, name: str, to: Path) -> None:
        """See `Transport`."""
        self._files.get_file(f"{self._root}/{name}", str(to), **self._timeout)

    def is_final(self, error: Exception) -> bool:
        """See `Transport`."""
        status = _status(error)
        return isinstance(error, PermissionError) or (status in range(400, 500) and status not in AGAIN)


def _status(error: BaseException) -> int | None:
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


class PipeTransport:
    """A program that prints a part of a file, such as `curl -sf -r {range} https://host/folder/{name}`.

    It is started without a shell, once for each request: `{name}` is the file's path in the dataset, `{range}` the
    first and the last byte as HTTP writes them, `0-1023`, or `0-` for the whole file. It tells that it failed by its
    exit code.

    Args:
        command: split as a shell would.
        timeout_s: seconds after which it has failed and is ended.

    Raises:
        UserError: a place for `{name}` or `{range}` is missing.
    """

    def __init__(self, command: str, timeout_s: float):
        try:
            self._argv = shlex.split(command)
        except ValueError as error:
            raise UserError(f"`pipe:{command}` is no command: {error}") from error
        self._command, self._timeout_s = command, timeout_s
        for hole in ("{name}", "{range}"):
            if not any(hole in part for part in self._argv[1:]):
                raise UserError(f"`pipe:{command}`: its arguments must say where {hole} goes")

    def where(self, name: str) -> str:
        """See `Transport`."""
        return f"pipe:{self._command.replace('{name}', name)}"

    def read(self, name: str, start: int, end: int | None) -> bytes:
        """See `Transport`."""
        data = self._run(name, f"{start}-{'' if end is None else end - 1}", subprocess.PIPE)
        if end is not None and len(data) > end - start:
            raise UserError(f"{self.where(name)}: printed more than {{range}} asked for")
        return data

    def download(self, name: str, to: Path) -> None:
        """See `Transport`."""
        with to.open("wb") as file:
            self._run(name, "0-", file)

    def _run(self, name: str, byte_range: str, output: Any) -> bytes:
        argv = [part.replace("{name}", name).replace("{range}", byte_range) for part in self._argv]
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.PIPE,
                timeout=self._timeout_s,
                check=False,
            )
        except FileNotFoundError as error:
            raise UserError(f"pipe: there is no program {argv[0]!r}") from error
        if done.returncode:
            said = re.sub(r"\s+", " ", done.stderr.decode(errors="replace")).strip()[-200:]
            raise RuntimeError(f"exit code {done.returncode}{': ' + said if said else ''}")
        return done.stdout or b""

    def is_final(self, error: Exception) -> bool:
        """See `Transport`."""
        return False
