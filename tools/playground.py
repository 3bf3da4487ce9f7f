"""Every row of the tables of `fmscale.flow`, trained in two dimensions within seconds, and drawn.

    python tools/playground.py [--target moons] [--rows velocity mean_flow shortcut] [--steps 500] [--out playground]

Of each row it prints the 2-Wasserstein distance to the target, in many steps and in one, how straight the way from
noise to data is, and the seconds of training. OUT/TARGET/overview.png shows all rows side by side, OUT/TARGET/ROW.png
each by itself: the target in grey, the ways of some samples in blue, where samples end in red. Two draws of the target
itself are as far apart as the first line says, so no row can come nearer.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from fmscale.flow.few_step import FEW_STEP
from fmscale.flow.noise import keyed_generator
from fmscale.flow.path import begin, input_scale, interpolate
from fmscale.flow.prediction import PREDICTIONS, as_velocity
from fmscale.flow.solver import SOLVERS, Velocity, time_grid
from fmscale.flow.timesteps import TIMESTEP_SAMPLERS
from fmscale.flow.trajectory import straightness, trajectory
from fmscale.flow.transport import exact, squared_distances, transport
from fmscale.flow.weights import WEIGHTS

BATCH, MICRO_BATCH = 512, 128
LEARNING_RATE = 2e-2
SAMPLES = 1000  # of which the distance is taken
SAMPLE_STEPS = 50
SIDE_PX, CELL_PX, COLUMNS = 640, 220, 6  # of a figure, and of each in the overview
SPAN = 3.2  # a figure shows [-SPAN, SPAN]²
WAYS = 120  # drawn in a figure
FINER = 3  # drawn so many times as large, then made smaller, for smooth edges
GREY, BLUE, RED = "#c8c8c8", "#8fb0dc", "#b3202c"


def moons(count: int, generator: torch.Generator) -> Tensor:
    """Two half circles that hold one another, of about unit variance."""
    angle = torch.rand(count, generator=generator) * math.pi
    lower = (torch.rand(count, generator=generator) < 0.5).float()
    x = torch.cos(angle) * (1 - 2 * lower) + lower - 0.5
    y = torch.sin(angle) * (1 - 2 * lower) + lower / 2 - 0.25
    return 1.5 * torch.stack([x, y], dim=1) + 0.08 * torch.randn(count, 2, generator=generator)


def checkerboard(count: int, generator: torch.Generator) -> Tensor:
    """The eight dark fields of a board of 4 x 4, on [-2, 2]²."""
    column = torch.randint(0, 4, (count,), generator=generator)
    row = 2 * torch.randint(0, 2, (count,), generator=generator) + column % 2
    return torch.stack([column, row], dim=1) + torch.rand(count, 2, generator=generator) - 2


def gaussians(count: int, generator: torch.Generator) -> Tensor:
    """Eight normal distributions on a circle of radius 2."""
    angle = torch.randint(0, 8, (count,), generator=generator) * (math.pi / 4)
    centre = 2 * torch.stack([torch.cos(angle), torch.sin(angle)], dim=1)
    return centre + 0.15 * torch.randn(count, 2, generator=generator)


TARGETS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "moons": moons,
    "checkerboard": checkerboard,
    "gaussians": gaussians,
}


@dataclass(frozen=True)
class Row:
    """What is trained: a row of each table, and what the objective of two times is, if it is one."""

    path: str = "rectified"
    sigma: float = 0.0
    prediction: str = "velocity"
    timesteps: str = "uniform"
    stratified: bool = False
    weights: str = "none"
    transport: str | None = None
    few_step: str | None = None


ROWS: dict[str, Row] = {
    "velocity": Row(),
    "cosine": Row(path="cosine"),
    # its error is divided by alpha, 0.0066 at t = 1: where ways begin the field is least known
    "variance_preserving": Row(path="variance_preserving", prediction="noise"),
    # a network of noise would have its error multiplied by beta, up to 50
    "variance_exploding": Row(path="variance_exploding", prediction="data"),
    "bandwidth": Row(sigma=0.05),
    # its error counts beta² in the loss and 1 / beta in the velocity: near the data the field is least known
    "data": Row(prediction="data"),
    # as variance_preserving, and min-SNR counts the noise's error less the nearer it is to the data
    "noise": Row(path="variance_preserving", prediction="noise", weights="min_snr"),
    "logit_normal": Row(timesteps="logit_normal"),
    "mode": Row(timesteps="mode"),
    "cosmap": Row(timesteps="cosmap"),
    "beta": Row(timesteps="beta"),
    "u_shaped": Row(timesteps="u_shaped"),
    "stratified": Row(stratified=True),
    "snr": Row(weights="snr"),  # (1 - t)² of the plain loss: where ways begin counts little
    "min_snr": Row(weights="min_snr"),
    "data_end": Row(weights="data_end"),  # 3 (1 - t)²: as snr
    "noise_end": Row(weights="noise_end"),  # 3 t²: where ways end counts little
    # the velocity's plain loss; its largest part would be near t = 0, where a network of data is not exact enough
    "sigma_sqrt": Row(prediction="data", timesteps="logit_normal", weights="sigma_sqrt"),
    "cosmap_weights": Row(weights="cosmap"),
    "exact": Row(transport="exact"),
    "sinkhorn": Row(transport="sinkhorn"),
    "mean_flow": Row(few_step="mean_flow"),  # half of what it learns from is its own derivative, which is learned too
    "shortcut": Row(few_step="shortcut"),
}


class Network(nn.Module):
    """A small MLP of waves: (z (B, 2), t (B,), leap (B,)) -> (B, 2)."""

    def __init__(self, path: str, width: int = 64) -> None:
        super().__init__()
        self.path = path
        self.layers = nn.Sequential(
            nn.Linear(20, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.last = nn.Linear(width, 2)

    def forward(self, z: Tensor, t: Tensor, leap: Tensor, rows: Tensor | None = None) -> Tensor:
        """What is predicted at z, t; `leap` as in `fmscale.flow.few_step`, always 0 to other objectives."""
        scaled = z * input_scale(t, self.path)[:, None]
        at = torch.stack([t, leap], dim=1)
        angles = torch.cat([math.pi * at, *(scaled * (math.pi / 4 * octave) for octave in (1, 2, 4))], dim=1)
        return self.last(self.layers(torch.cat([scaled, at, angles.sin(), angles.cos()], dim=1)))


class Trained:
    """A row's network after training, as a field and as a sampler."""

    def __init__(self, row: Row, network: Network, seconds: float) -> None:
        self.row, self.network, self.seconds = row, network, seconds

    @property
    def velocity(self) -> Velocity:
        """The instantaneous velocity field."""

        def predicted(z: Tensor, t: Tensor) -> Tensor:
            return self.network(z, t, torch.zeros_like(t))

        return as_velocity(predicted, self.row.prediction, self.row.path)

    @torch.no_grad()
    def sample(self, noise: Tensor, steps: int, solver: str = "midpoint") -> Tensor:
        """Samples in so many steps: leaps where the objective has them; one step is straight to the data foreseen."""
        if self.row.few_step is not None:
            return FEW_STEP[self.row.few_step].sample(self.network, noise, time_grid(steps))
        solve = SOLVERS["dpm" if steps == 1 else solver]
        return solve(self.velocity, begin(noise, self.row.path), time_grid(steps), path=self.row.path)

    @torch.no_grad()
    def way(self, noise: Tensor) -> Tensor:
        """Points from noise to data along the field, shape (SAMPLE_STEPS + 1, B, 2)."""
        return trajectory(self.velocity, begin(noise, self.row.path), time_grid(SAMPLE_STEPS), "midpoint")


