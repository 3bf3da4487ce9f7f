"""Where every rank is, so that one that hangs or dies ends the job within a bounded time, and is named.

    every rank    a thread writes once a second, to a small store, where the rank is: step, what it does
    rank 0        keeps that store, reads all of it, and writes the verdict when it finds something wrong
    the others    read the verdict, and look whether rank 0 is still there

A verdict ends every rank that still runs, each with the stacks of its threads in RUN/stalls, where one reads which
collective it was waiting in. Threads run although the loop waits in a collective; in a process that was stopped or
killed they do not, which is how the others know.
"""

from __future__ import annotations

import atexit
import faulthandler
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from fmscale.distributed import World, barrier, from_main
from fmscale.errors import OutageError
from fmscale.log import get_logger
from fmscale.starts import Start

log = get_logger(__name__)
STALLS = "stalls"  # in the run directory: the stacks of each rank when the job was ended
BEAT_S = 1.0
SEEN_BEATS = 10  # between two that are seen in the run directory
GONE_S = 4.0  # silence that tells, once a connection has broken or a rank has failed
READ_S = 3.0  # in which every rank has read a verdict: two threads look once a second each
CONNECT_S = 300.0
FAULT = 1
FAILED, CUT_OFF = "failed", "cut off"
VERDICT = "verdict"
WHY = "%s; so the job ends, and started again it goes on from its last checkpoint; %s shows where the other ranks were"


class Place(NamedTuple):
    """Where a rank is.

    Attributes:
        beats: how often it has said so.
        moves: how often it has gone on to something else; all ranks go through the same.
        work: grows while it is busy with something long.
        step: the step it works on, counted from 1; 0 before the first.
        doing: what it works on.
        trouble: `failed` where it ends with an error, `cut off` where another rank does not answer it, else nothing.
        host: its machine.
    """

    beats: int = 0
    moves: int = 0
    work: int = 0
    step: int = 0
    doing: str = "starting"
    trouble: str = ""
    host: str = ""

    def text(self) -> str:
        """As the store keeps it."""
        return "\t".join(str(value).replace("\t", " ") for value in self)

    @staticmethod
    def parse(text: str) -> Place:
        """Read what `text` gives."""
        beats, moves, work, step, doing, trouble, host = text.split("\t")
        return Place(int(beats), int(moves), int(work), int(step), doing, trouble, host)


class Limits(NamedTuple):
    """When a rank is given up.

    Attributes:
        silent_s: it has not been heard of for so long.
        stalled_s: no rank has moved on for so long.
        leave_s: it was told to end so long ago, and the job's time is nearly over.
    """

    silent_s: float
    stalled_s: float
    leave_s: float = math.inf


@dataclass
class Sighting:
    """What is known of a rank, on the clock of the one who looks.

    Attributes:
        place: where it said it was.
        heard_s, moved_s: when that last was something new, and when it last moved on.
    """

    place: Place = field(default_factory=Place)
    heard_s: float = 0.0
    moved_s: float = 0.0

    def see(self, place: Place, now_s: float) -> None:
        """Take note of a place."""
        if place.beats != self.place.beats:
            self.heard_s = now_s
        if (place.moves, place.work) != (self.place.moves, self.place.work):
            self.moved_s = now_s
        self.place = place


def judge(seen: Mapping[int, Sighting], now_s: float, limits: Limits) -> str:
    """What is wrong with the ranks, in one line, or nothing.

    Args:
        seen: by rank.
        now_s: on the clock of the sightings.
        limits: what is too long.
    """
    silent_s = min(limits.silent_s, GONE_S) if any(one.place.trouble for one in seen.values()) else limits.silent_s
    silent = [rank for rank, one in seen.items() if now_s - one.heard_s > silent_s]
    if silent and all(seen[rank].place.trouble == FAILED for rank in silent):
        return _name(seen, silent, "failed, see its own line")
    if silent:
        return _name(seen, silent, "not heard of any more")
    still_s = now_s - max(one.moved_s for one in seen.values())
    if still_s <= limits.stalled_s:
        return ""
    behind = _behind(seen)
    if len(behind) == len(seen) > 1:
        place = seen[0].place
        where = f"all are in step {place.step}, {place.doing}"
        return f"no rank has moved on for {still_s:.0f} s (guard.stalled_s), {where}"
    return _name(seen, behind, f"not moved on for {still_s:.0f} s (guard.stalled_s)")


