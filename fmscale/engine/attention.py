"""Which of torch's attention kernels computes a shape: the fastest that takes it, found by a short trial at the start.

torch has one order of preference for all shapes of a GPU. What is faster depends on the shape, on the bias and on the
versions of torch and cuDNN, so it is tried; and since kernels round differently, a run keeps what it has found.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fmscale.distributed import World, everywhere, from_main
from fmscale.errors import UserError
from fmscale.log import get_logger

log = get_logger(__name__)
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,  # takes everything, and keeps the weight of every pair of tokens
}
FUSED = ("cudnn", "flash", "efficient")
WARM_UPS, REPETITIONS = 2, 7
Record = dict[str, Any]  # device, version of torch, and kernels by the name of their shape


class Shape(NamedTuple):
    """What one attention works on.

    Attributes:
        images: B.
        heads: of the attention.
        queries, keys: tokens.
        head_dim: channels of a head.
        dtype: of queries, keys and values.
        device: where they are.
        biases: rows of keys that are added to the logits: 0 for none, 1 for all images alike, B for one of each.
    """

    images: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    biases: int

    @property
    def name(self) -> str:
        """The shape in words, the device left out."""
        bias = ", biased" if self.biases == 1 else ", each image biased" if self.biases else ""
        return (
            f"{self.images} images x {self.heads} heads x {self.queries} queries x {self.keys} keys of {self.head_dim} "
            f"in {str(self.dtype).removeprefix('torch.')}{bias}"
        )


class Choice(NamedTuple):
    """The kernel of a shape, and the milliseconds of each that was timed for it."""

    kernel: str
    times_ms: Mapping[str, float]


@contextmanager
def using(kernel: str) -> Iterator[None]:
    """Attention in the block, backward passes included, is computed by this kernel if it takes the shape.

    What is compiled in the block is bound to the kernel. torch's caches on disk would not notice: they are keyed by the
    graph from before SDPA is replaced by a kernel, so the name goes into their key.
    """
    rest = [name for name in BACKENDS if name != kernel]
    order = [BACKENDS[name] for name in (kernel, *rest)] if kernel in FUSED else [BACKENDS[kernel]]
    tag = f"{torch.compiler.config.cache_key_tag} sdpa={kernel}"
    tagged = torch.compiler.config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]
    with tagged, sdpa_kernel(order, set_priority=True):
        yield


def choose(wanted: str, shape: Shape) -> Choice:
    """The kernel for a shape.

    Args:
        wanted: `auto` for the fastest fused one, which is timed only where there are several, `math` where there is
            none; or one of `BACKENDS`.
        shape: of the attention.

    Raises:
        UserError: the kernel that is wanted does not take the shape, forward or backward.
    """
    if wanted == "math":
        return Choice("math", {})
    run = trial(shape)
    if wanted != "auto":
        if not takes(wanted, run, shape.device):
            raise UserError(
                f"engine.attention: {wanted} does not take {shape.name} on {device_name(shape.device)}; "
                "choose auto, which tries what does"
            )
        return Choice(wanted, {})
    takers = [kernel for kernel in FUSED if takes(kernel, run, shape.device)]
    if len(takers) < 2:
        return Choice(takers[0] if takers else "math", {})
    times_ms = {kernel: milliseconds(kernel, run, shape.device) for kernel in takers}
    return Choice(fastest(times_ms), times_ms)


def fastest(times: Mapping[str, float]) -> str:
    """The name with the least time; of equals, the first."""
    return min(times, key=times.__getitem__)


def trial(shape: Shape) -> Callable[[], None]:
    """What runs one attention forward and backward, on random tensors that lie in memory as those of the networks."""
    generator = torch.Generator(shape.device).manual_seed(0)

    def random(tokens: int) -> torch.Tensor:
        size = (shape.images, tokens, shape.heads, shape.head_dim)
        return torch.randn(size, dtype=shape.dtype, device=shape.device, generator=generator)

    inputs = [random(tokens).requires_grad_() for tokens in (shape.queries, shape.keys, shape.keys)]
    gradient = random(shape.queries)
    bias = torch.zeros(shape.biases, 1, 1, shape.keys, dtype=shape.dtype, device=shape.device) if shape.biases else None

    def run() -> None:
        query, key, value = (tensor.transpose(1, 2) for tensor in inputs)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        torch.autograd.grad(attended.transpose(1, 2), inputs, gradient)

    return run


def takes(kernel: str, run: Callable[[], None], device: torch.device) -> bool:
    """Whether a kernel computes what `run` asks for."""
    try:
        with warnings.catch_warnings(), sdpa_kernel([BACKENDS[kernel]]):
            warnings.simplefilter("ignore")  # with which torch explains itself
            run()
            _wait(device)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # no refusal: the run itself could not go on either
    except RuntimeError:
        return False
    return True


def milliseconds(kernel: str, run: Callable[[], None], device: torch.device) -> float:
    """Median time of `run` with a kernel."""
    times = []
    with sdpa_kernel([BACKENDS[kernel]]):
        for _ in range(WARM_UPS + REPETITIONS):
            _wait(device)
            began = time.perf_counter()
            run()
            _wait(device)
            times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times[WARM_UPS:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """What kernels are chosen for: a GPU by its name, or the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def agree(
    wanted: str, shapes: Mapping[Hashable, Shape], file: Path, world: World
) -> tuple[dict[Hashable, str], Record | None]:
    """The kernel of each bucket, the same on every rank: rank 0 looks, and tells.

    Args:
        wanted: as for `choose`.
        shapes: by bucket, the same on every rank.
        file: where the run keeps a `Record`; `auto` obeys it on the same device and torch.
        world: this process among the ranks.

    Returns:
        Kernels by bucket; and on rank 0, if something new was found, what the file is to hold.

    Raises:
        SharedError: on every rank, if rank 0 cannot have what is wanted.
    """
    distinct, names = list(dict.fromkeys(shapes.values())), list(BACKENDS)
    known, record = everywhere(lambda: _look(wanted, distinct, file) if world.is_main else ({}, None), world.device)
    numbers = [from_main(names.index(known[shape]) if world.is_main else 0, world.device) for shape in distinct]
    told = {shape: names[number] for shape, number in zip(distinct, numbers, strict=True)}
    return {bucket: told[shape] for bucket, shape in shapes.items()}, record


