"""The loss on images that training never sees: each has a noise and a t of its own, in any batch and world."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fmscale.batch import Batch
from fmscale.config import FlowConfig, TrainConfig
from fmscale.data.loader import WorkItem, make_batches
from fmscale.data.mixture import Address, MixedBucket, Mixture
from fmscale.dataset import Dataset, making, open_dataset
from fmscale.distributed import World, total
from fmscale.draws import JITTER, draw_view
from fmscale.encoders.text import assemble
from fmscale.engine.optim import ema_names
from fmscale.errors import UserError
from fmscale.flow.noise import draw_noise
from fmscale.objective import network_of, plain_losses
from fmscale.tally import BINS, by_timestep

if TYPE_CHECKING:
    from fmscale.train import Job

VALIDATION = "validation.jsonl"  # in the run directory
RAW = "raw"
GOLDEN = (math.sqrt(5) - 1) / 2
STEP = 0  # whatever is random in the view of a sample is as in that step


class HeldOut:
    """Images of a dataset that is held out, spread over its buckets and its length.

    Args:
        dataset: holds them, opened for the network.
        images: about so many of them.
        seed: of their noise.
        flow: the path that they are on, and what the network predicts.
        context_dim: token width that the network takes.
        world: the ranks that share them.
        micro_batch: most that a rank takes at once; changes nothing but speed.
    """

    def __init__(
        self,
        dataset: Dataset,
        images: int,
        *,
        seed: int,
        flow: FlowConfig,
        context_dim: int,
        world: World,
        micro_batch: int,
    ) -> None:
        self.dataset, self.seed, self.flow, self.context_dim = dataset.to(world.device), seed, flow, context_dim
        self.world, self.micro_batch = world, micro_batch
        self.chosen = list(choose(dataset.mixture, images))

    @torch.no_grad()
    def losses(self, model: Callable[..., Tensor]) -> dict[str, Any]:
        """The loss over all images, by bin of t and by bucket; every rank calls it.

        Args:
            model: of `fmscale.models.families`, or one under an engine.

        Returns:
            `loss`, `loss_by_t` (BINS numbers, None where no image is), `loss_by_bucket`, `images` that counted.
        """
        device, names = self.world.device, [bucket.name for bucket, _ in self.chosen]
        sums = torch.zeros(2, len(names) + BINS, dtype=torch.float64, device=device)
        for place, batch in self._batches():
            t = times(batch.slots).to(device)
            losses = self._loss_of(model, batch.to(device), t).double() * batch.weight.to(device)
            for row, values in zip(sums, (losses, batch.weight.to(device).double()), strict=True):
                row[place] += values.sum()
                row[len(names) :] += by_timestep(t, values)
        loss, images = total(sums).unbind()
        means = [mean if math.isfinite(mean) else None for mean in (loss / images).tolist()]  # JSON knows no NaN
        return {
            "loss": float(loss[: len(names)].sum() / images[: len(names)].sum().clamp(min=1)),
            "loss_by_t": means[len(names) :],
            "loss_by_bucket": dict(zip(names, means, strict=False)),
            "images": int(images[: len(names)].sum()),
        }

    def _loss_of(self, model: Callable[..., Tensor], batch: Batch, t: Tensor) -> Tensor:
        dataset = self.dataset
        text = {name: value.float() for name, value in dataset.text_of(batch.tensors, batch.captions).items()}
        given = assemble(
            {name: text[name] for name in dataset.null}, context_dim=self.context_dim, t5_length=dataset.t5_length
        )
        network, latents = network_of(model, given, self.flow), dataset.latents_of(batch.tensors)
        return plain_losses(self.flow, network, latents, batch.noise, t, batch.tensors.get(JITTER))

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        """This rank's share, with the number of its bucket; all ranks have equally many."""
        dataset, seed = self.dataset, self.seed
        items = list(shares(self.chosen, self.world, self.micro_batch))
        batches = make_batches(
            (item for _, item in items),
            mixture=dataset.mixture,
            noise=lambda shape, step, slot, read_meta: draw_noise(shape, "validation", seed, slot),
            view=functools.partial(draw_view, seed, dataset.mixture.raw, jitter=self.flow.sigma > 0),
            captions=dataset.online is not None,
            counts=dataset.counted if dataset.online is None else (),
        )
        return zip((place for place, _ in items), batches, strict=True)


