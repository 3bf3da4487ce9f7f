from __future__ import annotations

import json
import logging
import pickle
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from range_server import (
    ERROR,
    FORBIDDEN,
    REDIRECT,
    SHORT,
    SOUND,
    SPOILED,
    STALL,
    TRUNCATE,
    WHOLE,
    Request,
    Server,
    serving,
)

from fmscale.batch import BadSample, Batch
from fmscale.data.index import Index, verify
from fmscale.data.index_build import build_index
from fmscale.data.loader import build_loader
from fmscale.data.mixture import Mixture
from fmscale.data.order import split
from fmscale.data.remote import RemoteOptions, open_index
from fmscale.errors import OutageError, UserError
from fmscale.files import sha256

STEPS = 8  # of 8 images: every sample comes at least once


@pytest.fixture
def server(index: Index) -> Iterator[Server]:
    with serving(index.path) as running:
        yield running


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteOptions:
    """Short pauses, and a cache for nothing but the index."""
    monkeypatch.setattr("fmscale.data.remote.FIRST_DELAY_S", 0.01)
    return RemoteOptions(tmp_path / "cache", timeout_s=20, attempts=4)


def batches(index: Index, workers: int = 0, run: int = 1) -> list[Batch]:
    mixture = Mixture([index])
    order, parts = mixture.order(8, seed=0, run=run), split(8, 1, 8)

    def noise(shape: tuple[int, ...], *_: object) -> torch.Tensor:
        return torch.zeros(shape)

    return list(
        build_loader(mixture, order, parts, rank=0, start_step=0, stop_step=STEPS, noise=noise, workers=workers)
    )


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in other.tensors)


