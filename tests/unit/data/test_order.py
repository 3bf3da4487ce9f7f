from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmscale.data.order import Generation, Order, split
from fmscale.data.sequence import Rotation, floor_sum, permute, permute_runs, stable_hash
from fmscale.errors import UserError

few = settings(max_examples=30, deadline=None)  # a busy machine is slow, not wrong
BUCKETS = [Generation(0, {"8x8": (50,), "8x16": (3,), "16x8": (20,)})]


@few
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_one_to_one(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@few
@given(st.integers(1, 2**40), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_permute_stays_inside_at_any_size(size: int, key: int, start: int) -> None:
    positions = np.unique((start % size + np.arange(50) * 7919) % size)
    images = permute(positions, size, key)
    assert images.min() >= 0
    assert images.max() < size
    assert len(np.unique(images)) == len(positions)


def test_permute_takes_a_key_per_position() -> None:
    keys = np.array([1, 2, 2**64 - 1], dtype=np.uint64)
    together = permute([5, 5, 5], 1000, keys)
    assert list(together) == [int(permute(5, 1000, int(key))[0]) for key in keys]


def test_permute_makes_every_permutation_of_four_about_equally_often() -> None:
    counts = Counter(tuple(permute(np.arange(4), 4, stable_hash(key))) for key in range(2400))
    assert len(counts) == 24
    assert min(counts.values()) > 60  # expected 100, standard deviation 10
    assert max(counts.values()) < 140


def test_permute_leaves_no_trend() -> None:
    images = permute(np.arange(20000), 20000, 7)
    assert abs(np.corrcoef(np.arange(20000), images)[0, 1]) < 0.03
    assert abs(np.corrcoef(images[1:], images[:-1])[0, 1]) < 0.03


def test_stable_hash_is_the_same_everywhere() -> None:
    assert stable_hash(0, "8x16", 3) == 6411673191235611215
    assert stable_hash("a", "b") != stable_hash("ab")


@few
@given(st.integers(0, 60), st.integers(1, 50), st.integers(0, 120), st.integers(0, 120))
def test_floor_sum_equals_the_sum(count: int, modulus: int, factor: int, offset: int) -> None:
    assert floor_sum(count, modulus, factor, offset) == sum((factor * i + offset) // modulus for i in range(count))


@few
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 2**32))
def test_each_bucket_is_used_as_often_as_it_has_samples(sizes: list[int], seed: int) -> None:
    order = Order([Generation(0, {f"{i}": (size,) for i, size in enumerate(sizes)})], 1, seed)
    total = sum(sizes)
    for start in (0, 3 * total):
        used = Counter(order.batch(step).bucket for step in range(start, start + total))
        assert [used[i] for i in range(len(sizes))] == sizes


@few
@given(st.integers(0, 200))
def test_uses_of_a_bucket_are_spread_evenly(start: int) -> None:
    order = Order(BUCKETS, 1, 0)
    used = Counter(order.batch(step).bucket for step in range(start, start + 20))
    assert abs(used[0] - 20 * 50 / 73) < 3


@pytest.mark.parametrize("global_batch", [1, 4, 7, 64])
def test_every_sample_comes_once_per_epoch(global_batch: int) -> None:
    order = Order(BUCKETS, global_batch, 5)
    streams: list[list[int]] = [[], [], []]
    for step in range(150):
        plan = order.batch(step)
        assert plan.rows.shape == (global_batch,)
        assert plan.rows.dtype == np.int64
        streams[plan.bucket] += plan.rows.tolist()
    for (_, (size,)), stream in zip(BUCKETS[0].sizes.items(), streams, strict=True):
        epochs = [stream[at : at + size] for at in range(0, len(stream) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(epochs) > 1
        assert size == 3 or epochs[0] != epochs[1]


def test_a_step_does_not_depend_on_history() -> None:
    forward = Order(BUCKETS, 4, 5)
    plans = [forward.batch(step) for step in range(100)]
    for step in (99, 3, 50, 0):
        alone = Order(BUCKETS, 4, 5).batch(step)
        assert alone.bucket == plans[step].bucket
        assert np.array_equal(alone.rows, plans[step].rows)


def test_steps_far_away_cost_no_more() -> None:
    order = Order([Generation(0, {"a": (10**9,), "b": (3 * 10**8,)})], 8, 1)
    plan, following = order.batch(10**12), order.batch(10**12 + 13 * 10**8)
    assert plan.bucket == following.bucket  # one turn of the circle later
    assert 0 <= plan.rows.min() <= plan.rows.max() < (10**9, 3 * 10**8)[plan.bucket]
    assert not np.array_equal(plan.rows, following.rows)


def test_seed_and_bucket_name_change_the_order() -> None:
    def rows(name: str, seed: int) -> list[int]:
        return Order([Generation(0, {name: (1000,)})], 20, seed).batch(0).rows.tolist()

    assert len({tuple(rows("8x8", 0)), tuple(rows("8x8", 1)), tuple(rows("8x16", 0))}) == 3


@few
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any), st.integers(0, 10**6), st.integers(0, 10**12))
def test_a_rotation_counts_what_it_gives(arcs: list[int], start: int, first: int) -> None:
    rotation = Rotation(arcs, start)
    items = rotation.items(first, 2 * sum(arcs)).tolist()
    assert [items.count(arc) for arc in range(len(arcs))] == [2 * length for length in arcs]
    some = len(items) // 3
    for arc in range(len(arcs)):
        assert rotation.before(first + some, arc) - rotation.before(first, arc) == items[:some].count(arc)


@few
@given(st.integers(1, 500), st.integers(1, 40), st.integers(0, 2**64 - 1))
def test_runs_stay_together(size: int, run: int, key: int) -> None:
    images = permute_runs(np.arange(size), size, key, run)
    assert sorted(images) == list(range(size))
    if size >= run:
        starts = images[: size - size % run].reshape(-1, run)
        assert ((starts - starts[:, :1]) % size == np.arange(run)).all()


def test_weights_set_the_shares_and_sizes_the_epochs() -> None:
    """Two datasets, the small one twice as often as the large one: its epochs come round sooner."""
    sizes = {"8x8": (60, 10), "8x16": (0, 5)}
    order = Order([Generation(0, sizes)], 6, 1, weights=(1.0, 2.0))
    seen: dict[tuple[int, int], list[int]] = {(0, 0): [], (0, 1): [], (1, 1): []}
    for step in range(900):
        plan = order.batch(step)
        for part, row in zip(plan.parts.tolist(), plan.rows.tolist(), strict=True):
            seen[plan.bucket, part].append(row)
    total = sum(map(len, seen.values()))
    assert len(seen[0, 0]) / total == pytest.approx(1 / 3, abs=0.01)
    assert len(seen[0, 1]) / total == pytest.approx(2 / 3 * 10 / 15, abs=0.01)
    assert len(seen[1, 1]) / total == pytest.approx(2 / 3 * 5 / 15, abs=0.01)
    for (bucket, part), stream in seen.items():
        size = sizes[order.names[bucket]][part]
        epochs = [stream[at : at + size] for at in range(0, len(stream) - size + 1, size)]
        assert len(epochs) > 20
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)


