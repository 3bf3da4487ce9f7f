from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmscale.batch import Batch
from fmscale.data.index import Index
from fmscale.data.index_build import build_index
from fmscale.data.loader import build_loader
from fmscale.data.mixture import Mixture
from fmscale.data.order import Order, split
from fmscale.data.shards import ShardWriter
from fmscale.errors import UserError


def noise(shape: tuple[int, ...], step: int, slot: int, read_meta: Callable[[], dict[str, Any]]) -> Tensor:
    return torch.full(shape, 1000.0 * step + slot + read_meta()["number"] / 100)


def make_order(index: Index, global_batch: int) -> Order:
    return Mixture([index]).order(global_batch, seed=3)


def load(index: Index, global_batch: int = 6, world_size: int = 1, micro_batch: int = 2, start=0, stop=5, workers=0):
    """All ranks' batches, step by step, in the order of their slots."""
    cut = split(global_batch, world_size, micro_batch)
    run = partial(build_loader, Mixture([index]), make_order(index, global_batch), cut, noise=noise, workers=workers)
    ranks = [list(run(rank=rank, start_step=start, stop_step=stop)) for rank in range(world_size)]
    assert all(len(batches) == (stop - start) * cut.accumulation for batches in ranks)
    return [batch for together in zip(*ranks, strict=True) for batch in together]


def by_slot(batches: list[Batch]) -> dict[tuple[int, int], tuple[Any, ...]]:
    """(step, slot) -> bucket, key, weight and tensors, as lists, for every slot that is no padding."""
    found: dict[tuple[int, int], tuple[Any, ...]] = {}
    for batch in batches:
        for i, slot in enumerate(batch.slots.tolist()):
            content = [tensor[i].tolist() for tensor in (*batch.tensors.values(), batch.noise)]
            if batch.keys[i]:
                assert (batch.step, slot) not in found
                found[batch.step, slot] = (batch.bucket, batch.keys[i], batch.weight[i].item(), *content)
            else:
                assert batch.weight[i] == 0
                assert not torch.tensor(content[0]).any()
    return found


def test_batches_hold_the_ordered_samples(index: Index, samples) -> None:
    stored = {key: (tensors, meta) for key, tensors, meta in samples}
    order = make_order(index, 6)
    for number, batch in enumerate(load(index)):
        step, m = divmod(number, 3)
        plan = order.batch(step)
        bucket = index.buckets[plan.bucket]
        assert (batch.step, batch.bucket, batch.bad) == (step, (bucket.height, bucket.width), ())
        assert batch.slots.tolist() == [2 * m, 2 * m + 1]
        assert batch.weight.tolist() == [1, 1]
        assert batch.keys == tuple(index.key(bucket.start + int(plan.rows[slot])) for slot in batch.slots)
        for i, key in enumerate(batch.keys):
            tensors, meta = stored[key]
            assert all(torch.equal(batch.tensors[name][i], tensors[name]) for name in tensors)
            drawn = noise(tuple(tensors["latents"].shape), step, int(batch.slots[i]), partial(dict, meta))
            assert torch.equal(batch.noise[i], drawn)


def test_every_world_size_gives_the_same_global_batches(index: Index) -> None:
    alone = by_slot(load(index))
    assert len(alone) == 30
    for world_size in range(2, 6):
        assert by_slot(load(index, world_size=world_size)) == alone
    assert by_slot(load(index, micro_batch=4)) == alone


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(index: Index, workers: int) -> None:
    one, many = load(index, world_size=2), load(index, world_size=2, workers=workers)
    assert [(batch.step, batch.slots.tolist()) for batch in one] == [(b.step, b.slots.tolist()) for b in many]
    assert by_slot(one) == by_slot(many)


def test_a_later_start_gives_the_rest_of_the_run(index: Index) -> None:
    whole = by_slot(load(index))
    assert by_slot(load(index, start=2)) == {place: value for place, value in whole.items() if place[0] >= 2}