def shard_requests(server: Server) -> list[Request]:
    return [request for request in server.requests if request.name.endswith(".tar")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_behind_a_url_gives_the_batches_of_the_folder(
    index: Index, server: Server, options: RemoteOptions, workers: int
) -> None:
    remote = open_index(server.url, options)
    assert (remote.place, len(remote), remote.fingerprint) == (server.url, len(index), index.fingerprint)
    assert_same(batches(remote, workers), batches(index))
    assert shard_requests(server)


def test_the_index_is_fetched_once(index: Index, server: Server, options: RemoteOptions) -> None:
    first = open_index(server.url + "/", options)
    second = open_index(server.url + "/", options)
    assert first.path == second.path
    counts = Counter(request.name for request in server.requests)
    assert counts["index/manifest.json"] == 4  # twice each time: to try byte ranges, and to see whether it has changed
    assert counts["index/offset.npy"] == counts["index/keys.npy"] == 1


def test_an_index_that_has_changed_is_fetched_anew(index: Index, server: Server, options: RemoteOptions) -> None:
    old = open_index(server.url, options)
    manifest = index.path / "index" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"vae": "none"', '"vae": "other"'))
    assert open_index(server.url, options).path != old.path


@pytest.mark.parametrize("fault", [ERROR, TRUNCATE, pytest.param(STALL, marks=pytest.mark.slow)])
@pytest.mark.parametrize("workers", [0, 2])
def test_faults_that_pass_change_nothing(
    index: Index, server: Server, options: RemoteOptions, fault: str, workers: int
) -> None:
    """Each third byte range fails twice; the other attempts are for answers that a busy machine keeps waiting."""
    server.fault = lambda request: (
        fault if request.before < (2 if request.name.endswith(".tar") and request.start % 3 == 0 else 0) else SOUND
    )
    remote = open_index(server.url, replace(options, timeout_s=1 if fault == STALL else 20, attempts=12))
    assert_same(batches(remote, workers), batches(index))
    assert max(request.before for request in shard_requests(server)) >= 2


@pytest.mark.parametrize("fault", [ERROR, TRUNCATE])
def test_an_index_survives_faults_too(index: Index, server: Server, options: RemoteOptions, fault: str) -> None:
    server.fault = lambda request: fault if request.before == 0 else SOUND
    assert verify(open_index(server.url, options)) == []


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (ERROR, "500"),
        (TRUNCATE, "payload is not completed"),
        pytest.param(STALL, "FSTimeoutError", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_faults_that_stay_stop_the_run_with_the_url_and_the_cause(
    index: Index, server: Server, options: RemoteOptions, fault: str, cause: str, workers: int
) -> None:
    lost = index.location(0)  # at the start of its shard, and so of any request for it
    server.fault = lambda request: fault if (request.name, request.start) == (lost.shard, lost.offset) else SOUND
    remote = open_index(server.url, replace(options, timeout_s=3 if fault == STALL else 20, attempts=3))
    said = rf"^{server.url}/{lost.shard} cannot be read \(tried 3 times\): .*{cause}"
    with pytest.raises(OutageError, match=said) as caught:
        batches(remote, workers)
    assert "Traceback" not in str(caught.value)


def test_an_answer_that_came_cut_or_spoiled_is_asked_for_again(
    index: Index, server: Server, options: RemoteOptions
) -> None:
    """Even where the server thinks that it has answered well."""
    remote = open_index(server.url, options)
    for fault in (SHORT, SPOILED):
        server.requests.clear()
        server.fault = lambda request, fault=fault: fault if request.before == 0 else SOUND
        assert_same(batches(remote), batches(index))
        assert all(not batch.bad for batch in batches(remote))


@pytest.mark.parametrize("fault", [SHORT, SPOILED])
def test_an_index_that_came_cut_or_spoiled_is_not_kept(
    index: Index, server: Server, options: RemoteOptions, fault: str
) -> None:
    server.fault = lambda request: fault if request.name.endswith("crc32.npy") else SOUND
    with pytest.raises(OutageError, match=r"index/crc32\.npy is not what the manifest beside it says"):
        open_index(server.url, options)
    server.fault = lambda request: SOUND
    assert_same(batches(open_index(server.url, options)), batches(index))


def test_signatures_of_redirected_urls_reach_no_message(
    server: Server, options: RemoteOptions, caplog: pytest.LogCaptureFixture
) -> None:
    server.fault = lambda request: ERROR if "SECRET" in request.name else REDIRECT
    with pytest.raises(OutageError) as caught, caplog.at_level(logging.WARNING):
        open_index(server.url, options)
    assert "500" in str(caught.value)
    assert "trying again" in caplog.text
    assert "SECRET" not in str(caught.value) + caplog.text


def test_what_is_forbidden_is_not_asked_again(server: Server, options: RemoteOptions) -> None:
    remote = open_index(server.url, options)
    server.fault = lambda request: FORBIDDEN
    with pytest.raises(OutageError, match=r"8x8-00000\.tar cannot be read \(tried once\): .*403"):
        remote.storage.read(remote.location(22), [memoryview(bytearray(remote.location(22).length))])


def test_samples_that_are_not_there_are_damage(index: Index, server: Server, options: RemoteOptions) -> None:
    """As in a folder: a shard that is gone or cut loses its samples, by name, and the run goes on."""
    remote, places = open_index(server.url, options), {index.key(row): index.location(row) for row in range(len(index))}
    (index.path / "4x8-00001.tar").unlink()
    cut = index.path / "8x8-00000.tar"
    cut.write_bytes(cut.read_bytes()[: places["sample012"].offset + 100])
    gone = {key for key, place in places.items() if place.shard == "4x8-00001.tar"}
    short = {key for key, place in places.items() if place.shard == cut.name and place.offset > 0}
    short = {key for key in short if places[key].offset >= places["sample012"].offset}
    reasons = {bad.key: bad.reason for batch in batches(remote) for bad in batch.bad}
    assert set(reasons) == gone | short
    assert all("cannot be read" in reasons[key] for key in gone)
    assert all("the shard ends" in reasons[key] for key in short)


def test_a_server_that_ignores_ranges_is_found_out_on_a_small_file(server: Server, options: RemoteOptions) -> None:
    server.fault = lambda request: WHOLE
    with pytest.raises(UserError, match=r"manifest\.json: the server ignores byte ranges"):
        open_index(server.url, options)
    assert len(server.requests) == 1


@pytest.mark.parametrize("column", ["offset", "length"])
def test_places_outside_the_shards_are_not_asked_for(
    index: Index, server: Server, options: RemoteOptions, column: str
) -> None:
    """An index from a stranger: its checksums are right, its numbers absurd."""
    file = index.path / "index" / f"{column}.npy"
    np.save(file, np.full(len(index), 2**40, dtype="i8"))
    manifest = json.loads((index.path / "index" / "manifest.json").read_text())
    manifest["files"][f"index/{column}.npy"] = {"size": file.stat().st_size, "sha256": sha256(file)}
    (index.path / "index" / "manifest.json").write_text(json.dumps(manifest))
    assert all(not batch.weight.any() for batch in batches(open_index(server.url, options)))
    assert shard_requests(server) == []


def test_neighbours_come_in_one_request(index: Index, server: Server, options: RemoteOptions) -> None:
    remote = open_index(server.url, options)
    rows = [2, 3, 4, 7, 22]
    remote.storage.expect([remote.location(row) for row in rows])
    asked = [(request.name, request.start) for request in shard_requests(server)]
    expected = [(index.location(row).shard, index.location(row).offset) for row in (2, 7, 22)]
    assert sorted(asked) == sorted(expected)
    assert_same(batches(remote, run=4), batches(index, run=4))


def test_verify_reads_what_lies_behind_a_url(index: Index, server: Server, options: RemoteOptions) -> None:
    place = index.location(3)
    assert verify(open_index(server.url, options)) == []
    with (index.path / place.shard).open("r+b") as file:
        file.seek(place.offset + 600)
        file.write(b"other bytes")
    assert verify(open_index(server.url, options)) == [
        BadSample(index.key(3), place.shard, "its bytes have changed since it was indexed")
    ]


class TestCache:
    def test_what_fits_is_fetched_once_and_survives_a_restart(
        self, index: Index, server: Server, options: RemoteOptions
    ) -> None:
        keep = replace(options, cache_bytes=10**9)
        assert_same(batches(open_index(server.url, keep)), batches(index))
        assert max(Counter((r.name, r.start) for r in shard_requests(server)).values()) == 1
        server.requests.clear()
        assert_same(batches(open_index(server.url, keep), workers=2), batches(index))
        assert shard_requests(server) == []

    def test_it_holds_no_more_than_its_limit(self, index: Index, server: Server, options: RemoteOptions) -> None:
        limit = index.shards[0].size + index.shards[1].size - 1
        remote = open_index(server.url, replace(options, cache_bytes=limit))
        batches(remote)
        files = list((remote.path.parent / "shards").iterdir())
        assert [file.name for file in files] == [index.shards[0].sha256]
        assert sum(file.stat().st_size for file in files) <= limit

    def test_a_smaller_limit_takes_effect(self, index: Index, server: Server, options: RemoteOptions) -> None:
        batches(open_index(server.url, replace(options, cache_bytes=10**9)))
        remote = open_index(server.url, replace(options, cache_bytes=0))
        assert list((remote.path.parent / "shards").iterdir()) == []

    def test_bytes_that_were_spoiled_are_fetched_again(
        self, index: Index, server: Server, options: RemoteOptions
    ) -> None:
        """As by a process that died in mid-write, or a disk."""
        keep = replace(options, cache_bytes=10**9)
        remote = open_index(server.url, keep)
        batches(remote)
        file = remote.path.parent / "shards" / index.shards[0].sha256
        file.write_bytes(file.read_bytes()[:5000] + bytes(5000))
        server.requests.clear()
        assert_same(batches(open_index(server.url, keep)), batches(index))
        assert {request.name for request in shard_requests(server)} == {index.shards[0].name}

    def test_shards_that_the_dataset_has_no_more_are_removed(
        self, index: Index, server: Server, options: RemoteOptions
    ) -> None:
        keep = replace(options, cache_bytes=10**9)
        folder = open_index(server.url, keep).path.parent / "shards"
        (folder / ("0" * 64)).write_bytes(b"old")
        open_index(server.url, keep)
        assert list(folder.iterdir()) == []

    def test_a_full_disk_costs_speed_and_nothing_else(
        self, index: Index, server: Server, options: RemoteOptions, caplog: pytest.LogCaptureFixture
    ) -> None:
        remote = open_index(server.url, replace(options, cache_bytes=10**9))
        folder = remote.path.parent / "shards"
        shutil.rmtree(folder)
        folder.write_text("a file where the folder was stands for a disk that cannot be written")
        with caplog.at_level(logging.WARNING):
            assert_same(batches(remote), batches(index))
        assert len([record for record in caplog.records if "cannot be written" in record.message]) == 1


def test_a_started_process_can_open_it_again(index: Index, server: Server, options: RemoteOptions) -> None:
    remote = open_index(server.url, replace(options, cache_bytes=10**9))
    again = pickle.loads(pickle.dumps(remote))  # noqa: S301  # as `spawn` does with what a worker is given
    assert_same(batches(again), batches(index))


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("ftp://host/data", "ftp://host… cannot be read: give a folder, or a URL of http, https, s3"),
        ("file:///data", "cannot be read: give a folder"),
        ("simplecache::s3://bucket/data", "cannot be read: give a folder"),
        ("https://me:SECRET@host/data", "https://host… holds a password"),
        ("https://host/data?sig=SECRET", "https://host… holds a password, query or fragment"),
        ("https://h/a::s3://b", "cannot be read: give a folder"),
        ("http:///data", "names no host"),
        ("http://host:99999/data", "names no host"),
        ("http://[::1/data", "cannot be read"),
        ("pipe:rm -rf SECRET {name} {range}", "--allow-pipe if you trust 'rm'"),
    ],
)
def test_places_that_are_refused(place: str, said: str, options: RemoteOptions) -> None:
    with pytest.raises(UserError) as caught:
        open_index(place, options)
    assert said in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_a_url_without_an_index_is_named(server: Server, options: RemoteOptions) -> None:
    with pytest.raises(UserError, match=r"index/manifest\.json is not there: run `fmscale index` where the tars lie"):
        open_index(f"{server.url}/nothing", options)


