"""Stages that work beside one another: a thread that runs ahead of its reader, and processes that decode images."""

from __future__ import annotations

import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

from fmscale.distributed import end_with_parent
from fmscale.errors import OutageError

Item = TypeVar("Item")
Result = TypeVar("Result")
TASKS_PER_WORKER = 8  # images on their way to each process that decodes, or back
_END = object()


@contextmanager
def ahead(items: Iterable[Item], depth: int) -> Iterator[Iterator[Item]]:
    """Let a thread of its own make items while earlier ones are used; what it raises, the reader gets.

    The thread has ended when the block has.

    Args:
        items: closed by the thread that makes them, if it is a generator.
        depth: items that are made and not yet asked for, >= 1.
    """
    made: queue.Queue[Any] = queue.Queue(depth)
    over = threading.Event()

    def put(item: Any) -> bool:
        while not over.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    break
            put((_END, None))
        except BaseException as error:
            put((_END, error))
        finally:
            if isinstance(items, Generator):
                items.close()

    def read() -> Iterator[Item]:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        yield read()
    finally:
        over.set()
        thread.join()


class Processes:
    """Processes that do the same to many items, in order; use it in a `with` block.

    Args:
        workers: how many; 0 does it here.
        function: can be pickled, as can what it takes and returns.
    """

    def __init__(self, workers: int, function: Callable[[Any], Any]) -> None:
        self._function, self._workers = function, workers
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (function,))

    def __enter__(self) -> Processes:
        if self._pool:
            self._pool.submit(int)  # the first task starts the processes
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def map(self, items: Iterable[Any]) -> Iterator[Any]:
        """What the function makes of each item, in the order of the items, a bounded number of which are under way.

        Raises:
            OutageError: a process died.
        """
        if not self._pool:
            yield from map(self._function, items)
            return
        under_way: deque[Future[Any]] = deque()
        try:
            for item in items:
                under_way.append(self._pool.submit(_do, item))
                if len(under_way) == TASKS_PER_WORKER * self._workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            raise OutageError(
                "a process that decodes images has died, perhaps for want of memory; started again, the work goes on"
            ) from error


_function: Callable[[Any], Any]


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    for number in (signal.SIGINT, signal.SIGUSR2):  # sent to all of a job; the parent ends its processes itself
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)


def _do(item: Any) -> Any:
    return _function(item)
