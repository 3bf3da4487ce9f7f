from __future__ import annotations

import math

from fmscale.watchdog import CUT_OFF, FAILED, GONE_S, Limits, Place, Sighting, cut_off, judge

LIMITS = Limits(silent_s=60, stalled_s=600)
NOW = 10_000.0


def seen(*, ago: float = 1, still: float = 1, moves: int = 50, trouble: str = "") -> Sighting:
    place = Place(9, moves, step=12, doing="waiting for data", trouble=trouble, host="node")
    return Sighting(place, NOW - ago, NOW - still)


def test_a_place_survives_the_store() -> None:
    place = Place(3, 4, 7, 5, "in a micro-batch", CUT_OFF, "node-1.cluster")
    assert Place.parse(place.text()) == place


def test_ranks_that_work_are_left_alone() -> None:
    assert judge({0: seen(), 1: seen(ago=59, still=599)}, NOW, LIMITS) == ""


def test_a_silent_rank_is_named() -> None:
    verdict = judge({0: seen(), 1: seen(ago=61), 2: seen()}, NOW, LIMITS)
    assert verdict == "rank 1 on node (last in step 12, waiting for data): not heard of any more"


def test_of_many_silent_ranks_a_few_are_named() -> None:
    verdict = judge({rank: seen(ago=61 if rank else 1) for rank in range(8)}, NOW, LIMITS)
    assert verdict.count(" on node ") == 4
    assert verdict.endswith(" and 3 more: not heard of any more")


def test_a_broken_connection_shortens_the_patience() -> None:
    silent = {0: seen(), 1: seen(ago=GONE_S + 1)}
    assert judge(silent, NOW, LIMITS) == ""
    assert judge({**silent, 2: seen(trouble=CUT_OFF)}, NOW, LIMITS).startswith("rank 1 on")


def test_a_rank_that_failed_is_not_said_to_be_lost() -> None:
    verdict = judge({0: seen(), 1: seen(ago=GONE_S + 1, trouble=FAILED)}, NOW, LIMITS)
    assert verdict.endswith("failed, see its own line")


def test_the_rank_that_is_furthest_behind_is_blamed_for_a_standstill() -> None:
    still = {0: seen(still=601), 1: seen(still=602, moves=49), 2: seen(still=601)}
    where = "rank 1 on node (last in step 12, waiting for data)"
    assert judge(still, NOW, LIMITS) == f"{where}: not moved on for 601 s (guard.stalled_s)"
    assert judge(still, NOW, LIMITS._replace(stalled_s=math.inf)) == ""


def test_a_standstill_of_all_blames_nobody() -> None:
    verdict = judge({0: seen(still=601), 1: seen(still=601)}, NOW, LIMITS)
    assert verdict == "no rank has moved on for 601 s (guard.stalled_s), all are in step 12, waiting for data"


def test_a_rank_that_never_begins_is_blamed() -> None:
    verdict = judge({0: seen(still=601), 1: seen(still=601, moves=0)}, NOW, LIMITS)
    assert verdict.startswith("rank 1 on node (last in step 12, waiting for data): not moved on")


def test_what_another_rank_causes_is_told_from_errors_of_ours() -> None:
    assert cut_off("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    assert not cut_off("mat1 and mat2 shapes cannot be multiplied")


def test_a_slow_disk_is_no_standstill() -> None:
    """A rank that waits for its save does not move on, but the save does."""
    waiting = seen(still=601)
    waiting.see(waiting.place._replace(beats=10, work=1), NOW)
    assert judge({0: waiting, 1: seen(still=601)}, NOW, LIMITS) == ""
