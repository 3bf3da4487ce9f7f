"""What is measured of the images that a model draws: the way to them, and how near they come to real ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from fmscale.data.mixture import Address, MixedBucket, Mixture
from fmscale.encoders.clip_pair import ClipPair
from fmscale.encoders.inception import Inception
from fmscale.encoders.vae import LATENTS
from fmscale.errors import UserError
from fmscale.flow.noise import draw_noise
from fmscale.flow.path import begin
from fmscale.flow.trajectory import deviation, straightness, trajectory
from fmscale.log import progress
from fmscale.pictures import STOCHASTIC, Guidance
from fmscale.quality import frechet_distance, kernel_distance, precision_recall
from fmscale.sample import Generator
from fmscale.validation import spread

TRACED = 64  # images whose whole way is followed
TRACE_SOLVER = "midpoint"  # second order, and it never asks at t = 0
T_GRID = np.linspace(0.0125, 0.9875, 40)
SHOWN = 6  # images on the sheet
Judge = Inception | ClipPair


class Settings(NamedTuple):
    """How it is drawn.

    Attributes:
        steps: of the solver, rising; everything is measured for each.
        solver: what draws.
        guidance: how strong it is.
        seed: of the noise; with its key each image has its own.
        batch: images that are drawn at once; it changes nothing, but what `stochastic` draws: its noise is the batch's.
        trace_steps: of `TRACE_SOLVER`, from which the ways are known.
    """

    steps: tuple[int, ...]
    solver: str
    guidance: Guidance
    seed: int
    batch: int
    trace_steps: int


class Picture(NamedTuple):
    """A sample of the dataset; `key` says which."""

    bucket: MixedBucket
    address: Address
    key: str
    caption: str


class Group(NamedTuple):
    """Pictures of one size, with what is stored of them.

    Attributes:
        keys, captions: of each.
        latents: shape (B, C, H, W), float32, on the CPU.
    """

    keys: list[str]
    captions: list[str]
    latents: Tensor

    def noise(self, settings: Settings, device: torch.device) -> Tensor:
        """What each is drawn from: a function of seed and key."""
        shape = tuple(self.latents.shape[1:])
        return torch.stack([draw_noise(shape, "evaluate", settings.seed, key) for key in self.keys]).to(device)


def groups(mixture: Mixture, pictures: Sequence[Picture], batch: int) -> Iterator[Group]:
    """Pictures with their latents, no more than `batch` of one size at a time, in order."""
    for _, of_one in groupby(pictures, lambda picture: picture.bucket):
        rows = list(of_one)
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            latents = torch.stack([mixture.sample(row.address).tensors[LATENTS].float() for row in some])
            yield Group([row.key for row in some], [row.caption for row in some], latents)


def draw(generator: Generator, group: Group, steps: int, settings: Settings) -> Tensor:
    """Latents of a group's captions, from each image's own noise, on the generator's device.

    Raises:
        UserError: they are not finite.
    """
    noise, nothing = group.noise(settings, generator.device), [""] * len(group.captions)
    seed = crc32(f"{settings.seed}/{group.keys[0]}".encode())  # of what `stochastic` adds: no two groups have the same
    latents = generator.draw(noise, group.captions, nothing, settings.guidance, steps, settings.solver, seed)
    if not latents.isfinite().all():
        raise UserError(
            f"{steps} steps of {settings.solver} end in numbers that are not finite; guidance is too strong, or the "
            "weights are broken"
        )
    return latents


class Traces:
    """What is found along the ways of images, from noise to latents.

    Args:
        generator: whose field is followed, guided as images are drawn.
        settings: how they are drawn.
    """

    def __init__(self, generator: Generator, settings: Settings) -> None:
        self.generator, self.settings = generator, settings
        self.straight, self.deviations = list[Tensor](), list[np.ndarray]()
        self.squared, self.scale = dict.fromkeys(settings.steps, 0.0), 0.0
        self.evaluations = dict.fromkeys(settings.steps, 0)

    def follow(self, group: Group) -> list[Tensor]:
        """Take a group's ways into account.

        Returns:
            Where few steps lead, for each of `settings.steps`, and last where many do: on the CPU.
        """
        generator, settings = self.generator, self.settings
        field = generator.velocity(group.captions, [""] * len(group.captions), settings.guidance)
        height, width = group.latents.shape[2:]
        times = generator.times(height, width, settings.trace_steps, TRACE_SOLVER)
        start = begin(group.noise(settings, generator.device), generator.flow.path)
        points = trajectory(field, start, times, TRACE_SOLVER)
        self.straight.append(straightness(points).cpu())
        middles = (np.array(times[1:]) + np.array(times[:-1])) / 2  # falling, and interp wants them to rise
        for along in deviation(points, times).T.cpu().numpy():
            self.deviations.append(np.interp(T_GRID, middles[::-1], along[::-1]))
        ends = [self._leap(group, steps, points[-1]) for steps in settings.steps]
        self.scale += points[-1].double().square().sum().item()
        return [*ends, points[-1].cpu()]

    def _leap(self, group: Group, steps: int, end: Tensor) -> Tensor:
        seen: list[int] = []  # images of each pass, which with guidance are twice as many
        hook = self.generator.model.register_forward_hook(lambda model, given, found: seen.append(len(found)))
        try:
            latents = draw(self.generator, group, steps, self.settings)
        finally:
            hook.remove()
        self.evaluations[steps] = sum(seen) // len(group.captions)
        self.squared[steps] += (latents - end).double().square().sum().item()
        return latents.cpu()

    def record(self) -> dict[str, Any]:
        """Straightness, and how far the velocity is from the straight one by t."""
        straight, deviations = torch.cat(self.straight), np.stack(self.deviations)
        return {
            "solver": TRACE_SOLVER,
            "steps": self.settings.trace_steps,
            "images": len(straight),
            "straightness": {"mean": straight.mean().item(), "by_image": straight.tolist()},
            "deviation": {"t": T_GRID.tolist(), "mean": deviations.mean(axis=0).tolist()},
        }

    def by_steps(self) -> dict[int, dict[str, Any]]:
        """For each number of steps, the network's evaluations for an image, and the relative error of its latents."""
        found = {}
        for steps in self.settings.steps:
            error = (self.squared[steps] / self.scale) ** 0.5
            alike = self.settings.solver != STOCHASTIC  # which leads elsewhere, however many steps it takes
            found[steps] = {"evaluations": self.evaluations[steps], "relative_error": error if alike else None}
        return found


