"""Where images and their captions come from: a source is a list of units, each the work of one claim.

open_source   place -> units
TarUnit       a WebDataset tar, here or behind a URL
FolderUnit    a run of the images of a folder, captions beside them
TableUnit     a run of the rows of a Hugging Face image folder's table
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol, TypeVar

from braceexpand import braceexpand

from fmscale.batch import BadSample
from fmscale.data import reasons
from fmscale.data.captions import Captions
from fmscale.data.reasons import ImageError
from fmscale.data.remote import RemoteOptions, RemoteStorage
from fmscale.data.storage import LocalStorage
from fmscale.data.tables import NAMES as TABLES
from fmscale.data.tables import Row, read_tables
from fmscale.data.tar import MAX_MEMBER_BYTES, DamageError, Member, find_tars, walk
from fmscale.data.transport import PIPE, is_remote
from fmscale.errors import OutageError, UserError

Item = TypeVar("Item")
# What says nothing of a file: it may be read well a while later.
PASSING = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.EAGAIN)
SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif"})


@dataclass(frozen=True)
class SourceImage:
    """A picture as it lies in its source.

    Attributes:
        key: unique in the source, without dots or slashes: the key of the sample made of it.
        data: the encoded file.
        caption: the one that was drawn; not empty.
        source: where it came from, for people: a path, or shard and member.
        captions: all of them, by place (see `Captions`).
        caption_from: the place of the one that was drawn.
        meta: its json, where the source has one.
    """

    key: str
    data: bytes
    caption: str
    source: str
    captions: Mapping[str, str]
    caption_from: str
    meta: dict[str, Any] = field(default_factory=dict)


class Unit(Protocol):
    """A piece of a source. It can be pickled; reading it twice gives the same images in the same order."""

    @property
    def name(self) -> str:
        """Unique in the source, fit for a file's name; it changes where other images come to belong to the unit."""

    def read(self) -> Iterator[SourceImage | BadSample]:
        """Every image, one at a time, or why it cannot be used.

        Raises:
            OutageError: the place cannot be reached.
        """


def open_source(place: str | Path, captions: Captions | None = None, files_per_unit: int = 10_000) -> Sequence[Unit]:
    """The units of a source, in an order that never changes.

    Args:
        place: a folder of images (at any depth) with a .txt or .json beside each; or one with `metadata.csv` or
            `metadata.jsonl`, as Hugging Face's `datasets` reads it: a row has `file_name` and columns, which are the
            image's json; or a WebDataset tar, or a folder of them, as img2dataset writes them: KEY.jpg with KEY.txt, or
            with "caption" in KEY.json. Tars may lie behind a URL, and `{00000..00099}.tar` names many.
        captions: which captions are taken.
        files_per_unit: images of a folder that make one unit, > 0.

    Raises:
        UserError: there is no such place, or it holds nothing of these, or of two kinds.
        OutageError: the place cannot be reached.
    """
    captions, text = captions or Captions(), str(place)
    if text.endswith(".tar") or is_remote(text):
        storage, names = _find_tars(text)
        return [TarUnit(storage, name, captions) for name in names]
    path = Path(place)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder or tar: give a folder of images with captions, or of WebDataset tars")
    tars = find_tars(path)
    tables, images = _scan(path)
    if tars and images:
        raise UserError(f"{path} holds both tars and images ({images[0]}): give a folder that holds one kind")
    if not tars and not images:
        raise UserError(f"{path} holds no *.tar and no image ({', '.join(sorted(SUFFIXES))}): give another folder")
    if tars:
        return [TarUnit(LocalStorage(path), tar.name, captions) for tar in tars]
    if tables:
        runs = _cut(read_tables(path, tables), files_per_unit)
        return [TableUnit(path, number, run, captions) for number, run in enumerate(runs)]
    same = [tuple(group) for _, group in groupby(images, key=lambda file: os.path.splitext(file)[0])]
    return [FolderUnit(path, number, run, captions) for number, run in enumerate(_cut(same, files_per_unit))]


def _cut(items: Sequence[Item], size: int) -> list[tuple[Item, ...]]:
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]


def _find_tars(place: str) -> tuple[LocalStorage | RemoteStorage, list[str]]:
    """Names of tars, and what opens them, of `…/NAME.tar`, which may have braces, or of a folder behind a URL."""
    if place.startswith(PIPE):
        raise UserError("images are not read through `pipe:`; give a folder or a URL")
    if not place.endswith(".tar"):
        remote = RemoteStorage(place, RemoteOptions())
        if not (names := remote.tars()):
            raise UserError(f"{place} lists no *.tar: name them, such as {place.rstrip('/')}/{{00000..00099}}.tar")
        return remote, names
    cut = place.partition("{")[0].rfind("/") + 1
    names = list(braceexpand(place[cut:]))
    if is_remote(place):
        return RemoteStorage(place[:cut], RemoteOptions()), names
    local = LocalStorage(Path(place[:cut]))
    for name in names:
        if not Path(local.where(name)).is_file():
            raise UserError(f"{local.where(name)}: no such tar")
    return local, names