def _look(wanted: str, shapes: Sequence[Shape], file: Path) -> tuple[dict[Shape, str], Record | None]:
    """The kernel of each shape, as stored or tried now; and what is to be stored, or None."""
    if wanted != "auto":
        return {shape: choose(wanted, shape).kernel for shape in shapes}, None
    device = device_name(shapes[0].device)
    stored = read_stored(file, device)
    choices = {shape: choose("auto", shape) for shape in shapes if shape.name not in stored}
    if choices:
        log.info("attention %s", "; ".join(_told(shape, choice) for shape, choice in choices.items()))
    kernels = stored | {shape.name: choice.kernel for shape, choice in choices.items()}
    record = {"device": device, "torch": torch.__version__, "kernels": kernels}
    return {shape: kernels[shape.name] for shape in shapes}, record if choices else None


def _told(shape: Shape, choice: Choice) -> str:
    times = ", ".join(f"{kernel} {ms:.3g} ms" for kernel, ms in sorted(choice.times_ms.items(), key=lambda row: row[1]))
    return f"{choice.kernel} for {shape.name}" + (f" ({times})" if times else "")


def read_stored(file: Path, device: str) -> dict[str, str]:
    """Kernels by the name of their shape, as an earlier start found them; empty where that does not count any more."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        kernels, made_on = dict(record["kernels"]), (record["device"], record["torch"])
        if not set(kernels.values()) <= BACKENDS.keys():
            raise ValueError("names no kernel")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        log.warning("attention: %s cannot be read; kernels are tried anew, and losses may round differently", file)
        return {}
    if made_on != (device, torch.__version__):
        log.info(
            "attention: %s was made on %s with torch %s; kernels are tried anew, and losses may round differently",
            file,
            *made_on,
        )
        return {}
    return kernels
