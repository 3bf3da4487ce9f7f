"""Ranks: who am I, how many are we, and the few collectives that programs need themselves."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from fmscale.errors import SharedError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GRACE_S = 12.0  # in which ranks name the one that they miss
Result = TypeVar("Result")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)  # save, and end well


@dataclass(frozen=True)
class World:
    """This process among the ranks of a job.

    Attributes:
        rank: 0 … world_size - 1.
        local_rank: place on this machine, which is also the GPU's number.
        world_size: processes of the job.
    """

    rank: int
    local_rank: int
    world_size: int

    @property
    def device(self) -> torch.device:
        """The GPU of this rank, or the CPU where there is none."""
        import torch

        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """True on the one rank that speaks and writes what is shared."""
        return self.rank == 0


def world_from_environment() -> World:
    """The world that a launcher described (torchrun's names, else Slurm's), or a world of one.

    Raises:
        UserError: the launcher's variables make no sense.

    Source: the environment of torchrun and of `srun`.
    """
    env = os.environ
    if "RANK" in env:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    elif "SLURM_PROCID" in env and env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    else:
        return World(0, 0, 1)
    values = [env.get(name, "0" if name == "LOCAL_RANK" else "") for name in names]
    if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[2]):
        said = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        raise UserError(
            f"the environment describes no rank of a job ({said}); start through a launcher, or unset {names[0]}"
        )
    return World(*map(int, values))


def rank_environment(world: World, address: str, port: int) -> dict[str, str]:
    """The variables by which torch.distributed and DeepSpeed find one another."""
    return {
        "RANK": str(world.rank),
        "LOCAL_RANK": str(world.local_rank),
        "WORLD_SIZE": str(world.world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A TCP port that was free on this machine a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_can_spawn(nproc: int) -> None:
    """Refuse local ranks where they cannot work.

    Raises:
        UserError: a launcher has started ranks already, or there are fewer GPUs than ranks.
    """
    if world_from_environment().world_size > 1:
        raise UserError("--nproc: this process is one of several that a launcher started; leave --nproc out")
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else nproc
    if nproc > gpus:
        raise UserError(f"--nproc: {nproc} ranks on a machine of {gpus} GPUs; each rank takes one")


def spawn(argv: Sequence[str], nproc: int) -> int:
    """Run the command line `argv` on `nproc` local ranks, each a process of its own.

    Returns:
        0, or the largest exit code of a rank: one that ends because another has failed has 1. When one fails the
        others are ended; when this process ends, so do they.
    """
    from torch.multiprocessing import ProcessExitedException, start_processes

    interrupted: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        """Ranks save and end by themselves; SIGTERM, since a terminal has sent its SIGINT to them already."""
        interrupted.extend([number] if number == signal.SIGINT else [])
        for rank in context.processes:
            if rank.is_alive():
                os.kill(rank.pid, signal.SIGKILL if len(interrupted) > 1 else signal.SIGTERM)

    port = free_port()
    environments = [rank_environment(World(rank, rank, nproc), "127.0.0.1", port) for rank in range(nproc)]
    try:
        context = start_processes(
            _run_rank, args=(list(argv), environments), nprocs=nproc, join=False, start_method="spawn"
        )
        before = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
        try:
            while not context.join(grace_period=GRACE_S):
                pass
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
    except ProcessExitedException as error:
        if error.exit_code > 0:
            return max(process.exitcode for process in context.processes)
        print(
            f"fmscale {argv[0]}: rank {error.error_index} was ended by signal {-error.exit_code}, so the others were "
            "ended too; started again, a run goes on from its last checkpoint",
            file=sys.stderr,
        )
        return 1
    return 0


def spawn_workers(argv: Sequence[str], nproc: int) -> int:
    """Run the command line `argv` on `nproc` local processes, of which each goes on where another fails.

    Returns:
        0 where one of them ended well; else the exit code of the first that has one, or 1 where signals ended all.
    """
    from multiprocessing import get_context

    environments = [rank_environment(World(rank, rank, nproc), "127.0.0.1", 0) for rank in range(nproc)]
    workers = [
        get_context("spawn").Process(target=_run_worker, args=(rank, list(argv), environments)) for rank in range(nproc)
    ]

    def forward(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.pid is not None and worker.is_alive():
                os.kill(worker.pid, signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    codes = [worker.exitcode or 0 for worker in workers]
    return 0 if 0 in codes else next((code for code in codes if code > 0), 1)


def _run_worker(rank: int, argv: list[str], environments: list[dict[str, str]]) -> None:
    end_with_parent(signal.SIGTERM)
    _run_rank(rank, argv, environments)


def end_with_parent(number: int) -> None:
    """Let this process, which `multiprocessing` started, be sent a signal when the one that started it is dead."""
    from multiprocessing import parent_process

    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _run_rank(rank: int, argv: list[str], environments: list[dict[str, str]]) -> None:
    os.environ.update(environments[rank])
    # Each rank would take every core; torchrun sets 1 for the same reason.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(environments))))
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from fmscale.cli import main

    try:
        code = main(argv)
    except Exception:  # the launcher would show it of no rank but the one that ended first
        print(f"rank {rank}: {traceback.format_exc()}", file=sys.stderr)
        code = 1
    end(code)


def end(code: int) -> NoReturn:
    """End this process with an exit code; one with a group of ranks without the interpreter's own teardown.

    Threads come to their end, what was registered for it is done, and what was printed is written. But of a rank no
    more: DeepSpeed keeps a group for good, and a thread of gloo that lets go of a tensor during the teardown aborts the
    process, of which a launcher would make a run that has failed.

    Args:
        code: 0 … 255, of the process; 0 becomes 1 where what a rank has printed cannot be written.

    Source: pytorch/pytorch#179291.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        os._exit(code if _flush() else code or 1)
    sys.exit(code)