def _scan(folder: Path) -> tuple[list[Path], list[str]]:
    """Tables, and paths in the folder of images, at any depth, in an order that is the same everywhere.

    Images that differ in nothing but the extension follow one another.
    """
    tables, images = [], []
    for root, folders, files in os.walk(folder, onerror=_refuse_folder):
        folders.sort()
        beside = Path(root).relative_to(folder).as_posix()
        prefix = "" if beside == "." else f"{beside}/"  # once per folder: paths are slow, and images may be millions
        tables += [Path(root, name) for name in sorted(files) if name in TABLES]
        names = [name for name in files if name.rpartition(".")[2].lower() in SUFFIXES and not name.startswith(".")]
        images += [prefix + name for name in sorted(names, key=os.path.splitext)]
    return tables, images


def _refuse_folder(error: OSError) -> NoReturn:
    raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


@dataclass(frozen=True)
class FolderUnit:
    """A run of the images of a folder.

    Attributes:
        folder: of the source.
        number: of the run, from 0.
        files: paths in the folder; those that differ in nothing but the extension are together.
        captions: which are taken.
    """

    folder: Path
    number: int
    files: tuple[tuple[str, ...], ...]
    captions: Captions

    @property
    def name(self) -> str:
        """See `Unit`."""
        return _run_name(self.number, [file for same in self.files for file in same])

    def read(self) -> Iterator[SourceImage | BadSample]:
        """See `Unit`."""
        for file, *others in self.files:
            key = safe_key(os.path.splitext(file)[0])
            yield self._image(key, file)
            for other in others:
                yield BadSample(key, other, reasons.SAME_KEY, f"its caption belongs to {file}")

    def _image(self, key: str, file: str) -> SourceImage | BadSample:
        path = self.folder / file
        beside = {end: path.with_suffix(f".{end}") for end in sorted({"json", *self.captions.extensions})}
        try:
            texts = {end: _content(other) for end, other in beside.items() if other.is_file()}
            return make_image(key, _content(path), texts, file, self.captions)
        except ImageError as error:
            return BadSample(key, file, error.reason, error.detail)
        except OSError as error:
            return BadSample(key, file, reasons.UNREADABLE, str(error))


def _content(path: Path) -> bytes:
    if (size := path.stat().st_size) > MAX_MEMBER_BYTES:
        raise ImageError(reasons.TOO_MANY_BYTES, f"{path.name!r} has {size}")
    return path.read_bytes()