@st.composite
def growing(draw: st.DrawFn) -> list[Generation]:
    """Data of two datasets and up to three buckets that grows a few times, or stays, in steps as they come."""
    step, sizes = 0, {"a": [draw(st.integers(1, 12)), 1 + draw(st.integers(0, 12))]}
    generations = [Generation(0, {name: tuple(parts) for name, parts in sizes.items()})]
    for _ in range(draw(st.integers(0, 3))):
        step += draw(st.integers(1, 20))
        for name in draw(st.lists(st.sampled_from("abc"), max_size=3)):
            sizes.setdefault(name, [0, 0])[draw(st.integers(0, 1))] += draw(st.integers(1, 15))
        generations.append(Generation(step, {name: tuple(parts) for name, parts in sizes.items()}))
    return generations


@few
@given(growing(), st.integers(1, 9), st.sampled_from([None, (1.0, 3.0)]), st.integers(1, 3))
def test_appended_samples_come_in_with_the_next_epoch(
    generations: list[Generation], global_batch: int, weights: tuple[float, float] | None, run: int
) -> None:
    order = Order(generations, global_batch, 7, weights, run)
    streams: dict[tuple[str, int], list[tuple[int, int]]] = {}  # step and row
    for step in range(generations[-1].step + 60):
        plan = order.batch(step)
        for part, row in zip(plan.parts.tolist(), plan.rows.tolist(), strict=True):
            streams.setdefault((order.names[plan.bucket], part), []).append((step, row))
    for (name, part), stream in streams.items():
        at = 0
        while at < len(stream):
            stored = next(entry for entry in reversed(generations) if entry.step <= stream[at][0])
            size = stored.sizes[name][part]
            epoch = [row for _, row in stream[at : at + size]]
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= set(range(size))
            at += size


@few
@given(growing(), st.integers(1, 9))
def test_what_was_drawn_before_data_was_appended_stays(generations: list[Generation], global_batch: int) -> None:
    whole = Order(generations, global_batch, 7)
    for number in range(1, len(generations)):
        before = Order(generations[:number], global_batch, 7)
        for step in range(generations[number - 1].step, generations[number].step):
            old, new = before.batch(step), whole.batch(step)
            assert before.names[old.bucket] == whole.names[new.bucket]
            assert old.parts.tolist() == new.parts.tolist()
            assert old.rows.tolist() == new.rows.tolist()


@few
@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 20))
def test_split_gives_each_slot_to_one_rank(global_batch: int, world_size: int, micro_batch: int) -> None:
    if global_batch < world_size:
        with pytest.raises(UserError, match=f"global_batch {global_batch} cannot be split over {world_size} ranks"):
            split(global_batch, world_size, micro_batch)
        return
    cut = split(global_batch, world_size, micro_batch)
    slots = np.concatenate([cut.slots(m, rank) for m in range(cut.accumulation) for rank in range(world_size)])
    assert cut.micro_batch <= micro_batch
    assert sorted(slots) == list(range(cut.accumulation * world_size * cut.micro_batch))
    assert len(slots) >= global_batch
    assert len(slots) - global_batch < world_size * cut.accumulation  # less than one slot of padding per micro-batch
