"""The tables of a Hugging Face image folder: `metadata.csv` or `metadata.jsonl`, a row for each image."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fmscale.data.reasons import BAD_JSON, NO_IMAGE, SAME_KEY, ImageError
from fmscale.errors import UserError

NAMES = frozenset({"metadata.csv", "metadata.jsonl"})
COLUMN = "file_name"


class Row(NamedTuple):
    """What a table says of an image.

    Attributes:
        place: table and line, for people.
        file: the image's path in the source's folder; empty where the row does not name it.
        text: the row as json.
        problem: why it cannot be used, or None.
    """

    place: str
    file: str
    text: str
    problem: ImageError | None


def read_tables(folder: Path, tables: Sequence[Path]) -> list[Row]:
    """The rows of tables, one after another; an image that comes twice has a problem from the second time on.

    Args:
        folder: of the source.
        tables: in it, sorted.

    Raises:
        UserError: one is no table, or has no column `file_name`; or two are of one folder.
    """
    for first, second in pairwise(tables):
        if first.parent == second.parent:
            raise UserError(f"{first.parent} holds {first.name} and {second.name}: remove one of them")
    seen: set[str] = set()
    rows = []
    for table in tables:
        beside = table.parent.relative_to(folder)
        for line, text in _lines(table):
            place = f"{table.relative_to(folder).as_posix()}:{line}"
            file, problem = "", None
            try:
                file = (beside / _file_name(text)).as_posix()
                stem = os.path.splitext(file)[0]
                if stem in seen:
                    raise ImageError(SAME_KEY, f"{file} has been named before")
                seen.add(stem)
            except ImageError as error:
                problem = error
            rows.append(Row(place, file, text, problem))
    return rows


def _file_name(text: str) -> str:
    """The image's path, which may not lead out of the table's folder.

    Raises:
        ImageError: the row has none.
    """
    try:
        row: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageError(BAD_JSON, str(error)) from error
    name = row.get(COLUMN) if isinstance(row, dict) else None
    if not isinstance(name, str) or not name:
        raise ImageError(NO_IMAGE, f"the row has no {COLUMN}")
    try:
        os.fsencode(name)
    except UnicodeEncodeError as error:
        raise ImageError(NO_IMAGE, f"{COLUMN} {name!r} is no name of a file") from error
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ImageError(NO_IMAGE, f"{COLUMN} {name!r} leads out of the folder")
    return path.as_posix()


def _lines(table: Path) -> Iterator[tuple[int, str]]:
    """Number and json of each row."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".jsonl":
                yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
                return
            reader = csv.DictReader(file, strict=True)
            if COLUMN not in (reader.fieldnames or ()):
                raise UserError(f"{table} has no column {COLUMN!r}, which names the image of each row")
            for row in reader:
                row.pop(None, None)  # what a row has beyond the columns
                yield reader.line_num, json.dumps(row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read: {error}") from error
