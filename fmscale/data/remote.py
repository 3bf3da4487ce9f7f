"""Datasets behind URLs: byte ranges through fsspec, with retry, back-off and a bounded cache on the local disk.

open_index      folder or URL -> Index; of a URL, the index is fetched and kept
RemoteStorage   reads samples: from the cache, else by many requests at a time
ShardCache      which parts of shards are here
Transport       one request: fsspec, or the program that a `pipe:` names
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from fmscale.data.index import BESIDE, BROKEN, COLUMNS, FOLDER, Index, Shard, check_manifest
from fmscale.data.storage import Location, crc32
from fmscale.data.tar import CHUNK_BYTES
from fmscale.data.transport import Transport, connect, is_remote
from fmscale.errors import OutageError, UserError
from fmscale.files import locked, new_folder, sync
from fmscale.log import get_logger

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

log = get_logger(__name__)
Result = TypeVar("Result")
REQUESTS = 16  # at a time: object stores answer each slowly, and many at once
FIRST_DELAY_S = 0.5
PART_BYTES = 32 << 20  # the most that one request asks for, unless a sample is larger
SECRET = re.compile(r"\?[^\s'\"]*")  # what follows the path of a URL: signatures


@dataclass(frozen=True)
class RemoteOptions:
    """How datasets behind URLs are read.

    Attributes:
        cache: folder of this machine for their indices and shards; None for `~/.cache/fmscale`.
        cache_bytes: the most that is kept there of one dataset's shards.
        timeout_s: seconds after which an unanswered request has failed, > 0.
        attempts: how often a request is made before the program gives up, >= 1.
        allow_pipe: `pipe:COMMAND` may be run.
    """

    cache: Path | None = None
    cache_bytes: int = 0
    timeout_s: float = 60
    attempts: int = 6
    allow_pipe: bool = False


def open_index(place: str, options: RemoteOptions, check_shards: bool = True) -> Index:
    """Open the index of a dataset that lies anywhere.

    Args:
        place: a folder; a URL; or `pipe:COMMAND` (see `transport`).
        options: for those that are no folder.
        check_shards: also compare names and sizes of the tars in a folder with the index.

    Raises:
        UserError: there is no such dataset, or its index cannot be used, or the place may not be read.
        OutageError: the place cannot be reached.
    """
    if not is_remote(place):
        return Index.open(place, check_shards)
    storage = RemoteStorage(place, options)
    index = Index.open(storage.fetch_index(), storage=storage)
    for shard in index.shards:  # names become parts of URLs: a stranger's may hold nothing that leads elsewhere
        if not re.fullmatch(r"\w[\w.+=,@ -]{0,250}", shard.name):
            raise UserError(f"{storage.where('')}: its index names a shard {shard.name!r}, which is no plain file name")
    storage.shards = ShardCache(storage.folder / "shards", index.shards, options.cache_bytes)
    return index


class ShardCache:
    """Parts of shards that were fetched once, in sparse files, up to a bound.

    The first shards of the dataset that fit are kept; nothing ever gives way to something else, since in an epoch each
    sample is drawn once, whichever it is. The index's checksum says whether a part is there: so no other book is kept,
    and it matters to nobody when a process dies in mid-write.

    Args:
        folder: made where it is missing.
        shards: of the dataset.
        limit_bytes: the most that the files hold together.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], limit_bytes: int):
        self.sizes = {shard.name: shard.size for shard in shards}
        self._files: dict[str, Path] = {}
        self._warned = False
        for shard in shards:
            limit_bytes -= shard.size
            if limit_bytes < 0:
                break
            self._files[shard.name] = folder / shard.sha256
        try:
            self._make_room(folder)
        except OSError as error:
            log.warning("%s cannot be used (%s): nothing is kept there", folder, error.strerror)
            self._files.clear()

    def _make_room(self, folder: Path) -> None:
        """Remove what is not to be kept: shards that the dataset has no more, or that are beyond the bound."""
        if self._files:
            folder.mkdir(parents=True, exist_ok=True)
        for stale in set(folder.glob("*")) - set(self._files.values()):
            stale.unlink(missing_ok=True)

    def holds(self, location: Location) -> bool:
        """Whether the dataset has such bytes at all, be they here or not."""
        return 0 <= location.offset < location.offset + location.length <= self.sizes.get(location.shard, 0)

    def get(self, location: Location) -> bytes | None:
        """The bytes of a sample, if they are here."""
        path = self._files.get(location.shard)
        if path is None:
            return None
        try:
            with path.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), location.length, location.offset)
        except OSError:  # not fetched yet, or a disk that fails: the place itself still has it
            return None
        return data if len(data) == location.length and crc32([data]) == location.crc32 else None

    def put(self, location: Location, data: bytes) -> None:
        """Keep the bytes of a sample, if its shard is one of those that are kept."""
        path = self._files.get(location.shard)
        if path is None or len(data) != location.length:
            return
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.pwrite(descriptor, data, location.offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written (%s): samples are fetched anew", path.parent, error.strerror)
            self._warned = True


class RemoteStorage:
    """A dataset behind a URL, as a `Storage`.

    Args:
        place: a URL, or `pipe:COMMAND`.
        options: how it is read.

    Attributes:
        folder: what is kept of it on this machine.
        shards: the dataset's, and which parts of them are here; None until the index is open.

    Raises:
        UserError: the place may not be read, or not by this installation.
    """

    def __init__(self, place: str, options: RemoteOptions, shards: ShardCache | None = None):
        self._place, self._options = place, options
        self._transport: Transport = connect(place, options.timeout_s, options.allow_pipe)
        self._pid = os.getpid()
        self._held: dict[Location, bytes | Exception] = {}
        self._given_up = threading.Event()
        root = options.cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fmscale"
        self.folder = root.absolute() / hashlib.sha256(place.encode()).hexdigest()[:16]
        self.shards = shards

    def __reduce__(self) -> tuple[type[RemoteStorage], tuple[Any, ...]]:
        return RemoteStorage, (self._place, self._options, self.shards)

    def where(self, name: str) -> str:
        """See `Storage`."""
        return self._transport.where(name)

    def expect(self, locations: Sequence[Location]) -> None:
        """See `Storage`: fetches what is not in the cache, all of it at once."""
        assert self.shards is not None, "the index is open"
        self._held = {}
        missing = []
        for location in locations:
            if not self.shards.holds(location):
                self._held[location] = OSError("its place in the index lies outside the shard")
            elif (data := self.shards.get(location)) is not None:
                self._held[location] = data
            else:
                missing.append(location)
        runs = _runs(missing)
        pool = ThreadPoolExecutor(min(REQUESTS, len(runs)) or 1)
        try:
            for fetched in pool.map(self._fetch, runs):
                self._held.update(fetched)
        except BaseException:
            self._given_up.set()  # whoever interrupts this does not want to wait for the rest
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, run: Sequence[Location]) -> dict[Location, bytes | Exception]:
        """The bytes of samples that lie side by side, or why they cannot be had: others are not to wait for that."""
        assert self.shards is not None, "the index is open"
        first, last = run[0], run[-1]
        found: dict[Location, bytes] = {}
        for _ in range(2):  # an answer may be cut or spoiled on its way; what comes twice is what is stored
            try:
                data = self._range(first.shard, first.offset, last.offset + last.length - first.offset)
            except (OSError, OutageError) as error:
                return dict.fromkeys(run, error)
            found = {place: data[place.offset - first.offset :][: place.length] for place in run}
            if all(crc32([part]) == place.crc32 for place, part in found.items()):
                break
        for place, part in found.items():
            self.shards.put(place, part)
        return {**found}

    def read(self, location: Location, buffers: Sequence[memoryview]) -> int:
        """See `Storage`."""
        if location not in self._held:
            self.expect([location])
        data = self._held[location]
        if isinstance(data, Exception):
            raise data
        done = 0
        for buffer in buffers:
            piece = data[done : done + len(buffer)]
            buffer[: len(piece)] = piece
            done += len(piece)
        return done

    def open(self, name: str) -> BinaryIO:
        """See `Storage`; before the index is open, or without one, the place is asked for the file's size."""
        if self.shards:
            size = self.shards.sizes[name]
        else:
            size = self._retried(name, lambda: self._transport.size(name))
        return cast(BinaryIO, io.BufferedReader(_Ranges(self, name, size), CHUNK_BYTES))

    def tars(self) -> list[str]:
        """Names of the tars directly in the place, sorted.

        Raises:
            UserError: it is no folder, or none that can be listed.
            OutageError: the place cannot be reached.
        """
        try:
            return self._retried("", self._transport.tars)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.where('')}: there is no such folder, or it cannot be listed") from None

    def fetch_index(self) -> Path:
        """Bring the index, and what lies beside it, to this machine; once for all processes.

        Returns:
            A folder that holds them.

        Raises:
            UserError: there is no index, or no room for it.
            OutageError: the place cannot be reached.
        """
        manifest_name = f"{FOLDER}/manifest.json"
        try:
            self._range(manifest_name, 0, 1)  # a server that ignores ranges is found out on a small file
            manifest = self._retried(manifest_name, lambda: self._transport.read(manifest_name, 0, None))
        except FileNotFoundError:
            raise UserError(
                f"{self.where(manifest_name)} is not there: run `fmscale index` where the tars lie, and put its folder "
                f"`{FOLDER}` beside them"
            ) from None
        try:
            files = _described(check_manifest(json.loads(manifest)))
        except BROKEN as error:
            raise UserError(f"{self.where(manifest_name)} is no manifest of this version ({error})") from error
        final = self.folder / f"index-{hashlib.sha256(manifest).hexdigest()[:16]}"
        with locked(self.folder / "lock"):
            if not final.is_dir():
                with new_folder(final) as folder:
                    (folder / FOLDER).mkdir()
                    for name, (size, digest) in files.items():
                        self._fetch_file(name, folder / name, size, digest)
                    (folder / manifest_name).write_bytes(manifest)
            for other in self.folder.glob("index-*"):  # of what the dataset was before
                if other != final:
                    shutil.rmtree(other, ignore_errors=True)
        return final

    def _fetch_file(self, name: str, to: Path, size: int, digest: str) -> None:
        """Write a file that is what the manifest says of it."""
        found = hashlib.sha256()
        try:
            with to.open("wb") as file:
                for start in range(0, size, PART_BYTES):
                    part = self._range(name, start, min(PART_BYTES, size - start))
                    file.write(part)
                    found.update(part)
        except FileNotFoundError:
            raise UserError(f"{self.where(name)} is not there: put the whole index there") from None
        sync(to)
        if found.hexdigest() != digest:
            raise OutageError(
                f"{self.where(name)} is not what the manifest beside it says; is it being written? Start again when "
                "the whole index is there"
            )

    def _range(self, name: str, offset: int, length: int) -> bytes:
        return self._retried(name, lambda: self._transport.read(name, offset, offset + length))

    def _retried(self, name: str, request: Callable[[], Result]) -> Result:
        """The answer to a request; one that fails is made again, after a pause that doubles each time."""
        if self._pid != os.getpid():  # connections do not survive a fork
            self._transport = connect(self._place, self._options.timeout_s, self._options.allow_pipe)
            self._pid = os.getpid()
        for attempt in range(1, self._options.attempts + 1):
            try:
                return request()
            except (FileNotFoundError, UserError):
                raise
            except Exception as error:  # each store's library has exceptions of its own
                cause = SECRET.sub("?…", f"{type(error).__name__}: {error}".rstrip(": ").replace("\n", " "))
                if attempt == self._options.attempts or self._transport.is_final(error):
                    tries = "once" if attempt == 1 else f"{attempt} times"
                    raise OutageError(f"{self.where(name)} cannot be read (tried {tries}): {cause}") from None
                log.warning("%s: %s; trying again (%d of %d)", self.where(name), cause, attempt, self._options.attempts)
                if self._given_up.wait(FIRST_DELAY_S * 2 ** (attempt - 1) * random.uniform(0.5, 1)):
                    raise OutageError(f"{self.where(name)} was given up") from None
        raise AssertionError("unreachable: the last attempt returns or raises")


