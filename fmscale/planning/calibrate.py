"""A trial of ten seconds on the machine at hand: matrix products, attention, copies, and sums over its ranks."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

import torch
import torch.nn.functional as F

from fmscale.distributed import free_port
from fmscale.errors import UserError
from fmscale.planning.devices import CPU, Device, Rates, found_gpu

TRIAL_S = 2.0  # of each kind
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GPU_SIDE, CPU_SIDE = 8192, 1024  # of matrices
GPU_TOKENS, CPU_TOKENS = 4096, 512
GPU_BYTES, CPU_BYTES = 1 << 30, 1 << 26
HEADS, HEAD_DIM = 24, 64


def calibrate(dtype: str) -> tuple[str, Device | None, Rates]:
    """Measure this machine.

    Args:
        dtype: of the network, `bf16` or `fp32`.

    Returns:
        What it is called; what it is, None for a CPU; and what it does.

    Raises:
        UserError: a launcher has started this process as one of several.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--calibrate: starts a rank for each GPU of this machine itself; run it without a launcher")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    gemm = gemm_rate(device, DTYPES[dtype])
    attention = attention_rate(device, DTYPES[dtype])
    copy = copy_rate(device)
    link = link_rate(torch.cuda.device_count() if gpu else 2, gpu)
    name, known = _name(gpu)
    rates = Rates(gemm, attention, copy, link, f"measured on {name}")
    return name, known, rates


def _name(gpu: bool) -> tuple[str, Device | None]:
    if not gpu:
        return CPU, None
    found = torch.cuda.get_device_properties(0)
    return found_gpu(found.name, found.total_memory)


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products."""
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    left, right = torch.randn(2, side, side, device=device).to(dtype).unbind(0)
    return _rate(lambda: left @ right, 2 * side**3, device)


def attention_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of attention with its backward pass, in which matrix products alone count, as in `models.flops`."""
    tokens = GPU_TOKENS if device.type == "cuda" else CPU_TOKENS
    shape = (4 if device.type == "cuda" else 1, HEADS, tokens, HEAD_DIM)
    query, key, value = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))

    def once() -> None:
        F.scaled_dot_product_attention(query, key, value).sum().backward()

    return _rate(once, 12 * shape[0] * HEADS * tokens**2 * HEAD_DIM, device)


def copy_rate(device: torch.device) -> float:
    """Bytes a second that are read and written as one tensor is copied to another."""
    size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    source, target = torch.empty(2, size, dtype=torch.uint8, device=device).unbind(0)
    return _rate(lambda: target.copy_(source), 2 * size, device)


def link_rate(ranks: int, gpu: bool) -> float:
    """Bytes a second that each of some ranks sends, in a ring, as they sum a large tensor; 0 for a rank alone."""
    if ranks < 2:
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "rate.json"
        arguments = ranks, free_port(), gpu, str(found)
        with interrupt_later():
            started = torch.multiprocessing.start_processes(
                _sum_together, arguments, ranks, join=False, daemon=True, start_method="spawn"
            )
        while not started.join():
            pass
        return float(json.loads(found.read_text()))


@contextmanager
def interrupt_later() -> Iterator[None]:
    """Ctrl-C interrupts what follows; processes that are started within do not hear of it, since this one ends them."""
    pressed = list[int]()
    handler = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))  # a thread may take the signal
    resource_tracker.ensure_running()  # which would let it through again as it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
    if pressed:
        raise KeyboardInterrupt


def _sum_together(rank: int, ranks: int, port: int, gpu: bool, found: str) -> None:
    device = torch.device(f"cuda:{rank}" if gpu else "cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("nccl" if gpu else "gloo", address, rank=rank, world_size=ranks)
    values = torch.ones((GPU_BYTES if gpu else CPU_BYTES) // 4, device=device)
    rounds = torch.zeros(1, device=device)

    def once() -> None:
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)

    once()
    began, count = time.perf_counter(), 0
    while not rounds.item():  # rank 0 says when it is enough, so that all do as many
        once()
        count += 1
        _wait(device)
        rounds.fill_(float(time.perf_counter() - began > TRIAL_S))
        torch.distributed.broadcast(rounds, 0)
    seconds = (time.perf_counter() - began) / count
    if rank == 0:
        sent = 2 * (ranks - 1) / ranks * values.numel() * values.element_size()
        Path(found).write_text(json.dumps(sent / seconds))
    torch.distributed.destroy_process_group()


def _rate(once: Callable[[], object], work: int, device: torch.device) -> float:
    """Work of a call over its time: the median of several spells, which together take `TRIAL_S`."""
    for _ in range(3):
        once()
    _wait(device)
    spells, end = list[float](), time.perf_counter() + TRIAL_S
    while time.perf_counter() < end or len(spells) < 3:
        began = time.perf_counter()
        for _ in range(4):
            once()
        _wait(device)
        spells.append((time.perf_counter() - began) / 4)
    return work / sorted(spells)[len(spells) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