def test_an_index_that_is_not_whole_is_not_kept(index: Index, server: Server, options: RemoteOptions) -> None:
    column = index.path / "index" / "crc32.npy"
    content = column.read_bytes()
    column.unlink()
    with pytest.raises(UserError, match=r"index/crc32\.npy is not there"):
        open_index(server.url, options)
    column.write_bytes(content)
    assert len(open_index(server.url, options)) == len(index)


@pytest.mark.parametrize("name", ["../8x8-00000.tar", "-x.tar", "a?b.tar", ".tar"])
def test_names_that_lead_elsewhere_are_refused(index: Index, server: Server, options: RemoteOptions, name: str) -> None:
    manifest = index.path / "index" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("8x8-00000.tar", name))
    with pytest.raises(UserError, match="which is no plain file name"):
        open_index(server.url, options)


class TestPipe:
    PROGRAM = (
        "import sys; name, span = sys.argv[1:]; first, last = span.split('-'); "
        "data = open(name, 'rb').read(); sys.stdout.buffer.write(data[int(first) : int(last) + 1 if last else None])"
    )

    def place(self, index: Index) -> str:
        return f'pipe:{sys.executable} -c "{self.PROGRAM}" {index.path}/{{name}} {{range}}'

    def options(self, tmp_path: Path) -> RemoteOptions:
        return RemoteOptions(tmp_path / "cache", attempts=1, allow_pipe=True)

    def test_a_program_gives_the_batches_of_the_folder(self, index: Index, tmp_path: Path) -> None:
        (index.path / "null.safetensors").write_bytes(b"null")
        build_index(index.path, None)
        remote = open_index(self.place(index), self.options(tmp_path))
        assert (remote.path / "null.safetensors").read_bytes() == b"null"
        assert_same(batches(remote)[:1], batches(index)[:1])

    def test_no_shell_reads_it(self, index: Index, tmp_path: Path) -> None:
        place = f"pipe:echo {{name}} {{range}} ; touch {tmp_path}/made"
        with pytest.raises(UserError, match=r"printed more than {range} asked for"):
            open_index(place, self.options(tmp_path))
        assert not (tmp_path / "made").exists()

    @pytest.mark.parametrize(
        ("command", "said"),
        [
            ("cat {name}", r"must say where \{range\} goes"),
            ("'cat", "is no command"),
            ("/no/such/program {name} {range}", "'/no/such/program' cannot be started: No such file"),
        ],
    )
    def test_commands_that_cannot_work(self, tmp_path: Path, command: str, said: str) -> None:
        with pytest.raises(UserError, match=said):
            open_index(f"pipe:{command}", self.options(tmp_path))

    def test_a_program_that_fails_is_quoted(self, tmp_path: Path) -> None:
        with pytest.raises(OutageError, match=r"tried once.*exit code [12]: ls: cannot access"):
            open_index("pipe:ls /none/{name} {range}".replace("ls ", "ls -d "), self.options(tmp_path))