def _runs(locations: Sequence[Location]) -> list[list[Location]]:
    """Samples grouped into stretches of bytes: each is one request."""
    runs: list[list[Location]] = []
    for place in sorted(locations):
        last = runs[-1][-1] if runs else None
        side_by_side = last and (last.shard, last.offset + last.length) == (place.shard, place.offset)
        if side_by_side and place.offset + place.length - runs[-1][0].offset <= PART_BYTES:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _described(manifest: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """Size and digest of each file that the manifest lies beside.

    Raises:
        ValueError, LookupError, TypeError: one is missing, or not described.
    """
    names = [*(f"{FOLDER}/{column}.npy" for column in COLUMNS), *([BESIDE] if BESIDE in manifest["files"] else [])]
    files = {name: (manifest["files"][name]["size"], manifest["files"][name]["sha256"]) for name in names}
    if not all(0 <= size < 2**50 and isinstance(digest, str) for size, digest in files.values()):
        raise ValueError("its files make no sense")
    return files


class _Ranges(io.RawIOBase):
    """A file read range by range, from its start to its end."""

    def __init__(self, storage: RemoteStorage, name: str, size: int):
        self._storage, self._name, self._size, self._position = storage, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET, "the end of the file is not known"
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        left = max(0, min(len(view), self._size - self._position))
        data = self._storage._range(self._name, self._position, left) if left else b""
        view[: len(data)] = data
        self._position += len(data)
        return len(data)
