from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fmscale.batch import BadSample
from fmscale.data import reasons
from fmscale.data.captions import Captions
from fmscale.data.sources import SourceImage, open_source, safe_key
from fmscale.errors import UserError

WriteTar = Callable[[Path, list[tuple[str, bytes]]], None]


def picture(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(file, "PNG")
    return file.getvalue()


RED = picture("red")


def read(place: Path | str, captions: Captions | None = None) -> list[SourceImage | BadSample]:
    return [item for unit in open_source(place, captions) for item in unit.read()]


def image(key: str, caption: str, source: str, place: str = "txt", meta: dict | None = None) -> SourceImage:
    return SourceImage(key, RED, caption, source, {place: caption}, place, meta or {})


def test_a_folder_gives_pictures_with_the_text_beside_them(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("z.png", "b/c/x.v1.JPG", "b/no_text.png", "b/empty.webp", "b/latin.png", "b/json.gif"):
        (tmp_path / name).write_bytes(RED)
    (tmp_path / "z.txt").write_text(" a red thing\n")
    (tmp_path / "b/c/x.v1.txt").write_text("rouge é")
    (tmp_path / "b/empty.txt").write_text(" \n")
    (tmp_path / "b/latin.txt").write_bytes(b"\xe9")
    (tmp_path / "b/json.json").write_text('{"caption": "red", "a": 1}')
    looked_for = "looked for txt, json.caption, json.text"
    found = read(tmp_path)
    assert found[:5] == [
        image("z", "a red thing", "z.png"),
        BadSample("b__empty", "b/empty.webp", reasons.NO_CAPTION, looked_for),
        image("b__json", "red", "b/json.gif", "json.caption", {"caption": "red", "a": 1}),
        BadSample("b__latin", "b/latin.png", reasons.BAD_CAPTION, "txt is not UTF-8 (unexpected end of data)"),
        BadSample("b__no_text", "b/no_text.png", reasons.NO_CAPTION, looked_for),
    ]
    assert isinstance(found[5], SourceImage)
    assert (found[5].caption, found[5].source) == ("rouge é", "b/c/x.v1.JPG")
    assert found[5].key.startswith("b__c__x_v1-")


def test_two_pictures_of_one_name_are_not_both_taken(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.jq.png", "a.png"):
        (tmp_path / name).write_bytes(RED)
        (tmp_path / name).with_suffix(".txt").write_text("text")
    found = read(tmp_path)
    assert [type(item) for item in found] == [SourceImage, BadSample, SourceImage]
    assert found[1] == BadSample("a", "a.png", reasons.SAME_KEY, "its caption belongs to a.jpg")


def test_a_folder_is_cut_into_runs_whose_names_say_what_is_in_them(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.jpg", "c.png", "d/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(RED)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    units = open_source(tmp_path, files_per_unit=2)
    assert [[item.key for item in unit.read()] for unit in units] == [["a", "b"], ["c", "c", "d__e"]]
    assert [unit.name[:12] for unit in units] == ["files-00000-", "files-00001-"]
    assert list(pickle.loads(pickle.dumps(units[1])).read()) == list(units[1].read())  # noqa: S301
    (tmp_path / "c2.png").write_bytes(RED)
    later = open_source(tmp_path, files_per_unit=2)
    assert later[0].name == units[0].name
    assert len({unit.name for unit in (*units, *later)}) == 4


def test_tars_give_txt_or_json_captions(tmp_path: Path, write_tar: WriteTar) -> None:
    meta = {"caption": "from json", "width": 4}
    write_tar(tmp_path / "00000.tar", [("000000001.jpg", RED), ("000000001.txt", b"from txt"), ("000000002.png", RED)])
    write_tar(tmp_path / "00001.tar", [("d/1.webp", RED), ("d/1.json", json.dumps(meta).encode()), ("d/2.json", b"{}")])
    assert [unit.name for unit in open_source(tmp_path)] == ["00000", "00001"]
    assert read(tmp_path) == [
        image("00000__000000001", "from txt", "00000.tar/000000001"),
        BadSample("00000__000000002", "00000.tar", reasons.NO_CAPTION, "looked for txt, json.caption, json.text"),
        image("00001__d__1", "from json", "00001.tar/d/1", "json.caption", meta),
        BadSample("00001__d__2", "00001.tar", reasons.NO_IMAGE, "none (a key ends at the first dot of a name)"),
    ]
    assert read(tmp_path / "00001.tar") == read(tmp_path)[2:]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("v1.5_a.jpg", RED), ("v1.7_b.jpg", RED), ("v1.txt", b"x")], reasons.NO_IMAGE),
        ([("a.jpg", RED), ("a.json", b"{")], reasons.BAD_JSON),
        ([("a.jpg", RED), ("a.json", b"[]")], reasons.BAD_JSON),
        ([("a.jpg", RED), ("a.json", b'{"caption": null}')], reasons.NO_CAPTION),
        ([("a.jpg", RED), ("a.json", b'{"caption": 5}')], reasons.BAD_CAPTION),
        ([("a.jpg", RED), ("a.json", b'{"caption": "\\ud800"}')], reasons.BAD_CAPTION),
    ],
)
def test_tar_samples_that_cannot_be_used_are_named(tmp_path: Path, members, reason: str, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "x.tar", [*members, ("z.jpg", RED), ("z.txt", b"sound")])
    bad, sound = read(tmp_path)
    assert isinstance(bad, BadSample)
    assert bad.reason == reason
    assert isinstance(sound, SourceImage)


