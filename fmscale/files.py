"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fmscale.errors import UserError

READ_BYTES = 1 << 20
THREADS = 2  # one waits for the disk while the other computes
Item = TypeVar("Item")


def sha256(*files: Path) -> str:
    """SHA-256 of the bytes of `files`, one after another: lower-case hexadecimal."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while piece := stream.read(READ_BYTES):
                digest.update(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old content or the new one.

    Raises:
        OSError: it could not be written; the old content is still there.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def append(path: Path, *records: Mapping[str, Any]) -> None:
    """Add lines to a file that other processes add lines to as well, each line in one write."""
    _append(path, [json.dumps(record) for record in records])


def append_safely(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line, such that one that a power cut has torn does not swallow it; for files with one writer at a time."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                _append(path, [""])
    append(path, record)


def _append(path: Path, lines: Iterable[str]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        for line in lines:
            os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects that `append` has written, oldest first, of a file that may not be there yet; a line that a power cut
    has torn is passed over.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return list(whole_records(lines))


def whole_records(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The lines that hold a JSON object each, and nothing else."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def read_lines(path: Path, option: str) -> list[str]:
    """The lines of a text file that say something, without the space around them.

    Args:
        path: file.
        option: that named it, for the error.

    Raises:
        UserError: it cannot be read as UTF-8 text, or holds no such line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{option}: {path}: cannot be read: {reason}") from None
    if not (lines := [line.strip() for line in text.split("\n") if line.strip()]):
        raise UserError(f"{option}: {path} holds no text; write one caption a line")
    return lines


def in_threads(action: Callable[[Item], None], items: Iterable[Item]) -> None:
    """Do `action` for each item, in a few threads; where one fails, its error is raised and no further one is begun."""
    with ThreadPoolExecutor(THREADS) as threads:
        begun = [threads.submit(action, item) for item in items]
        try:
            for future in begun:
                future.result()
        finally:
            for future in begun:
                future.cancel()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that one process of this machine at a time can have; a process that dies lets go of it.

    Raises:
        UserError: the file that stands for it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to write in that takes the name `final` when the block ends well, and vanishes when it does not.

    Raises:
        UserError: `final` exists already, or the disk fails.
    """
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final} exists already; give another folder, or remove it first")
    temporary = final.absolute().with_name(f".{final.absolute().name}.writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(final)
    except OSError as error:
        if error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(temporary):
            raise UserError(f"{final}: cannot be written: {error.strerror or error}") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