def _flush() -> bool:
    """Whether all that was printed is written, or nobody reads it any more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BrokenPipeError:
            continue
        except OSError as error:
            os.write(2, f"what was printed cannot be written: {error.strerror}\n".encode())
            return False
    return True


def total(values: Tensor, group: Any = None) -> Tensor:
    """Sum of `values` over all ranks, on every rank; the same tensor where there is one rank.

    Args:
        values: summed in place.
        group: of all ranks, in place of the default one.
    """
    import torch

    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(values, group=group)
    return values


def barrier() -> None:
    """Wait until every rank is here."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def any_rank(flag: bool, device: torch.device, group: Any = None) -> bool:
    """True on every rank where `flag` is true on at least one."""
    import torch

    return bool(total(torch.tensor([float(flag)], device=device), group).item() > 0)


def first_text(text: str, device: torch.device, group: Any = None) -> str:
    """What the first rank with something to say says, on every rank: `rank 3: …`; empty where all are silent.

    Args:
        text: what this rank says, or nothing.
        device: where the collective runs.
        group: of all ranks, in place of the default one.
    """
    import torch

    if not torch.distributed.is_initialized() or (count := torch.distributed.get_world_size()) == 1:
        return text
    rank, said = torch.distributed.get_rank(), text.encode()
    lengths = torch.zeros(count, dtype=torch.int32, device=device)
    lengths[rank] = len(said)
    speakers = total(lengths, group).tolist()
    first = next((speaker for speaker, length in enumerate(speakers) if length), None)
    if first is None:
        return ""
    letters = torch.zeros(speakers[first], dtype=torch.int32, device=device)
    if rank == first:
        letters += torch.tensor(list(said), dtype=torch.int32, device=device)
    return f"rank {first}: {bytes(total(letters, group).tolist()).decode()}"


def everywhere(action: Callable[[], Result], device: torch.device, group: Any = None) -> Result:
    """Do `action` on this rank; returns when all ranks have done it.

    Args:
        action: contains no collective, so that no rank waits within it for one that has failed.
        device, group: as for `first_text`.

    Raises:
        SharedError: on every rank, if the action failed on any; names the first. Where it failed for another reason
            than the user or the machine, that rank raises what went wrong.
    """
    mine: Exception | None = None
    try:
        result = action()
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        mine = error
    said = first_text("" if mine is None else str(mine) or repr(mine), device, group)
    if mine is not None and not isinstance(mine, (UserError, OSError)):
        raise mine
    if said:
        raise SharedError(said) from mine
    return result


def from_main(value: int, device: torch.device) -> int:
    """Rank 0's value, on every rank."""
    import torch

    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return int(total(torch.tensor([value if main else 0], device=device)).item())


def same_everywhere(digest: str, device: torch.device) -> bool:
    """Whether all ranks have the same digest, of which the first twelve hexadecimal digits are compared."""
    number = int(digest[:12], 16)
    return not any_rank(from_main(number, device) != number, device)
