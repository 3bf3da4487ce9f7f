"""Several datasets that are read as one, by weight; one dataset is a mixture of one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fmscale.data.index import BROKEN, Index, Layout
from fmscale.data.order import Generation, Order, StepPlan
from fmscale.data.raw import PIXELS, RawImages, RawSample
from fmscale.data.reader import Sample, read_sample
from fmscale.data.storage import Location, Storage
from fmscale.errors import UserError


@dataclass(frozen=True)
class MixedBucket:
    """The samples of one latent size in all datasets.

    Attributes:
        height, width: in latent pixels.
        starts: row of the first of them, per dataset.
        counts: how many there are, per dataset.
    """

    height: int
    width: int
    starts: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def name(self) -> str:
        """For instance `64x96`: height, then width."""
        return f"{self.height}x{self.width}"

    @property
    def count(self) -> int:
        """Samples of all datasets."""
        return sum(self.counts)


class Address(NamedTuple):
    """A sample of a mixture: the dataset's number, and the row in its index."""

    part: int
    row: int


def only_appended(old: Sequence[Mapping[str, str]], new: Sequence[Mapping[str, str]]) -> bool:
    """Whether all shards that were there are there, unchanged.

    Args:
        old, new: from `Mixture.shards`.
    """
    return len(old) == len(new) and all(before.items() <= now.items() for before, now in zip(old, new, strict=True))


def first_difference(old: Sequence[Mapping[str, str]], new: Sequence[Mapping[str, str]]) -> str:
    """In words, the first shard that is not what it was; one that is new is named only where nothing else differs.

    Args:
        old, new: from `Mixture.shards`.
    """
    if len(old) != len(new):
        return f"{len(old)} datasets before, {len(new)} now"
    added = []
    for before, now in zip(old, new, strict=True):
        for name in sorted(before):
            if name not in now:
                return f"{name} is gone"
            if before[name] != now[name]:
                return f"{name} has other content, or is indexed otherwise"
        added += sorted(now.keys() - before.keys())
    return f"{added[0]} is new" if added else "the same shards in another order"