class Leg(NamedTuple):
    """A part of a run's history: so many steps in one world."""

    world_size: int
    micro_batch: int
    workers: int
    steps: int


LEGS = st.builds(Leg, st.integers(1, 16), st.integers(1, 9), st.integers(0, 3), st.integers(1, 4))


def walk_leg(index: Index, leg: Leg, start: int, kill: bool = False) -> list[Batch]:
    """What all ranks trained on; each has read further ahead when it stops, or when a reader is killed."""
    cut = split(17, leg.world_size, leg.micro_batch)
    run = partial(build_loader, Mixture([index]), make_order(index, 17), cut, noise=noise, start_step=start)
    taken = []
    for rank in range(leg.world_size):
        workers = leg.workers if rank < 3 else 0  # enough processes for one machine
        before = set(multiprocessing.active_children())
        batches = run(rank=rank, stop_step=start + leg.steps + 50, workers=workers)
        taken += [next(batches) for _ in range(leg.steps * cut.accumulation)]
        if kill and rank == 0:
            readers = set(multiprocessing.active_children()) - before
            expect_death(batches, min(readers, key=lambda process: process.pid))
        del batches
    return taken


def expect_death(batches: Iterator[Batch], reader: Any) -> None:
    """kill -9 a reader: an error within seconds, whatever had been read ahead."""
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid"):
        kill_and_drain(batches, reader)
    assert time.monotonic() < began + 15


def kill_and_drain(batches: Iterator[Batch], reader: Any) -> None:
    reader.kill()
    for _ in batches:
        pass


def assert_as_one_rank(index: Index, history: list[Leg], kill: bool) -> None:
    found: dict[tuple[int, int], tuple[Any, ...]] = {}
    start = 0
    for leg in history:
        found |= by_slot(walk_leg(index, leg, start, kill))
        start += leg.steps
    assert found == by_slot(load(index, 17, 1, 17, 0, start))


many_workers = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than this machine has cores


@many_workers
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LEGS, min_size=1, max_size=4))
def test_any_history_gives_the_global_batches_of_one_rank(index: Index, history: list[Leg]) -> None:
    """Stopped anywhere, started again in any world with any micro-batch and number of readers."""
    assert_as_one_rank(index, history, kill=False)


@pytest.fixture
def quiet_children() -> Iterator[None]:
    """torch's handler of SIGCHLD raises wherever this process is; without it the loader's own watch tells."""
    list(torch.utils.data.DataLoader([0], num_workers=1))  # torch sets its handler with the first loader
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