def trace(
    generator: Generator, mixture: Mixture, pictures: Sequence[Picture], settings: Settings
) -> tuple[Traces, tuple[list[np.ndarray], list[str]]]:
    """Follow some images, spread over the pictures.

    Returns:
        What was found, and for a sheet the images of a few, with a caption each: what is stored, what each number of
        steps draws, and where the ways end.
    """
    followed = [pictures[row] for row in spread(len(pictures), min(1, TRACED / len(pictures)))]
    shown = set(spread(len(followed), min(1, SHOWN / len(followed))))
    traces, images, captions, number = Traces(generator, settings), list[np.ndarray](), list[str](), 0
    labels = [*map(_steps, settings.steps), f"{_steps(settings.trace_steps)}, {TRACE_SOLVER}"]
    with progress() as bar:
        task = bar.add_task("trajectories", total=len(followed))
        for group in groups(mixture, followed, settings.batch):
            ends = traces.follow(group)
            for row in range(len(group.keys)):
                if number in shown:
                    rows = [group.latents[row], *(end[row] for end in ends)]
                    images.extend(generator.decode(latents[None])[0] for latents in rows)
                    captions.extend([f"real: {group.captions[row]}", *labels])
                number += 1
            bar.advance(task, len(group.keys))
    return traces, (images, captions)


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


def judge(
    generator: Generator,
    mixture: Mixture,
    pictures: Sequence[Picture],
    judges: Mapping[str, Judge],
    settings: Settings,
) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Compare drawn images with real ones, which are the stored latents, decoded: the VAE's loss is in both.

    Returns:
        What the judges say of the real images, and for each number of steps of those that are drawn: by judge.
    """
    if not judges:
        return {}, {}
    with progress() as bar:
        task = bar.add_task("images", total=len(pictures) * (1 + len(settings.steps)))

        def look(steps: int | None) -> tuple[dict[str, Tensor], dict[str, float]]:
            """Features of images by judge, and the score of the one that reads; None looks at the real ones."""
            features: dict[str, list[Tensor]] = {name: [] for name in judges}
            scores = []
            for group in groups(mixture, pictures, settings.batch):
                latents = group.latents if steps is None else draw(generator, group, steps, settings)
                pixels = torch.from_numpy(generator.decode(latents))
                for name, one in judges.items():
                    features[name].append(one.images(pixels))
                    if isinstance(one, ClipPair):
                        scores.append(one.scores(features[name][-1], group.captions))
                bar.advance(task, len(group.keys))
            together = {name: torch.cat(some) for name, some in features.items()}
            return together, {"clip_score": torch.cat(scores).mean().item()} if scores else {}

        real, real_score = look(None)
        found = {}
        for steps in settings.steps:
            drawn, score = look(steps)
            found[steps] = score | {name: compare(real[name], drawn[name], settings.seed) for name in judges}
    return real_score, found


def compare(real: Tensor, drawn: Tensor, seed: int) -> dict[str, float | None]:
    """Each distance between features (N, D) of real and of drawn images; `fid` is None with too few images."""
    kid, spread_of_kid = kernel_distance(real, drawn, seed)
    precision, recall = precision_recall(real, drawn)
    fid = frechet_distance(real, drawn)
    return {"fid": fid, "kid": kid, "kid_std": spread_of_kid, "precision": precision, "recall": recall}
