"""One request to a place that is no folder: fsspec for URLs, a program for `pipe:`. Who asks again is `remote`."""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import Any, Protocol
from urllib.parse import urlsplit

from fmscale.errors import UserError

SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf")
PIPE = "pipe:"
AGAIN = frozenset({408, 425, 429})  # HTTP's answers to a client that mean: later


class Transport(Protocol):
    """Reads files of one dataset, by name; nothing that it says of itself holds a secret."""

    def where(self, name: str) -> str:
        """A file, for people."""

    def read(self, name: str, start: int, end: int | None) -> bytes:
        """Bytes start … end - 1 of a file, or those that there are; None for all that follow.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: this place cannot do that.
            Exception: anything else that the place, or the road to it, came up with.
        """

    def size(self, name: str) -> int:
        """Bytes of a file; raises what `read` raises."""

    def tars(self) -> list[str]:
        """Names of the tars directly in the place, sorted; raises what `read` raises."""

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
        transport = PipeTransport(place.removeprefix(PIPE), timeout_s)
        if not allow_pipe:
            raise UserError(
                f"`pipe:` starts a program that the dataset's place names; add --allow-pipe if you trust "
                f"{transport.program!r}"
            )
        return transport
    _check_url(place)
    return FsspecTransport(place, timeout_s)


def _check_url(place: str) -> None:
    """Refuse what is no bare URL of a folder; the text shows no more of it than scheme and host."""
    scheme, _, rest = place.partition("://")
    authority = rest.partition("/")[0]
    user, _, host = authority.rpartition("@")
    shown = f"{scheme}://{host}…"
    if scheme not in SCHEMES or "::" in place:
        raise UserError(f"{shown} cannot be read: give a folder, or a URL of {', '.join(SCHEMES)}")
    container = scheme in ("az", "abfs", "abfss") and ":" not in user  # Azure writes CONTAINER@ACCOUNT
    if "?" in rest or "#" in rest or (user and not container):
        raise UserError(
            f"{shown} holds a password, query or fragment: give the bare URL of a folder; credentials belong in the "
            "environment, where fsspec finds them"
        )
    try:
        sound = bool(urlsplit(place).hostname) and urlsplit(place).port != 0
    except ValueError:  # no such port, or half an address
        sound = False
    if not sound:
        raise UserError(f"{shown} names no host that could be asked: give the URL of a folder")


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

    def size(self, name: str) -> int:
        """See `Transport`."""
        self.read(name, 0, 1)  # `info` says of any failure of a web server that the file is not there
        try:
            size = self._files.info(f"{self._root}/{name}", **self._timeout)["size"]
        except FileNotFoundError as error:
            raise ConnectionError(f"its size is not told ({error.__cause__})") from error
        if size is None:
            raise UserError(f"{self.where(name)}: the server does not tell its size; give one that does")
        return int(size)

    def tars(self) -> list[str]:
        """See `Transport`; of a web server, those that its page of the folder links to."""
        paths = self._files.ls(f"{self._root}/", detail=False, **self._timeout)
        places = [path.rpartition("/") for path in paths]
        return sorted({name for folder, _, name in places if folder == self._root and name.endswith(".tar")})

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
            raise UserError(f"what follows `pipe:` is no command: {error}") from error
        self.program = self._argv[0] if self._argv else ""
        self._timeout_s = timeout_s
        for hole in ("{name}", "{range}"):
            if not any(hole in part for part in self._argv[1:]):
                raise UserError(f"`pipe:{self.program} …`: its arguments must say where {hole} goes")

    def where(self, name: str) -> str:
        """See `Transport`; the arguments may hold a password."""
        return f"pipe:{self.program} … {name}"

    def read(self, name: str, start: int, end: int | None) -> bytes:
        """See `Transport`."""
        byte_range = f"{start}-{'' if end is None else end - 1}"
        argv = [part.replace("{name}", name).replace("{range}", byte_range) for part in self._argv]
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=self._timeout_s, check=False
            )
        except OSError as error:
            raise UserError(f"pipe: {argv[0]!r} cannot be started: {error.strerror}") from error
        if done.returncode:
            said = re.sub(r"\s+", " ", done.stderr.decode(errors="replace")).strip()[-200:]
            raise RuntimeError(f"exit code {done.returncode}{': ' + said if said else ''}")
        if end is not None and len(done.stdout) > end - start:
            raise UserError(f"{self.where(name)}: printed more than {{range}} asked for")
        return done.stdout

    def size(self, name: str) -> int:
        """See `Transport`."""
        raise UserError(f"{self.where(name)}: a program does not tell sizes; give a folder or a URL")

    def tars(self) -> list[str]:
        """See `Transport`."""
        raise UserError(f"{self.where('')}: a program does not list folders; give a folder or a URL")

    def is_final(self, error: Exception) -> bool:
        """See `Transport`."""
        return False
