"""Tars of images as they were fetched, as a dataset: indexed by bucket, decoded and cropped whenever they are drawn."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmscale.batch import BadSample
from fmscale.data.captions import Captions
from fmscale.data.index import Layout
from fmscale.data.index_build import Row
from fmscale.data.prepare import Filters, Preparation
from fmscale.data.reader import read_bytes
from fmscale.data.reasons import ImageError
from fmscale.data.sources import SourceImage, TarUnit, join_members, read_members
from fmscale.data.storage import LocalStorage, Location, Storage
from fmscale.data.tar import DamageError

PIXELS = "pixels"  # in place of latents: shape (3, H, W) in image pixels, 0 to 255
LAYOUT: Layout = {PIXELS: ("U8", (3,))}


@dataclass(frozen=True)
class RawSample:
    """An image that was drawn, as `reader.Sample` is a stored sample.

    Attributes:
        tensors: `pixels` alone.
        meta: what the sample's json would say.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    def read_meta(self) -> dict[str, Any]:
        """Its json, with the caption that was drawn."""
        return self.meta


@dataclass(frozen=True)
class RawImages:
    """What decides which latents and captions training makes of images. It can be pickled: workers read them.

    Attributes:
        preparation: what is done to every image, at one resolution.
        captions: which are taken.
        vae: its identity.
        latents: `posterior`, of which each step draws a sample, or `mean`.
        flip: each step draws the image or its mirror image.
    """

    preparation: Preparation
    captions: Captions
    vae: Mapping[str, Any]
    latents: str
    flip: bool

    @classmethod
    def of(cls, made_by: Mapping[str, Any]) -> RawImages:
        """Those of a dataset, from its manifest; the inverse of `described`."""
        preparation, captions = made_by["images"]["preparation"], made_by["images"]["captions"]
        filters = Filters(**preparation["filters"])
        vae = {name: value for name, value in made_by["vae"].items() if name != "path"}
        prepared = Preparation(**{**preparation, "filters": filters})
        return cls(prepared, Captions(**captions), vae, made_by["latents"], made_by["flip"])

    def described(self) -> dict[str, Any]:
        """What a manifest's `made_by` says as `images`, for JSON; the rest it says anyway."""
        return {"preparation": asdict(self.preparation), "captions": asdict(self.captions)}

    @property
    def digest(self) -> str:
        """Of all that this is: images and captions may be other ones where the tars are the same."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, H, W) of the latents of images of this size."""
        return self.vae["channels"], height // self.vae["factor"], width // self.vae["factor"]

    def empty(self, height: int, width: int, count: int) -> dict[str, Tensor]:
        """Memory for so many images of this size in latent pixels, with any content."""
        factor = self.vae["factor"]
        return {PIXELS: torch.empty((count, 3, factor * height, factor * width), dtype=torch.uint8)}

    def scan(self, path: Path) -> tuple[list[Row], list[BadSample]]:
        """The images of a tar, and those that are left out; most are not decoded for it."""
        rows, left_out = [], []
        for source, (offset, length) in TarUnit(LocalStorage(path.parent), path.name, self.captions).read_places():
            try:
                (bucket,) = self.preparation.buckets(source)
                _, height, width = self.latent_shape(*bucket)
                rows.append(Row(source.key, offset, length, 0, 0, height, width))
            except ImageError as error:
                left_out.append(BadSample(source.key, path.name, error.reason, error.detail))
        return rows, left_out

    def read(self, storage: Storage, location: Location, key: str) -> RawSample:
        """Read, check and prepare one image.

        Args:
            storage, location, key: from the index.

        Raises:
            DamageError: as for `read_sample`, or the image cannot be used.
        """
        file = io.BytesIO(read_bytes(storage, location))
        try:
            members = list(read_members(file, self.captions, whole=False))
            source: SourceImage = join_members(members, key, location.shard, self.captions)
            (image,) = self.preparation.prepare(source)
        except ImageError as error:
            raise DamageError(str(error)) from error
        return RawSample({PIXELS: torch.from_numpy(image.pixels)}, image.meta)
