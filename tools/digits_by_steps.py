"""How many digits are drawn as asked, by number of Euler steps, by runs of the quickstart and students of them.

    python tools/digits_by_steps.py quickstart/run:4 rounds/round-1/run:1 [--steps 1 2 4 8 25] [--images 100]

Each RUN:SCALE is drawn with that guidance from the same noise, digits alone and in pairs; the classifier of the
quickstart, fitted on the real digits, reads them. Prints a Markdown table: how straight the ways are and, by number of
steps, the share of digits that is read as asked and, behind it, how far latents are from where the ways end, relative.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmscale import digits
from fmscale.flow.noise import draw_noise
from fmscale.flow.trajectory import straightness, trajectory
from fmscale.pictures import Guidance
from fmscale.sample import Generator, open_generator

TRACED, TRACE_STEPS, SIDE_PX, BATCH = 20, 50, 64, 50


class Layout(NamedTuple):
    """Digits on a picture.

    Attributes:
        rows, columns: of digits.
        caption: of a picture, given the digits.
    """

    rows: int
    columns: int
    caption: Callable[..., str]


LAYOUTS = {
    "alone": Layout(1, 1, digits.caption),
    "side by side": Layout(1, 2, digits.side_by_side_caption),
    "stacked": Layout(2, 1, digits.stacked_caption),
}


class Asked(NamedTuple):
    """Pictures that are asked for.

    Attributes:
        layout: of each.
        labels: digits, shape (N, 1 or 2).
        noise: shape (N, C, H, W).
    """

    layout: Layout
    labels: np.ndarray
    noise: Tensor

    @property
    def captions(self) -> list[str]:
        """What each shows."""
        return [self.layout.caption(*map(int, row)) for row in self.labels]

    def first(self, count: int) -> Asked:
        """Some of them."""
        return self._replace(labels=self.labels[:count], noise=self.noise[:count])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN:SCALE", help="run directory and strength of guidance")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 25])
    parser.add_argument("--images", type=int, default=100, help="of each layout (%(default)s)")
    args = parser.parse_args()
    split = digits.load_split()
    classifier = digits.fit_classifier(split.train_images, split.train_labels)
    print("| run | digits | straightness | " + " | ".join(f"{steps} steps" for steps in args.steps) + " |")
    print("|---" * (3 + len(args.steps)) + "|")
    for text in args.runs:
        place, _, scale = text.rpartition(":")
        generator, guidance = open_generator(Path(place)), Guidance(float(scale))
        for name, layout in LAYOUTS.items():
            asked = ask(generator, layout, args.images)
            straight, ends = trace(generator, asked.first(TRACED), guidance)
            cells = []
            for steps in args.steps:
                latents = draw(generator, asked, guidance, steps)
                right = read(classifier, generator, latents, layout) == asked.labels
                error = float((latents[:TRACED] - ends).norm() / ends.norm())
                cells.append(f"{np.mean(right):.3f} ({error:.2f})")
            print(f"| {place} | {name} | {straight:.4f} | " + " | ".join(cells) + " |", flush=True)


def ask(generator: Generator, layout: Layout, count: int) -> Asked:
    """So many pictures of a layout; each digit stands in each place equally often."""
    numbers = np.arange(count)
    labels = np.stack([numbers % 10, (numbers // 10 + 3 * numbers) % 10], axis=1)[:, : layout.rows * layout.columns]
    shape = generator.latent_shape(SIDE_PX * layout.rows, SIDE_PX * layout.columns)
    noise = torch.stack([draw_noise(shape, "digits", int(number)) for number in numbers])
    return Asked(layout, labels, noise.to(generator.device))


def draw(generator: Generator, asked: Asked, guidance: Guidance, steps: int) -> Tensor:
    """Latents of the pictures, by Euler steps."""
    parts = zip(asked.noise.split(BATCH), range(0, len(asked.noise), BATCH), strict=True)
    captions = asked.captions
    return torch.cat(
        [
            generator.draw(noise, captions[at : at + BATCH], [""] * len(noise), guidance, steps, "euler")
            for noise, at in parts
        ]
    )


def read(classifier: object, generator: Generator, latents: Tensor, layout: Layout) -> np.ndarray:
    """The digits on pictures, as the classifier reads them, shape (N, 1 or 2)."""
    images = np.concatenate([generator.decode(part) for part in latents.split(BATCH)])
    places = [part for row in np.split(images, layout.rows, axis=1) for part in np.split(row, layout.columns, axis=2)]
    return np.stack([digits.read_digits(classifier, part) for part in places], axis=1)


def trace(generator: Generator, asked: Asked, guidance: Guidance) -> tuple[float, Tensor]:
    """Mean straightness of the ways from noise to pictures, and where they end."""
    field = generator.velocity(asked.captions, [""] * len(asked.labels), guidance)
    times = generator.times(asked.noise.shape[-2], asked.noise.shape[-1], TRACE_STEPS, "midpoint")
    points = trajectory(field, asked.noise, times, "midpoint")
    return straightness(points).mean().item(), points[-1]


if __name__ == "__main__":
    main()