def test_a_key_that_comes_twice_is_named(tmp_path: Path, write_tar: WriteTar) -> None:
    sample = [("a.jpg", RED), ("a.txt", b"x")]
    write_tar(tmp_path / "x.tar", [*sample, ("b.jpg", RED), ("b.txt", b"x"), *sample])
    *sound, bad = read(tmp_path)
    assert [item.key for item in sound] == ["x__a", "x__b"]
    assert isinstance(bad, BadSample)
    assert (bad.key, bad.shard, bad.reason) == ("x__a", "x.tar", reasons.SAME_KEY)


def test_a_cut_tar_is_named_and_the_others_are_read(tmp_path: Path, write_tar: WriteTar) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(
            tmp_path / name, [(f"{key}.{end}", data) for key in "xyz" for end, data in (("jpg", RED), ("txt", b"t"))]
        )
    with (tmp_path / "a.tar").open("r+b") as file:
        file.truncate(4096)  # of three samples of 2048 bytes; who knows whether the second is whole
    found = read(tmp_path)
    assert [item.key for item in found] == ["a__x", "", "b__x", "b__y", "b__z"]
    detail = "it stops at byte 4096 without an end mark: it was cut short; the rest of this tar is not read"
    assert found[1] == BadSample("", "a.tar", reasons.DAMAGED_TAR, detail)


def test_sources_that_hold_nothing_are_the_users_error_at_once(tmp_path: Path, write_tar: WriteTar) -> None:
    with pytest.raises(UserError, match="no such folder or tar"):
        open_source(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no \*.tar and no image"):
        open_source(tmp_path)
    write_tar(tmp_path / "x.tar", [])
    (tmp_path / "a.png").write_bytes(RED)
    with pytest.raises(UserError, match=r"holds both tars and images \(a.png\)"):
        open_source(tmp_path)


def test_safe_keys_are_safe_and_never_fall_together() -> None:
    names = ["a/b", "a__b", "a.b", "a_b", "a_/b", "a/_b", "a\nb", "a/b.c", "a\udc80b", "é/ü 1"]
    keys = [safe_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(key.isprintable() and not set(key) & set("./") for key in keys)
    assert (keys[0], keys[3], keys[9]) == ("a__b", "a_b", "é__ü 1")
