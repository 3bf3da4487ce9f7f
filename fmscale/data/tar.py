"""Tar archives as webdataset sees them, walked without trust in their bytes."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from webdataset.tariterators import base_plus_ext

SKIPPED = re.compile(r"__[^/]*__($|/)")  # names that webdataset keeps for itself
PICKLES = frozenset({"pt", "pth", "pkl", "pyd", "pickle"})  # reading one would run code
CHUNK_BYTES = 4 << 20
MAX_MEMBER_BYTES = 1 << 30  # larger members are not read: no sample of this field comes near


class DamageError(Exception):
    """Stored bytes are not what they must be; the text is the reason. Callers name the sample or shard and go on."""


class Member(NamedTuple):
    """A regular file in an archive.

    Attributes:
        name: path inside the archive.
        key: the sample it belongs to: its path up to the first dot of the file name, as webdataset has it.
        extension: what follows the last dot, lower case.
        offset: byte at which its first header starts, extended headers included.
        start: byte at which its content starts.
        size: content bytes.
    """

    name: str
    key: str
    extension: str
    offset: int
    start: int
    size: int

    @property
    def end(self) -> int:
        """The byte after its padded content."""
        return self.start + -(-self.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def walk(file: BinaryIO, whole: bool = True) -> Iterator[Member]:
    """The members of an uncompressed archive in order, without reading their content.

    Stock readers take a damaged header, or a hole of zeros, for the end of the archive and lose what follows in
    silence; here that is an error.

    Args:
        file: seekable; it may be read and moved between members.
        whole: the file is a whole archive, which must close with an end mark; False for a slice of whole members.

    Raises:
        DamageError: the bytes are no sound archive, or hold a sparse member.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            yield from _members(archive)
            end = archive.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the latter two: absurd numbers in a header
        raise DamageError(f"not a sound tar archive ({error})") from error
    if whole:
        _check_end(file, end)


def _members(archive: tarfile.TarFile) -> Iterator[Member]:
    if archive.firstmember is None:  # type: ignore[attr-defined]  # empty: `next` of Python 3.10 would fail on it
        return
    last = -1
    while (info := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
        if info.offset <= last or info.size < 0:  # a negative size leads tarfile backwards, for ever
            raise DamageError(f"member {info.name!r} has an impossible size")
        if info.issparse():  # a few bytes may claim terabytes of zeros
            raise DamageError(f"member {info.name!r} is a sparse file")
        last = info.offset
        key, suffix = base_plus_ext(info.name)
        if info.isreg() and key is not None and not SKIPPED.match(info.name):
            extension = suffix.rpartition(".")[2].lower()
            yield Member(info.name, key, extension, info.offset, info.offset_data, info.size)


def _check_end(file: BinaryIO, offset: int) -> None:
    """An archive ends with zeros alone: at least one block of them."""
    file.seek(offset)
    zeros = 0
    while chunk := file.read(CHUNK_BYTES):
        if chunk.strip(b"\0"):
            raise DamageError(f"no sound tar header at byte {offset}: what follows it cannot be found")
        zeros += len(chunk)
    if zeros < tarfile.BLOCKSIZE:
        raise DamageError(f"it stops at byte {offset} without an end mark: it was cut short")


def find_tars(folder: Path) -> list[Path]:
    """The archives directly in a folder, sorted by name."""
    return sorted(path for path in folder.glob("*.tar") if path.is_file())


def parse_json(member: Member, content: bytes) -> dict[str, Any]:
    """The object in a json member.

    Raises:
        DamageError: it is none.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"member {member.name!r} is no json ({error})") from error
    if not isinstance(value, dict):
        raise DamageError(f"member {member.name!r} is no json object")
    return value