class Validation:
    """What a run measures on images that are held out.

    Args:
        job: the run.

    Raises:
        UserError: as `open_held_out`.
    """

    def __init__(self, job: Job) -> None:
        config = job.config
        assert config.validation is not None
        self.job = job
        self.held_out = HeldOut(
            open_held_out(config, job.dataset, job.programme.datasets),
            config.validation.images,
            seed=config.seed,
            flow=config.flow,
            context_dim=config.model.context_dim,
            world=job.world,
            micro_batch=job.portions.micro_batch,
        )

    def measure(self) -> list[dict[str, Any]]:
        """A record for the raw weights, and one for each average; every rank calls it."""
        config, engine = self.job.config, self.job.engine
        records = []
        for kind in (RAW, *ema_names(config.ema.decays, config.ema.sigma_rels)):
            with nullcontext() if kind == RAW else engine.averaged(kind):
                records.append({"weights": kind, **self.held_out.losses(engine)})
        return records


def open_held_out(config: TrainConfig, trained_on: Dataset, others: Sequence[Dataset] = ()) -> Dataset:
    """The dataset that a config validates on.

    Args:
        config: names it.
        trained_on: what it must not be, and must have been made like.
        others: that the run trains on in other phases: it must be none of them either.

    Raises:
        UserError: says what is wrong with it.
    """
    assert config.validation is not None
    held_out = open_beside(config, config.validation.path)
    learned = {digest for one in (trained_on, *others) for shards in one.mixture.shards() for digest in shards.values()}
    if both := [name for shards in held_out.mixture.shards() for name, digest in shards.items() if digest in learned]:
        raise UserError(
            f"validation.path: {config.validation.path} holds {both[0]}, which the run trains on; hold some shards out"
        )
    if making(held_out.mixture.made_by) != making(trained_on.mixture.made_by):
        raise UserError(
            f"validation.path: {config.validation.path} was not made by the VAE and text encoders of "
            f"{trained_on.mixture.name}; encode one again"
        )
    return replace(held_out, online=trained_on.online or held_out.online, vae=trained_on.vae or held_out.vae)


def open_beside(config: TrainConfig, place: str) -> Dataset:
    """Another dataset for the network of a config; its noise need not be paired.

    Raises:
        UserError: as `open_dataset`.
    """
    data = config.data.model_copy(update={"path": place, "mixture": ()})
    flow = config.flow.model_copy(update={"coupling": "independent"})
    return open_dataset(config.model_copy(update={"data": data, "flow": flow}))


def choose(mixture: Mixture, images: int) -> Iterator[tuple[MixedBucket, list[Address]]]:
    """About so many images, of each bucket its share, spread over the order in which they are stored."""
    share = min(1.0, images / len(mixture))
    for bucket in mixture.buckets:
        places = enumerate(zip(bucket.starts, bucket.counts, strict=True))
        yield bucket, [Address(part, start + row) for part, (start, n) in places for row in spread(n, share)]


def spread(count: int, share: float) -> list[int]:
    """A share of so many rows, at least one where there are any, evenly spread."""
    wanted = math.ceil(count * share)
    return [row * count // wanted for row in range(wanted)]


def shares(
    chosen: Sequence[tuple[MixedBucket, Sequence[Address]]], world: World, micro_batch: int
) -> Iterator[tuple[int, WorkItem]]:
    """A rank's micro-batches, each of one bucket; slots number the images of all buckets, one after another."""
    first = 0
    for place, (bucket, addresses) in enumerate(chosen):
        for begin in range(0, len(addresses), world.world_size * micro_batch):
            mine = begin + world.rank * micro_batch + np.arange(micro_batch)
            samples = tuple(addresses[row] if row < len(addresses) else None for row in mine.tolist())
            yield place, WorkItem(STEP, bucket, first + mine, samples)
        first += len(addresses)


def times(slots: Tensor) -> Tensor:
    """A t for each image that depends on its number alone; those of neighbours fill [0, 1) evenly.

    Source: the additive recurrence with the golden ratio, whose discrepancy is the least of its kind.
    """
    return torch.frac(0.5 + slots.double() * GOLDEN).float()
