"""One rank of a test: trains one config after another, and tells what the engine held between steps and what one sent.

python held_and_sent.py CONFIGS   (JSON; under a launcher's variables; prints one JSON object per config)
"""

from __future__ import annotations

import functools
import gc
import inspect
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

import torch
from live import Live
from torch import Tensor

from fmscale import log, train
from fmscale.config import TrainConfig, check

WARM = 4  # steps after which ZeRO-3 knows in which order modules run
# Functions of torch.distributed that move tensors -> the argument whose bytes are counted.
MOVED = {
    "all_gather": "tensor_list",
    "all_gather_coalesced": "output_tensor_lists",
    "all_gather_into_tensor": "output_tensor",
    "all_reduce": "tensor",
    "all_reduce_coalesced": "tensors",
    "all_to_all": "input_tensor_list",
    "all_to_all_single": "input",
    "broadcast": "tensor",
    "gather": "tensor",
    "irecv": "tensor",
    "isend": "tensor",
    "recv": "tensor",
    "reduce": "tensor",
    "reduce_scatter": "input_list",
    "reduce_scatter_tensor": "input",
    "scatter": "tensor",
    "send": "tensor",
}


def count(sent: Counter[str]) -> None:
    """From now on add up the bytes that this process gives to torch.distributed by function, and its calls."""
    modules = torch.distributed, torch.distributed.distributed_c10d  # DeepSpeed calls those of both
    for name, argument in MOVED.items():
        counted = _counted(getattr(torch.distributed, name), name, argument, sent)
        for module in modules:
            setattr(module, name, counted)


def _counted(function: Any, name: str, argument: str, sent: Counter[str]) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def counted(*args: Any, **named: Any) -> Any:
        moved = signature.bind(*args, **named).arguments[argument]
        sent[f"calls of {name}"] += 1
        sent[name] += sum(tensor.nbytes for tensor in tensors_within(moved))
        return function(*args, **named)

    return counted


def tensors_within(root: object) -> Iterator[Tensor]:
    """Every tensor that an object leads to, by whatever attributes, containers and closures, without global names."""
    seen, waiting = dict[int, object](), [root]  # objects are kept, so that no other takes an id
    while waiting:
        here = waiting.pop()
        if id(here) in seen or isinstance(here, (type, ModuleType)):
            continue
        seen[id(here)] = here
        if isinstance(here, FunctionType):
            waiting += [here.__closure__, here.__defaults__, here.__kwdefaults__, here.__dict__]
        elif isinstance(here, Tensor):
            yield here
            waiting += [here.grad if here.is_leaf else None, vars(here)]
        else:
            waiting += gc.get_referents(here)


def held(engine: Any) -> list[tuple[int, str, list[int]]]:
    """Each block of memory that an engine leads to: bytes, and dtype and shape of a tensor in it.

    Constants of the network are no states: nothing updates them. Nor are single numbers that are remembered, such as
    the norm of the last gradient, but for the optimizer's counts.
    """
    constants = {tensor.untyped_storage().data_ptr() for tensor in engine.engine.module.buffers()}
    states = {id(tensor) for tensor in tensors_within(engine.optimizer.state)}
    blocks = dict[int, tuple[int, str, list[int]]]()
    for tensor in tensors_within(engine):
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place and place not in constants and (tensor.numel() > 1 or id(tensor) in states):
            blocks[place] = (storage.nbytes(), str(tensor.dtype), list(tensor.shape))
    return sorted(blocks.values(), reverse=True)


def trained(config: TrainConfig, sent: Counter[str]) -> dict[str, Any]:
    """What the engine held before the last step, and the bytes that were sent from each warm step to the next."""
    before, blocks, peaks = list[Counter[str]](), list[Any](), list[list[int]]()
    real = train.train_step

    def step(job: train.Job, batches: Any, number: int, *rest: Any) -> Any:
        before.append(Counter(sent))
        if number == config.steps - 1:
            blocks.extend(held(job.engine))
        if number < WARM:
            return real(job, batches, number, *rest)
        sizes = list[tuple[int, int]]()

        def seen() -> Iterator[Any]:
            for batch in batches:
                sizes.append(batch.bucket)
                yield batch

        with Live() as live:
            live.leave_out(tensors_within(job.engine))
            found = real(job, seen(), number, *rest)
        peaks.append([*sizes[0], live.most])
        return found

    with patch.object(train, "train_step", step):
        train.train(config)
    steps = zip(before[WARM - 1 :], before[WARM:], strict=False)
    return {"held": blocks, "peaks": peaks, "sent": [dict(after - earlier) for earlier, after in steps]}


def main() -> None:
    log.setup()
    sent = Counter[str]()
    count(sent)
    for data in json.loads(sys.argv[1]):
        print("ROW", json.dumps(trained(check(TrainConfig, data, "test"), sent)), flush=True)


if __name__ == "__main__":
    main()
