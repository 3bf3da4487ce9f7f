from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fmscale.batch import Batch, prefetch


def batches(count: int, pin: bool = False) -> Iterator[Batch]:
    """Batches that hold their number."""
    for number in range(count):
        tensors = {"latents": torch.full((4, 16, 64, 64), float(number)), "clip_l": torch.full((4, 77, 768), number)}
        batch = Batch(
            step=number,
            bucket=(64, 64),
            slots=torch.arange(4),
            weight=torch.full((4,), float(number)),
            tensors=tensors,
            noise=torch.full((4, 16, 64, 64), float(-number)),
            keys=("a", "b", "c", "d"),
        )
        yield batch.pin_memory() if pin else batch


def assert_holds(batch: Batch, number: int) -> None:
    assert batch.step == number
    assert batch.slots.device.type == "cpu"
    for tensor in (batch.weight, *batch.tensors.values()):
        assert bool((tensor == number).all())
    assert bool((batch.noise == -number).all())


def test_batches_come_in_order_and_end() -> None:
    found = list(prefetch(batches(5), torch.device("cpu")))
    assert len(found) == 5
    for number, batch in enumerate(found):
        assert_holds(batch, number)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("count", [0, 1, 20])
def test_copies_beside_a_busy_gpu_are_whole(count: int) -> None:
    """The work on each batch outlasts the copies of the next ones, and its memory is given back at once."""
    device = torch.device("cuda")
    busy = torch.randn(4096, 4096, device=device)
    sums = []
    for number, batch in enumerate(prefetch(batches(count, pin=True), device)):
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        assert batch.noise.device.type == "cuda"
        sums.append((number, batch.tensors["latents"].sum(), batch.noise.sum()))
        del batch
    size = 4 * 16 * 64 * 64
    assert len(sums) == count
    for number, latents, noise in sums:
        assert (latents.item(), noise.item()) == (number * size, -number * size)
