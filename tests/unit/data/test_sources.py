from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from range_server import ERROR, SHORT, SOUND, TRUNCATE, serving

from fmscale.batch import BadSample
from fmscale.data import reasons
from fmscale.data.captions import Captions
from fmscale.data.sources import SourceImage, open_source, read_members, safe_key
from fmscale.data.tar import MAX_MEMBER_BYTES
from fmscale.errors import OutageError, UserError

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


def test_a_file_that_is_larger_than_any_picture_is_not_read(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    os.truncate(tmp_path / "a.png", MAX_MEMBER_BYTES + 1)
    detail = "'a.png' has 1073741825"
    assert read(tmp_path) == [BadSample("a", "a.png", reasons.TOO_MANY_BYTES, detail)]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    assert read(tmp_path) == [BadSample("a", "metadata.jsonl:1", reasons.TOO_MANY_BYTES, detail)]


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


def test_what_one_key_brings_together_is_bounded(
    tmp_path: Path, write_tar: WriteTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names with dots make one key of a whole tar, whose pictures are not held together."""
    monkeypatch.setattr("fmscale.data.sources.MAX_MEMBER_BYTES", 2 * len(RED))
    many = [(f"shot.{number}.png", RED) for number in range(5)]
    write_tar(
        tmp_path / "x.tar", [*many, ("y.png", RED), ("y.txt", b"t" * len(RED) + b"t"), ("z.png", RED), ("z.txt", b"t")]
    )
    (unit,) = open_source(tmp_path)
    first, second, sound = unit.read()
    names = "'shot.0.png', 'shot.1.png', 'shot.2.png' and 2 more (a key ends at the first dot of a name)"
    assert first == BadSample("x__shot", "x.tar", reasons.NO_IMAGE, names)
    assert second == BadSample(
        "x__y", "x.tar", reasons.TOO_MANY_BYTES, f"{2 * len(RED) + 1} in all members of this key"
    )
    assert isinstance(sound, SourceImage)
    with (tmp_path / "x.tar").open("rb") as file:
        assert [len(content) for _, content in read_members(file, Captions())][:5] == [len(RED)] * 2 + [0] * 3


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


def write_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(RED)


def test_the_table_of_a_hugging_face_image_folder_names_images_and_captions(tmp_path: Path) -> None:
    write_images(tmp_path, "train/a.png", "train/b/c.jpg", "test/d.png", "test/not_named.png")
    (tmp_path / "train/metadata.csv").write_text(
        'file_name,text,aesthetic\na.png,"red, and\nmore",5.5\nb/c.jpg,,6\nmissing.png,x,7\n'
    )
    lines = ['{"file_name": "d.png", "text": "rot", "n": 1}', "", "{", '{"text": "x"}', '{"file_name": "d.png"}']
    lines += [f'{{"file_name": "{name}", "text": "x"}}' for name in ("../train/a.png", "/etc/passwd", "\\ud800.png")]
    (tmp_path / "test/metadata.jsonl").write_text("\n".join(lines))
    found = read(tmp_path)
    first, last = {"file_name": "d.png", "text": "rot", "n": 1}, {"file_name": "a.png", "text": "red, and\nmore"}
    assert found[0] == image("test__d", "rot", "test/d.png", "json.text", first)
    assert found[7] == image("train__a", "red, and\nmore", "train/a.png", "json.text", last | {"aesthetic": "5.5"})
    bad = [item for item in found if isinstance(item, BadSample)]
    assert [(item.key, item.shard, item.reason) for item in bad] == [
        ("", "test/metadata.jsonl:3", reasons.BAD_JSON),
        ("", "test/metadata.jsonl:4", reasons.NO_IMAGE),
        ("test__d", "test/metadata.jsonl:5", reasons.SAME_KEY),
        ("", "test/metadata.jsonl:6", reasons.NO_IMAGE),
        ("", "test/metadata.jsonl:7", reasons.NO_IMAGE),
        ("", "test/metadata.jsonl:8", reasons.NO_IMAGE),
        ("train__b__c", "train/metadata.csv:4", reasons.NO_CAPTION),
        ("train__missing", "train/metadata.csv:5", reasons.UNREADABLE),
    ]
    assert len(found) == len(bad) + 2
    units = open_source(tmp_path, files_per_unit=4)
    assert [item for unit in units for item in pickle.loads(pickle.dumps(unit)).read()] == found  # noqa: S301
    assert len({unit.name for unit in units}) == 3


def test_tables_that_are_none_are_the_users_error(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("name,text\na.png,x\n")
    with pytest.raises(UserError, match=r"metadata.csv has no column 'file_name'"):
        open_source(tmp_path)
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\n\xe9,x\n")
    with pytest.raises(UserError, match=r"metadata.csv cannot be read: .*utf-8"):
        open_source(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"holds metadata.csv and metadata.jsonl: remove one"):
        open_source(tmp_path)


@pytest.fixture
def shards(tmp_path: Path, write_tar: WriteTar) -> Path:
    """Two tars in each of two folders, of 5 samples of 3 MB."""
    noise = np.random.default_rng(0)
    for name in ("a/00.tar", "a/01.tar", "b/00.tar", "b/01.tar"):
        keys = [f"{name[0]}{number}" for number in range(5)]
        members = [
            (f"{key}.{end}", data) for key in keys for end, data in (("jpg", noise.bytes(3 << 20)), ("txt", b"t"))
        ]
        write_tar(tmp_path / "tars" / name, members)
    return tmp_path / "tars"


def test_braces_name_many_tars(shards: Path) -> None:
    units = open_source(f"{shards}/{{a,b}}/{{00..01}}.tar")
    assert [unit.name for unit in units] == ["a__00", "a__01", "b__00", "b__01"]
    keys = [item.key for unit in units for item in unit.read()]
    assert len(set(keys)) == 20
    assert keys[0] == "a__00__a0"
    with pytest.raises(UserError, match=r"a/02.tar: no such tar"):
        open_source(f"{shards}/{{a,b}}/{{00..02}}.tar")


@pytest.mark.parametrize("fault", [SOUND, ERROR, TRUNCATE, SHORT])
def test_tars_behind_a_url_are_those_of_the_folder(shards: Path, fault: str) -> None:
    """Whatever passes goes wrong on the way; and each is fetched once, from start to end."""
    with serving(shards) as server:
        server.fault = lambda request: fault if request.before == 0 else SOUND
        units = open_source(f"{server.url}/{{a,b}}/{{00..01}}.tar")
        assert pickle.loads(pickle.dumps(units[1])).name == units[1].name == "a__01"  # noqa: S301
        found = [item for unit in units for item in unit.read()]
        assert found == read(f"{shards}/{{a,b}}/{{00..01}}.tar")
        if fault == SOUND:
            starts = [request.start for request in server.requests if request.name == "a/00.tar"]
            assert len(starts) < 8
            assert starts == sorted(starts)


def test_a_tar_that_is_not_behind_the_url_is_counted_and_an_outage_is_none_of_its_images(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmscale.data.remote.FIRST_DELAY_S", 0.001)
    with serving(shards) as server:
        units = open_source(f"{server.url}/a/{{00..02}}.tar")
        assert list(units[2].read()) == [BadSample("", "02.tar", reasons.UNREADABLE, "there is no such tar")]
        server.fault = lambda request: ERROR if request.start > 1 else SOUND
        with pytest.raises(OutageError, match=r"a/00.tar cannot be read \(tried 6 times\)"):
            list(units[0].read())


def test_a_folder_behind_a_url_is_listed(shards: Path) -> None:
    """By Python's own web server, as nginx and Apache do it."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert [unit.name for unit in open_source(f"{url}/b/")] == ["00", "01"]
        with pytest.raises(UserError, match=r"lists no \*.tar: name them, such as http://.*/\{00000..00099\}.tar"):
            open_source(url)
        with pytest.raises(UserError, match="there is no such folder, or it cannot be listed"):
            open_source(f"{url}/none")
        server.shutdown()


@pytest.mark.parametrize("place", ["pipe:cat {name} {range}", "pipe:cat {name} {range} x.tar"])
def test_programs_do_not_give_images(place: str) -> None:
    with pytest.raises(UserError, match="images are not read through `pipe:`"):
        open_source(place)


def test_safe_keys_are_safe_and_never_fall_together() -> None:
    names = ["a/b", "a__b", "a.b", "a_b", "a_/b", "a/_b", "a\nb", "a/b.c", "a\udc80b", "é/ü 1"]
    keys = [safe_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(key.isprintable() and not set(key) & set("./") for key in keys)
    assert (keys[0], keys[3], keys[9]) == ("a__b", "a_b", "é__ü 1")