@many_workers
@pytest.mark.usefixtures("quiet_children")
@pytest.mark.parametrize("history", [[Leg(1, 4, 1, 2), Leg(3, 2, 3, 1)], [Leg(16, 1, 2, 1), Leg(2, 9, 2, 3)]])
def test_killed_readers_change_nothing(index: Index, history: list[Leg]) -> None:
    """Each leg ends by kill -9 of a reader: the position is the trainer's, not theirs."""
    assert_as_one_rank(index, history, kill=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_has_weight_zero_and_is_named(index: Index, workers: int) -> None:
    sound = by_slot(load(index, stop=8))
    place = index.location(20)
    with (index.path / place.shard).open("r+b") as file:
        file.seek(place.offset + 1900)
        file.write(b"damage")
    batches = load(index, stop=8, workers=workers)
    found = by_slot(batches)
    hit = {slot for slot, value in sound.items() if value[1] == index.key(20)}
    assert hit
    assert {slot for slot in sound if found[slot] != sound[slot]} == hit
    assert all(found[slot][2] == 0 and not torch.tensor(found[slot][3]).any() for slot in hit)
    named = [bad for batch in batches for bad in batch.bad]
    assert [(bad.key, bad.shard) for bad in named] == [(index.key(20), "8x8-00000.tar")] * len(hit)
    assert "changed" in named[0].reason


def test_a_micro_batch_of_padding_or_damage_alone_is_zeros_of_the_right_shape(index: Index) -> None:
    for shard in index.path.glob("*.tar"):
        shard.unlink()
    batches = load(index, global_batch=5, world_size=4, micro_batch=1)
    assert len(batches) == 5 * 2 * 4
    for batch in batches:
        assert batch.tensors["latents"].shape == batch.noise.shape == (1, 4, *batch.bucket)
        assert batch.tensors["latents"].dtype == torch.bfloat16
        assert batch.noise.dtype == torch.float32
        assert not batch.weight.any()
        assert len(batch.bad) == (batch.slots.item() < 5)


def test_everything_a_worker_needs_can_be_sent_to_it(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start methods other than fork send the pipeline by pickle."""
    import pickle

    from fmscale.data import loader

    def over_pickle(pipeline: object, **options: object) -> object:
        return pickle.loads(pickle.dumps(pipeline))  # noqa: S301

    monkeypatch.setattr(loader.webdataset, "WebLoader", over_pickle)
    sent = by_slot(load(index))
    monkeypatch.undo()
    assert sent == by_slot(load(index))


def test_no_steps_are_no_batches(index: Index, tmp_path: Path) -> None:
    assert load(index, start=3, stop=3) == []


def no_noise(shape: tuple[int, ...], step: int, slot: int, read_meta: Callable[[], dict[str, Any]]) -> Tensor:
    raise UserError("data.path: no noise here; give other data")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_mistake_in_a_worker_is_one_line_here(index: Index, workers: int) -> None:
    with pytest.raises(UserError) as caught:
        next(
            build_loader(
                Mixture([index]),
                make_order(index, 4),
                split(4, 1, 4),
                rank=0,
                start_step=0,
                stop_step=1,
                noise=no_noise,
                workers=workers,
            )
        )
    assert str(caught.value) == "data.path: no noise here; give other data"


@pytest.mark.parametrize("workers", [0, 1])
def test_captions_are_given_where_they_are_asked_for(index: Index, samples, workers: int) -> None:
    words = {key: meta["caption"] for key, _, meta in samples} | {"": ""}
    cut = split(5, 1, 2)  # the last slot of a step is padding
    options = {"rank": 0, "start_step": 0, "stop_step": 3, "noise": noise, "workers": workers}
    for batch in build_loader(Mixture([index]), make_order(index, 5), cut, captions=True, **options):
        assert batch.captions == tuple(words[key] for key in batch.keys)
    assert all(batch.captions == () for batch in load(index))


@pytest.mark.parametrize("workers", [0, 1])
def test_tokens_are_counted_where_that_is_asked_for(tmp_path: Path, samples, workers: int) -> None:
    with ShardWriter(tmp_path / "counted") as writer:
        for key, tensors, meta in samples:
            writer.write(key, tensors, meta | {"tokens": {"clip_l": meta["number"] + 2, "t5": 7}})
    index = build_index(tmp_path / "counted", None)
    own = {key: meta["number"] + 2 for key, _, meta in samples} | {"": 0}
    cut = split(5, 1, 2)  # the last slot of a step is padding
    options = {"rank": 0, "start_step": 0, "stop_step": 3, "noise": noise, "workers": workers}
    plain = build_loader(Mixture([index]), make_order(index, 5), cut, **options)
    counted = build_loader(Mixture([index]), make_order(index, 5), cut, counts=["clip_l"], **options)
    for one, other in zip(plain, counted, strict=True):
        assert other.tensors.keys() - one.tensors.keys() == {"clip_l_count"}
        assert other.tensors["clip_l_count"].tolist() == [own[key] for key in other.keys]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_does_not_count_its_tokens_is_named(index: Index, workers: int) -> None:
    options = {"rank": 0, "start_step": 0, "stop_step": 1, "noise": noise, "workers": workers}
    batches = build_loader(Mixture([index]), make_order(index, 4), split(4, 1, 4), counts=["clip_l"], **options)
    with pytest.raises(UserError, match=r"the json of sample0\d\d has no tokens\.clip_l; make the dataset by"):
        next(batches)
