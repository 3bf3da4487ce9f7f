"""How many digits are drawn as asked, by number of Euler steps, by runs of the quickstart and students of them.

    python tools/digits_by_steps.py quickstart/run:4 rounds/round-1/run:1 [--steps 1 2 4 8 25] [--images 200]

Each RUN:SCALE is drawn with that guidance from the same noise; the classifier of the quickstart, fitted on the real
digits, reads them. Prints a Markdown table of conditional accuracy, with the straightness of each run's trajectories.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from fmscale import digits
from fmscale.flow.noise import draw_noise
from fmscale.flow.trajectory import straightness, trajectory
from fmscale.pictures import Guidance
from fmscale.sample import Generator, open_generator

TRACED, TRACE_STEPS = 50, 100


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN:SCALE", help="run directory and strength of guidance")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 25])
    parser.add_argument("--images", type=int, default=200)
    args = parser.parse_args()
    split = digits.load_split()
    classifier = digits.fit_classifier(split.train_images, split.train_labels)
    labels = np.arange(args.images) % 10
    print("| run | straightness | " + " | ".join(f"{steps} steps" for steps in args.steps) + " |")
    print("|---" * (2 + len(args.steps)) + "|")
    for text in args.runs:
        place, _, scale = text.rpartition(":")
        generator, guidance = open_generator(Path(place)), Guidance(float(scale))
        cells = [f"{straight(generator, labels[:TRACED], guidance):.4f}"]
        for steps in args.steps:
            images = np.concatenate(
                [
                    draw(generator, labels[start : start + 50], start, steps, guidance)
                    for start in range(0, args.images, 50)
                ]
            )
            cells.append(f"{np.mean(digits.read_digits(classifier, images) == labels):.3f}")
        print(f"| {place} | " + " | ".join(cells) + " |", flush=True)


def noise_of(generator: Generator, count: int, start: int) -> torch.Tensor:
    """Noise of so many images, each by its number."""
    shape = generator.latent_shape(64, 64)
    return torch.stack([draw_noise(shape, "digits", start + number) for number in range(count)]).to(generator.device)


def draw(generator: Generator, labels: np.ndarray, start: int, steps: int, guidance: Guidance) -> np.ndarray:
    """Images of digits, numbered from `start`: shape (len(labels), 64, 64, 3)."""
    captions, noise = [digits.caption(int(label)) for label in labels], noise_of(generator, len(labels), start)
    return generator.decode(generator.draw(noise, captions, [""] * len(labels), guidance, steps, "euler"))


def straight(generator: Generator, labels: np.ndarray, guidance: Guidance) -> float:
    """Mean straightness of the ways from noise to digits."""
    captions, noise = [digits.caption(int(label)) for label in labels], noise_of(generator, len(labels), 0)
    field = generator.velocity(captions, [""] * len(labels), guidance)
    times = generator.times(noise.shape[-2], noise.shape[-1], TRACE_STEPS, "midpoint")
    return straightness(trajectory(field, noise, times, "midpoint")).mean().item()


if __name__ == "__main__":
    main()