def _run_name(number: int, members: Sequence[str]) -> str:
    digest = hashlib.blake2b("\0".join(members).encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
    return f"files-{number:05d}-{digest}"


@dataclass(frozen=True)
class TableUnit:
    """A run of the images that tables name.

    Attributes:
        folder: of the source.
        number: of the run, from 0.
        rows: of the tables.
        captions: which are taken.
    """

    folder: Path
    number: int
    rows: tuple[Row, ...]
    captions: Captions

    @property
    def name(self) -> str:
        """See `Unit`."""
        return _run_name(self.number, [row.text for row in self.rows])

    def read(self) -> Iterator[SourceImage | BadSample]:
        """See `Unit`."""
        for row in self.rows:
            key = safe_key(os.path.splitext(row.file)[0]) if row.file else ""
            try:
                if row.problem:
                    raise row.problem
                data = _content(self.folder / row.file)
                yield make_image(key, data, {"json": row.text.encode()}, row.file, self.captions)
            except ImageError as error:
                yield BadSample(key, row.place, error.reason, error.detail)
            except OSError as error:
                yield BadSample(key, row.place, reasons.UNREADABLE, str(error))


@dataclass(frozen=True)
class TarUnit:
    """A WebDataset tar.

    Attributes:
        storage: that holds it.
        file: its name there.
        captions: which are taken.
    """

    storage: LocalStorage | RemoteStorage
    file: str
    captions: Captions

    @property
    def name(self) -> str:
        """See `Unit`."""
        return safe_key(self.file.removesuffix(".tar"))

    def read(self) -> Iterator[SourceImage | BadSample]:
        """See `Unit`."""
        return (image for image, _ in self.read_places())

    def read_places(self) -> Iterator[tuple[SourceImage | BadSample, tuple[int, int]]]:
        """What `read` gives, each with the offset in the tar and the length of its members, headers included."""
        try:
            with self.storage.open(self.file) as file:
                yield from self._samples(file)
        except FileNotFoundError:
            yield BadSample("", self.file, reasons.UNREADABLE, "there is no such tar"), (0, 0)
        except OSError as error:
            if error.errno in PASSING:
                raise OutageError(f"{self.storage.where(self.file)}: cannot be read now: {error.strerror}") from error
            yield BadSample("", self.file, reasons.UNREADABLE, str(error)), (0, 0)
        except DamageError as error:
            detail = f"{error}; the rest of this tar is not read"
            yield BadSample("", self.file, reasons.DAMAGED_TAR, detail), (0, 0)

    def _samples(self, file: BinaryIO) -> Iterator[tuple[SourceImage | BadSample, tuple[int, int]]]:
        seen: set[str] = set()
        for name, run in groupby(read_members(file, self.captions), key=lambda content: content[0].key):
            key = safe_key(f"{self.file.removesuffix('.tar')}/{name}")
            members = list(run)
            begin = members[0][0].offset
            image: SourceImage | BadSample
            try:
                if name in seen:
                    raise ImageError(reasons.SAME_KEY, "or its members do not lie side by side in the tar")
                seen.add(name)
                image = join_members(members, key, f"{self.file}/{name}", self.captions)
            except ImageError as error:
                image = BadSample(key, self.file, error.reason, error.detail)
            yield image, (begin, members[-1][0].end - begin)


def read_members(file: BinaryIO, captions: Captions, whole: bool = True) -> Iterator[tuple[Member, bytes]]:
    """Members of a tar with the bytes of those that are of use.

    Args:
        file: from a network, it is read once, from start to end.
        captions: which are taken.
        whole: as for `walk`.

    Raises:
        DamageError: as for `walk`.
    """
    wanted = {*SUFFIXES, "json", *captions.extensions}
    key, held_bytes = "", 0
    for member in walk(file, whole):
        key, held_bytes = member.key, member.size + (held_bytes if member.key == key else 0)
        content = b""
        if member.extension in wanted and held_bytes <= MAX_MEMBER_BYTES:
            file.seek(member.start)
            content = file.read(member.size)
        yield member, content


def join_members(members: Sequence[tuple[Member, bytes]], key: str, source: str, captions: Captions) -> SourceImage:
    """The image of one key's members.

    Args:
        members: of a tar, with their bytes.
        key, source, captions: as for `make_image`.

    Raises:
        ImageError: not one image, too many bytes, or as for `make_image`.
    """
    images = [(member, content) for member, content in members if member.extension in SUFFIXES]
    if len(images) != 1:
        names = ", ".join(repr(member.name) for member, _ in images[:3]) or "none"
        more = f" and {len(images) - 3} more" if len(images) > 3 else ""
        raise ImageError(reasons.NO_IMAGE, f"{names}{more} (a key ends at the first dot of a name)")
    if (size := sum(member.size for member, _ in members)) > MAX_MEMBER_BYTES:
        raise ImageError(reasons.TOO_MANY_BYTES, f"{size} in all members of this key")
    texts = {member.extension: content for member, content in members if member.extension not in SUFFIXES}
    return make_image(key, images[0][1], texts, source, captions)


def make_image(key: str, data: bytes, texts: Mapping[str, bytes], source: str, captions: Captions) -> SourceImage:
    """Put an image and what lies beside it together.

    Args:
        key: of the image.
        data: the encoded file.
        texts: what lies beside it, by extension.
        source: where it came from, for people.
        captions: which are taken.

    Raises:
        ImageError: no caption, or the json is none.
    """
    meta = _object(texts["json"]) if "json" in texts else {}
    chosen, every = captions.choose(key, texts, meta)
    return SourceImage(key, data, every[chosen], source, every, chosen, meta)


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(reasons.BAD_JSON, str(error)) from error
    if not isinstance(value, dict):
        raise ImageError(reasons.BAD_JSON, f"it is a {type(value).__name__}")
    return value


def safe_key(name: str) -> str:
    """A sample key made of a path: no slash, dot or unprintable character.

    Slashes become `__`; where the path cannot be told from the key, a digest of the path is added.
    """
    key = "".join(char if char.isprintable() and char != "." else "_" for char in name).replace("/", "__")
    if key.replace("__", "/") == name:
        return key
    return f"{key}-{hashlib.blake2b(os.fsencode(name), digest_size=6).hexdigest()}"
