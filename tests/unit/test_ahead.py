from __future__ import annotations

import operator
import os
import threading
from collections.abc import Iterator

import pytest

from fmscale.ahead import TASKS_PER_WORKER, Processes, ahead
from fmscale.errors import OutageError


def test_items_come_in_order_and_no_more_of_them_than_asked_for_are_made() -> None:
    made: list[int] = []
    enough = threading.Event()

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            if len(made) == 5:  # one is used, three wait, one waits for a place
                enough.set()
            yield number

    with ahead(items(), depth=3) as numbers:
        assert next(numbers) == 0
        assert enough.wait(30)
        assert len(made) == 5
        assert list(numbers) == list(range(1, 100))


def test_an_error_of_the_thread_is_the_readers_after_what_was_made_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("no such luck")

    with ahead(items(), depth=1) as numbers:
        assert next(numbers) == 1
        with pytest.raises(OSError, match="no such luck"):
            next(numbers)


def test_who_reads_no_more_ends_the_thread() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    before = threading.active_count()
    with ahead(items(), depth=2) as numbers:
        next(numbers)
    assert closed.is_set()
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_keep_the_order_and_read_a_bounded_number_of_items(workers: int) -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    with Processes(workers, operator.neg) as processes:
        negated = processes.map(items())
        assert next(negated) == 0
        assert len(read) == max(1, TASKS_PER_WORKER * workers)
        assert list(negated) == [-number for number in range(1, 100)]
        assert list(processes.map([7])) == [-7]


def test_an_error_in_a_process_is_raised_here() -> None:
    with Processes(1, int) as processes, pytest.raises(ValueError, match="invalid literal"):
        list(processes.map(["1", "two", "3"]))


def test_a_process_that_dies_is_an_outage() -> None:
    with (
        Processes(1, os._exit) as processes,
        pytest.raises(OutageError, match="a process that decodes images has died"),
    ):
        list(processes.map([1]))
