"""The records that cross borders between parts.

Dimensions: B images, C latent channels, H x W latent pixels, L text tokens, D token width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

COUNT = "_count"  # after a text encoder's role: tokens that a caption has, behind which its features are padding


@dataclass(frozen=True)
class Conditioning:
    """What the network is told about the text.

    Attributes:
        context: text tokens, shape (B, L, D).
        pooled: pooled text embedding, shape (B, P).
        repeats: shape (L,), or (B, L) where images differ, int64, or None. Token i stands for `repeats[i]` identical
            tokens: a run of equal tokens (the zeros that pipelines feed for an absent T5) costs one token and changes
            nothing, and one that counts 0 times is padding that the image does not see. None means all ones.
    """

    context: Tensor
    pooled: Tensor
    repeats: Tensor | None = None

    def of(self, rows: Tensor) -> Conditioning:
        """That of some of the images."""
        repeats = self.repeats if self.repeats is None or self.repeats.ndim == 1 else self.repeats[rows]
        return Conditioning(self.context[rows], self.pooled[rows], repeats)

    def beside(self, other: Conditioning) -> Conditioning | None:
        """That of the images of both, one after another; None where their texts are not of one length."""
        if self.context.shape[1:] != other.context.shape[1:]:
            return None
        repeats = self.repeats
        if repeats is None or other.repeats is None:
            if repeats is not other.repeats:
                return None
        elif repeats.ndim == 2:
            repeats = torch.cat([repeats, other.repeats])
        elif not torch.equal(repeats, other.repeats):
            return None
        return Conditioning(torch.cat([self.context, other.context]), torch.cat([self.pooled, other.pooled]), repeats)


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used: its slot has weight 0 in the loss.

    Attributes:
        key: empty where a whole shard is meant.
        shard: or file, where it lies.
        reason: why.
        detail: what the reason leaves out, where reasons are counted.
    """

    key: str
    shard: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Batch:
    """One micro-batch: the images of one bucket that one rank works on at once.

    Attributes:
        step: optimizer step that the batch belongs to, counted from 0.
        bucket: latent (height, width), the same on every rank in a step.
        slots: places in the global batch, shape (B,), int64.
        weight: shape (B,), float32: 1, or 0 where the slot is padding or its sample is damaged.
        tensors: stored tensors by name, each (B, ...): `latents` and, per text encoder, tokens and pooled embedding;
            beside them, where they were asked for, `ROLE_count` (B,): tokens that the caption has.
        noise: shape of the latents, float32, standard normal.
        keys: the samples' keys, one per slot; empty text for padding.
        bad: the damaged samples among them.
        captions: one per slot, where they were asked for; empty text for padding.
    """

    step: int
    bucket: tuple[int, int]
    slots: Tensor
    weight: Tensor
    tensors: dict[str, Tensor]
    noise: Tensor
    keys: tuple[str, ...]
    bad: tuple[BadSample, ...] = ()
    captions: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; `slots` stays on the CPU, where it indexes the step's draws."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        tensors = {name: move(tensor) for name, tensor in self.tensors.items()}
        return replace(self, weight=move(self.weight), tensors=tensors, noise=move(self.noise))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU run in the background."""
        tensors = {name: tensor.pin_memory() for name, tensor in self.tensors.items()}
        return replace(self, weight=self.weight.pin_memory(), tensors=tensors, noise=self.noise.pin_memory())


def prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on a device; a GPU copies the next one on a stream of its own, beside the work on this one.

    Args:
        batches: on the CPU, page-locked where `device` is a GPU.
        device: where they are needed.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    stream = torch.cuda.Stream(device)
    ahead, failure = _copy_on(stream, batches)
    while ahead is not None:
        batch, arrived = ahead
        ahead, failure = _copy_on(stream, batches)
        current = torch.cuda.current_stream(device)
        current.wait_event(arrived)
        for tensor in (batch.weight, batch.noise, *batch.tensors.values()):
            tensor.record_stream(current)  # else its memory could be given away while this stream still reads it
        yield batch
    if failure is not None:
        raise failure


def _copy_on(
    stream: torch.cuda.Stream, batches: Iterator[Batch]
) -> tuple[tuple[Batch, torch.cuda.Event] | None, Exception | None]:
    """The next batch on its way, or why there is none: that is told when the batches before it were used."""
    try:
        batch = next(batches, None)
    except Exception as error:
        return None, error
    if batch is None:
        return None, None
    with torch.cuda.stream(stream):
        return (batch.to(stream.device), stream.record_event()), None