class Mixture:
    """Open datasets that store the same tensors.

    Args:
        datasets: one or more, open.
        weights: share of each in the samples that are drawn, > 0; None for shares by size.

    Attributes:
        buckets: of all datasets, by height, then width.
        layout: dtype and shape of each stored tensor (of latents, the channels alone).
        raw: how samples are made, where they are images; None where latents are stored.

    Raises:
        UserError: two of them store different tensors, or make samples of images in different ways.
    """

    def __init__(self, datasets: Sequence[Index], weights: Sequence[float] | None = None):
        self.datasets = tuple(datasets)
        self.weights = weights
        self.layout: Layout = datasets[0].layout
        for other in datasets[1:]:
            for name in sorted(self.layout | other.layout):
                if self.layout.get(name) != other.layout.get(name):
                    raise UserError(
                        f"data.mixture: {datasets[0].place} stores {name} as {self.layout.get(name)}, "
                        f"{other.place} as {other.layout.get(name)}; encode both with one config"
                    )
        self.raw = _raw_images(datasets) if PIXELS in self.layout else None
        self.buckets = tuple(self._mixed_buckets())

    def _mixed_buckets(self) -> list[MixedBucket]:
        by_size = [{(b.height, b.width): b for b in dataset.buckets} for dataset in self.datasets]
        sizes = sorted({size for buckets in by_size for size in buckets})
        return [
            MixedBucket(
                *size,
                starts=tuple(buckets[size].start if size in buckets else 0 for buckets in by_size),
                counts=tuple(buckets[size].count if size in buckets else 0 for buckets in by_size),
            )
            for size in sizes
        ]

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    @property
    def name(self) -> str:
        """The datasets' folders, in words."""
        return " + ".join(dataset.place for dataset in self.datasets)

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.layout["latents"][1][0] if self.raw is None else self.raw.vae["channels"]

    @property
    def fingerprint(self) -> str:
        """Digest of all that is stored in them, and of how samples are made of it."""
        prints = [dataset.fingerprint for dataset in self.datasets]
        if self.raw is not None:
            prints.append(self.raw.digest)
        return prints[0] if len(prints) == 1 else hashlib.sha256("\n".join(prints).encode()).hexdigest()

    @property
    def made_by(self) -> dict[str, Any]:
        """What made the first of them; empty where nobody wrote it down."""
        return self.datasets[0].made_by or {}

    def shards(self) -> list[dict[str, str]]:
        """Per dataset, by the shard's name, its digest, how many of its samples are in the index, how they are made."""
        made = f" {self.raw.digest}" if self.raw is not None else ""
        return [
            {shard.name: f"{shard.sha256} {shard.samples}{made}" for shard in dataset.shards}
            for dataset in self.datasets
        ]

    def generation(self, step: int = 0) -> Generation:
        """All that is stored, for the steps from one on."""
        return Generation(step, {bucket.name: bucket.counts for bucket in self.buckets}, self.fingerprint)

    def order(
        self, global_batch: int, seed: int, run: int = 1, generations: Sequence[Generation] | None = None
    ) -> Order:
        """The order in which training sees the samples.

        Args:
            global_batch, seed, run: as for `Order`.
            generations: where data was appended in mid-run: what was stored when; the last of them is what is now.
        """
        return Order(generations or [self.generation()], global_batch, seed, self.weights, run)

    def check_appended(self, before: Sequence[Mapping[str, str]], old: Generation) -> None:
        """Refuse appended shards that stand among the old ones: rows follow the shards' names.

        Args:
            before: the shards that were there, from `shards`.
            old: how many samples they held.

        Raises:
            UserError: says of which bucket.
        """
        for part, (dataset, names) in enumerate(zip(self.datasets, before, strict=True)):
            for bucket in dataset.buckets:
                if bucket.name in old.sizes and dataset.reach(bucket, names) != old.sizes[bucket.name][part]:
                    raise UserError(
                        f"{dataset.place}: in bucket {bucket.name} new shards stand before old ones; rename them so "
                        "that in each bucket they come last by name, and run `fmscale index` again"
                    )

    def addresses(self, plan: StepPlan) -> list[Address]:
        """The samples of a step, one for each slot of the global batch."""
        starts = self.buckets[plan.bucket].starts
        pairs = zip(plan.parts.tolist(), plan.rows.tolist(), strict=True)
        return [Address(part, starts[part] + row) for part, row in pairs]

    def key(self, address: Address) -> str:
        """The key of a sample."""
        return self.datasets[address.part].key(address.row)

    def location(self, address: Address) -> Location:
        """Where a sample's bytes lie, in `storage(address)`."""
        return self.datasets[address.part].location(address.row)

    def storage(self, address: Address) -> Storage:
        """Reads the dataset that a sample is from."""
        return self.datasets[address.part].storage

    def expect(self, addresses: Iterable[Address]) -> None:
        """Take note of what is read next; what is slow to fetch is fetched now, all of it at once."""
        for part, dataset in enumerate(self.datasets):
            dataset.storage.expect([dataset.location(address.row) for address in addresses if address.part == part])

    def empty(self, bucket: MixedBucket, count: int) -> dict[str, Tensor]:
        """Memory for the tensors of so many samples of this bucket, each (count, ...), with any content."""
        source = self.datasets[0] if self.raw is None else self.raw
        return source.empty(bucket.height, bucket.width, count)

    def sample(self, address: Address) -> Sample | RawSample:
        """Read one sample, whatever the others are.

        Raises:
            DamageError: as for `read_sample`, or `RawImages.read`.
        """
        place = self.storage(address), self.location(address)
        return read_sample(*place) if self.raw is None else self.raw.read(*place, self.key(address))


def _raw_images(datasets: Sequence[Index]) -> RawImages:
    """How samples are made of the images of all of them."""
    found = []
    for dataset in datasets:
        try:
            found.append(RawImages.of(dataset.made_by or {}))
        except BROKEN as error:
            raise UserError(
                f"{dataset.place}: its index does not say how images are prepared ({error}): run `fmscale index "
                f"{dataset.place} --images ENCODE.yaml`"
            ) from error
        if found[-1] != found[0]:
            raise UserError(
                f"data.mixture: {datasets[0].place} and {dataset.place} prepare images in different ways; index both "
                "with one encode config"
            )
    return found[0]
