from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import pytest
import webdataset

from fmscale.data.tar import DamageError, find_tars, walk


def pack(names: list[str], size: int = 700, **options: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = size
            archive.addfile(info, io.BytesIO(bytes(size)))
    return buffer.getvalue()


def test_members_cover_their_bytes() -> None:
    data = pack(["a/b.c/x.v1.TXT", "y.json", "é" * 120 + ".txt"])  # the last one needs an extended header
    members = list(walk(io.BytesIO(data)))
    assert [(member.key, member.extension) for member in members[:2]] == [("a/b.c/x", "txt"), ("y", "json")]
    assert [member.offset for member in members] == [0, members[0].end, members[1].end]
    assert members[2].start - members[2].offset > tarfile.BLOCKSIZE
    assert data[members[2].end :].strip(b"\0") == b""


def test_names_group_as_in_stock_webdataset(tmp_path: Path) -> None:
    names = ["__meta__/x.txt", "a.jpg", "a.txt", "d/b.v1.jpg", "nodot", ".hidden", "./c.jpg", "e.x/f.jpg"]
    (tmp_path / "x.tar").write_bytes(pack(names))
    stock = [s["__key__"] for s in webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)]
    assert list(dict.fromkeys(member.key for member in walk(io.BytesIO(pack(names))))) == stock


def test_a_slice_of_whole_members_needs_no_end_mark() -> None:
    data = pack(["a.txt", "b.txt", "c.txt"])
    members = list(walk(io.BytesIO(data)))
    part = data[members[1].offset : members[1].end]
    assert [member.key for member in walk(io.BytesIO(part), whole=False)] == ["b"]
    with pytest.raises(DamageError, match="end mark"):
        list(walk(io.BytesIO(part)))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:1536] + bytes([data[1536] ^ 1]) + data[1537:], "no sound tar header at byte 1536"),
        (lambda data: data[:1536] + bytes(1024) + data[2560:], "no sound tar header at byte 1536"),
        (lambda data: data[:1536], "stops at byte 1536 without an end mark"),
        (lambda data: data[:2500], "unexpected end of data"),
        (lambda data: data[:1700], "byte 1536"),
        (lambda data: b"", "empty file"),
        (lambda data: b"x" * 5000, "not a sound tar archive"),
    ],
)
def test_what_stock_readers_take_for_the_end_is_damage(damage, reason: str) -> None:
    with pytest.raises(DamageError, match=reason):
        list(walk(io.BytesIO(damage(pack(["a.txt", "b.txt", "c.txt"])))))


def test_sparse_members_are_refused() -> None:
    info = tarfile.TarInfo("a.txt")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 0
    data = info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    with pytest.raises(DamageError, match=r"'a\.txt' is a sparse file"):
        list(walk(io.BytesIO(data)))


def test_a_negative_size_does_not_lead_round_in_circles() -> None:
    info = tarfile.TarInfo("b.txt")
    info.size = -1024
    data = pack(["a.txt"])[:1536] + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    with pytest.raises(DamageError):
        list(walk(io.BytesIO(data)))


def test_no_random_damage_escapes_as_another_error() -> None:
    draw = random.Random(0)
    names = ["a.txt", "b" * 120 + ".txt", "c.txt"]
    sound = [pack(names, format=form) for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)]
    refused = 0
    for _ in range(600):
        data = bytearray(draw.choice(sound))
        for _ in range(draw.choice([1, 3, 30])):
            data[draw.randrange(4096)] = draw.randrange(256)
        try:
            list(walk(io.BytesIO(bytes(data))))
        except DamageError:
            refused += 1
    assert refused > 100


def test_find_tars_sorts_and_ignores_other_files(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.tar.partial", "d.txt"):
        (tmp_path / name).touch()
    (tmp_path / "e.tar").mkdir()
    assert [path.name for path in find_tars(tmp_path)] == ["a.tar", "b.tar"]