def train(row: Row, target: str, steps: int, seed: int = 0) -> Trained:
    """Train a row's network on a target."""
    started = time.process_time()
    torch.manual_seed(seed)
    network = Network(row.path)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        loss = step_loss(row, network, target, keyed_generator("playground", seed, step)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return Trained(row, network, time.process_time() - started)


def step_loss(row: Row, network: Network, target: str, generator: torch.Generator) -> Tensor:
    """Loss per sample of one batch, as a training step would take it from the tables."""
    latents = TARGETS[target](BATCH, generator)
    noise = torch.randn(BATCH, 2, generator=generator)
    if row.transport is not None:
        noise = exchange(row.transport, latents, noise, generator)
    t = TIMESTEP_SAMPLERS[row.timesteps](BATCH, generator, stratified=row.stratified)
    if row.few_step is not None:
        objective = FEW_STEP[row.few_step]
        other = TIMESTEP_SAMPLERS[row.timesteps](BATCH, generator)
        t, leap = objective.draw(t, other, generator, share=0.5)
        plain = {"power": 0.0} if row.few_step == "mean_flow" else {}  # in 2-D one sample's error says little of t
        return objective.loss(network, latents, noise, t, leap, **plain)
    jitter = torch.randn(BATCH, 2, generator=generator) if row.sigma else None
    noisy, velocity = interpolate(latents, noise, t, row.path, row.sigma, jitter)
    wanted = PREDICTIONS[row.prediction](latents, noise, velocity)
    error = (network(noisy, t, torch.zeros_like(t)) - wanted).square().mean(dim=1)
    return WEIGHTS[row.weights](t, row.path, row.prediction) * error


def exchange(method: str, latents: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    """Noise that changed places within micro-batches."""
    parts = zip(latents.split(MICRO_BATCH), noise.split(MICRO_BATCH), strict=True)
    return torch.cat([part[transport(method, data, part, generator=generator)] for data, part in parts])


def distance(samples: Tensor, others: Tensor) -> float:
    """2-Wasserstein distance of two equally large sets of samples, by the best assignment."""
    cost = squared_distances(samples, others)
    return math.sqrt(cost[torch.arange(len(cost)), exact(cost)].mean().item())


@dataclass(frozen=True)
class Result:
    """W2 in SAMPLE_STEPS steps and in one; mean straightness; seconds of training."""

    w2: float
    w2_one_step: float
    straight: float
    seconds: float


def draws(target: str) -> tuple[Tensor, Tensor]:
    """The noise that every row is judged by, and the target's draw that it is judged against."""
    noise = torch.randn(SAMPLES, 2, generator=keyed_generator("playground", "noise"))
    return noise, TARGETS[target](SAMPLES, keyed_generator("playground", "data"))


def judge(trained: Trained, target: str) -> Result:
    """What a trained row's samples are like."""
    noise, data = draws(target)
    several, one = (distance(trained.sample(noise, steps), data) for steps in (SAMPLE_STEPS, 1))
    return Result(several, one, straightness(trained.way(noise)).mean().item(), trained.seconds)


def floor(target: str) -> float:
    """How far apart two draws of the target are."""
    return distance(draws(target)[1], TARGETS[target](SAMPLES, keyed_generator("playground", "again")))


def figure(lines: Sequence[str], data: Tensor, ways: Tensor, samples: Tensor, side: int) -> Image.Image:
    """Data, ways (n, B, 2) and samples, with lines of text above."""
    image = Image.new("RGB", (side * FINER, side * FINER), "white")
    pen, thin = ImageDraw.Draw(image), FINER * max(1, side // 400)

    def pixels(points: Tensor) -> list[tuple[float, float]]:
        return [(x, y) for x, y in ((points * torch.tensor([1.0, -1.0]) / SPAN + 1) * (side * FINER / 2)).tolist()]

    def dots(points: Tensor, colour: str) -> None:
        radius = 0.9 * thin
        for x, y in pixels(points):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    dots(data, GREY)
    for number in range(ways.shape[1]):
        pen.line(pixels(ways[:, number]), fill=BLUE, width=2 * thin // 3)
    dots(samples, RED)
    image = image.resize((side, side), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        pen.text((6, 4 + 14 * number), line, fill="black", font=ImageFont.load_default(12))
    return image


def draw(trained: Trained, target: str, lines: Sequence[str], side: int) -> Image.Image:
    """The figure of a trained row."""
    noise, data = draws(target)
    return figure(lines, data, trained.way(noise[:WAYS]), trained.sample(noise, SAMPLE_STEPS), side)


def overview(target: str, cells: Sequence[Image.Image]) -> Image.Image:
    """What the colours mean, then the cells, row by row."""
    data, nothing = draws(target)[1], torch.zeros(1, 0, 2)
    legend = ["grey: " + target, "blue: ways from noise", "red: samples"]
    cells = [figure(legend, data, nothing, nothing[0], CELL_PX), *cells]
    columns = min(COLUMNS, len(cells))
    sheet = Image.new("RGB", (columns * CELL_PX, math.ceil(len(cells) / columns) * CELL_PX), "white")
    for number, cell in enumerate(cells):
        sheet.paste(cell, (number % columns * CELL_PX, number // columns * CELL_PX))
    return sheet


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, judge and draw the rows that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, default="moons")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("playground"))
    args = parser.parse_args(arguments)
    folder = args.out / args.target
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print(f"{args.target}: two draws of {SAMPLES} samples are {floor(args.target):.3f} apart\n")
    print(f"| row | W2, {SAMPLE_STEPS} steps | W2, one step | straightness | s |\n|---|---|---|---|---|", flush=True)
    cells = []
    for name in args.rows:
        trained = train(ROWS[name], args.target, args.steps)
        found = judge(trained, args.target)
        print(
            f"| {name} | {found.w2:.3f} | {found.w2_one_step:.3f} | {found.straight:.3f} | {found.seconds:.0f} |",
            flush=True,
        )
        lines = [name, f"W2 {found.w2:.2f}, straight {found.straight:.2f}"]
        draw(trained, args.target, lines, SIDE_PX).save(folder / f"{name}.png")
        cells.append(draw(trained, args.target, lines, CELL_PX))
    overview(args.target, cells).save(folder / "overview.png")


if __name__ == "__main__":
    main()