def _behind(seen: Mapping[int, Sighting]) -> list[int]:
    """The ranks that have come least far."""
    least = min(one.place.moves for one in seen.values())
    return [rank for rank, one in seen.items() if one.place.moves == least]


def _name(seen: Mapping[int, Sighting], ranks: list[int], what: str) -> str:
    """The first few ranks, where they are, and what is wrong with them."""
    few = [
        f"rank {rank} on {place.host} (last in step {place.step}, {place.doing})"
        for rank, place in ((rank, seen[rank].place) for rank in ranks[:4])
    ]
    more = f" and {len(ranks) - len(few)} more" if len(ranks) > len(few) else ""
    return f"{', '.join(few)}{more}: {what}"


class Watchdog:
    """Watches the ranks of a job while its `with` block runs; every rank enters.

    Args:
        world: this rank among the others.
        run_dir: where the stacks go.
        limits: when a rank is given up.
        working: a number that grows while this rank is busy with something long, as a slow disk makes of a save.
        start: of the run, which is told of a verdict, and asked whether this rank may still write.
    """

    def __init__(
        self,
        world: World,
        run_dir: Path,
        limits: Limits,
        working: Callable[[], int] = int,
        start: Start | None = None,
    ) -> None:
        self._world, self._run_dir, self._working = world, run_dir, working
        self.tune(limits)
        self._start = start
        self._told_s = math.inf
        self._place = Place(host=socket.gethostname())  # of the loop's thread, which alone changes it
        self._beats = 0
        self._seen = {rank: Sighting() for rank in range(world.world_size if world.is_main else 1)}
        self._verdict = ""
        self._over = threading.Event()
        self._store = self._join()

    def tune(self, limits: Limits) -> None:
        """Go on with other limits; rank 0 alone judges who is behind."""
        self._limits = limits if self._world.is_main else limits._replace(stalled_s=math.inf)

    def at(self, step: int, doing: str) -> None:
        """This rank has gone on to something else; all ranks say the same in the same order.

        Args:
            step: counted from 0.
            doing: what it is busy with from now on.
        """
        self._place = self._place._replace(moves=self._place.moves + 1, step=step + 1, doing=doing)

    def hurry(self) -> None:
        """The job was told to end; called by any thread."""
        self._told_s = min(self._told_s, time.monotonic())

    def _join(self) -> torch.distributed.TCPStore:
        address, patience = os.environ["MASTER_ADDR"], timedelta(seconds=CONNECT_S)
        main = self._world.is_main
        store = torch.distributed.TCPStore(address, 0, None, True, patience, wait_for_workers=False) if main else None
        port = from_main(store.port if store else 0, self._world.device)
        return store or torch.distributed.TCPStore(address, port, None, False, patience)

    def __enter__(self) -> Watchdog:
        if self._world.is_main:
            self._store.set(VERDICT, "")
        self._beat()
        barrier()  # from here on everything that is read is there
        self._threads = [threading.Thread(target=act, daemon=True) for act in (self._talk, self._watch)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            barrier()
        elif issubclass(kind, RuntimeError) and cut_off(str(error)):
            self._place = self._place._replace(trouble=CUT_OFF)
            time.sleep(3 * GONE_S)  # by when the verdict has named who is gone, and ended this process
        self._over.set()
        for (
            thread
        ) in self._threads:  # Python aborts if it ends while one of them is in the store, which rank 0 may slow
            thread.join(2 * BEAT_S if kind else self._limits.silent_s)
        if kind is not None:
            self._place = self._place._replace(trouble=FAILED)
            _at_most(2 * BEAT_S, self._leave_word)
            if self._world.is_main and self._world.world_size > 1 and issubclass(kind, Exception):
                atexit.register(self._stay)  # only then: a launcher may end this process before it has said why

    def _leave_word(self) -> None:
        """This rank ends with an error."""
        with suppress(RuntimeError):
            self._beat()
            if self._world.is_main:
                self._store.set(VERDICT, _name({0: Sighting(self._place)}, [0], "failed, see its own line"))

    def _stay(self) -> None:
        """Keep the store, which ends with this process, until the others have read of its error."""
        time.sleep(READ_S)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(str(self._world.rank), self._place._replace(beats=self._beats, work=self._working()).text())

    def _talk(self) -> None:
        """Say where this rank is, and hear of the others; hangs for good when rank 0 is stopped."""
        while not self._over.wait(BEAT_S):
            try:
                self._beat()
                texts = self._store.multi_get([VERDICT, *map(str, self._seen)])
            except RuntimeError:  # rank 0 has gone, and its store with it
                continue
            now = time.monotonic()
            if self._start is not None and self._world.is_main and self._beats % SEEN_BEATS == 0:
                self._start.touch()
            self._verdict = texts[0].decode()
            for one, text in zip(self._seen.values(), texts[1:], strict=True):
                one.see(Place.parse(text.decode()), now)

    def _watch(self) -> None:
        """End this process when rank 0 says so, or where it is rank 0 that is missed."""
        last = time.monotonic()
        self._forgive(last)
        while not self._over.wait(BEAT_S):
            now = time.monotonic()
            if now - last > max(GONE_S, self._limits.silent_s / 2):
                self._forgive(now)  # this process itself was stopped, so it has not listened
            last = now
            seen = self._seen
            if self._place.trouble and not self._world.is_main:
                seen = {**seen, self._world.rank: Sighting(self._place, now, now)}
            found = judge(seen, now, self._limits) or self._late(now)
            if (self._verdict or found) and not self._over.is_set():
                self._end(self._verdict or found, speak=not self._verdict)

    def _late(self, now: float) -> str:
        """Whether the job's end is near and it is not through; rank 0, which sees all ranks, says so first."""
        late_s = now - self._told_s - self._limits.leave_s
        if late_s <= (0 if self._world.is_main else READ_S):
            return ""
        seen = self._seen if self._world.is_main else {self._world.rank: Sighting(self._place)}
        return _name(seen, _behind(seen), f"not through, and the job was told to end {now - self._told_s:.0f} s ago")

    def _forgive(self, now: float) -> None:
        """Wait for everybody anew."""
        for one in self._seen.values():
            one.heard_s = one.moved_s = now

    def _end(self, verdict: str, speak: bool) -> None:
        """End this process; the rank that found out tells the others first, then whoever reads the output."""
        if speak and self._world.is_main:
            with suppress(RuntimeError):
                self._store.set(VERDICT, verdict)
        if speak:
            _at_most(GONE_S, log.error, WHY, verdict, self._run_dir / STALLS)
            if self._start is not None:
                _at_most(GONE_S, self._start.end, "failed", verdict)
        _at_most(GONE_S, self._leave_stacks, verdict)
        if speak and self._world.is_main:
            time.sleep(READ_S)
        os._exit(FAULT)

    def _leave_stacks(self, verdict: str) -> None:
        folder = self._run_dir / STALLS
        with suppress(OSError, OutageError):
            if self._start is not None:
                self._start.check()
            folder.mkdir(exist_ok=True)
            with (folder / f"rank-{self._world.rank:05d}.txt").open("w") as file:
                file.write(f"{verdict}\nthis rank: step {self._place.step}, {self._place.doing}\n\n")
                file.flush()
                faulthandler.dump_traceback(file)


def _at_most(seconds: float, action: Callable[..., None], *arguments: object) -> None:
    """Do what may never return, as a write to a dead file server or a word to a stopped rank, and wait no longer."""
    thread = threading.Thread(target=action, args=arguments, daemon=True)
    thread.start()
    thread.join(seconds)


def cut_off(error: str) -> bool:
    """Whether the text of an error says that another rank does not answer."""
    return any(sign in error for sign in ("gloo/transport", "NCCL", "Connection closed by peer", "Connection reset"))
