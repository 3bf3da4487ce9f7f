"""The plots of an evaluation and of a plan, from their records alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_INCHES = (4.2, 3.4)
DPI = 130
NAMES = {"inception": "Inception", "clip": "CLIP"}


class Panel(NamedTuple):
    """A plot against the number of steps.

    Attributes:
        title, unit: over it, and at its axis of values.
        lines: values by legend, one for each number of steps.
        log: whether values go by powers of ten.
        real: what real images have; None where there is no such thing.
        spread: standard deviation of the first line.
        span: of values that are shown; None for theirs.
    """

    title: str
    unit: str
    lines: dict[str, list[float]]
    log: bool = False
    real: float | None = None
    spread: list[float] | None = None
    span: tuple[float, float | None] | None = None


def write_plots(record: Mapping[str, Any], folder: Path) -> None:
    """Write `steps.png`, `straightness.png` and, where there is a loss, `loss.png`.

    Args:
        record: of an evaluation, as its JSON file has it.
        folder: exists.
    """
    _draw(folder / "steps.png", _about(record), [(_over_steps, panel) for panel in panels(record)], record)
    _draw(folder / "straightness.png", _about(record), [(_histogram, None), (_deviation, None)], record)
    if record["validation"] is not None:
        _draw(folder / "loss.png", _about(record), [(_loss_by_t, None), (_loss_by_bucket, None)], record)


def panels(record: Mapping[str, Any]) -> list[Panel]:
    """What is known by number of steps; a line is left out where one of its values is not known."""
    rows = record["by_steps"]

    def values(*keys: str) -> list[float]:
        found = rows
        for key in keys:
            found = [row[key] for row in found]
        return [] if None in found else found

    traced = record["trajectories"]
    error = Panel(
        f"distance to {traced['steps']} {traced['solver']} steps",
        "RMS error over RMS of latents",
        {"": values("relative_error")},
        log=True,
    )
    found = [error]
    for name in record["judges"]:
        label = NAMES[name]
        found += [
            Panel(f"FID, {label} features", "squared Fréchet distance", {"": values(name, "fid")}, span=(0, None)),
            Panel(
                f"KID, {label} features",
                "squared MMD ± deviation of subsets",
                {"": values(name, "kid")},
                spread=values(name, "kid_std"),
            ),
            Panel(
                f"precision and recall, {label} features",
                "share of images",
                {"precision": values(name, "precision"), "recall": values(name, "recall")},
                span=(0, 1.05),
            ),
        ]
    if "clip" in record["judges"]:
        score, real = values("clip_score"), record["real"]["clip_score"]
        found.append(Panel("CLIP score", "100 x cosine of image and caption", {"drawn": score}, real=real))
    return [panel for panel in found if all(panel.lines.values())]


def _about(record: Mapping[str, Any]) -> str:
    """One line: what was measured, and how."""
    source, drawing = record["source"], record["drawing"]
    return (
        f"{'/'.join(Path(source['path']).absolute().parts[-2:])}, step {source['step']}, {source['weights']}; "
        f"{record['dataset']['images']} images, {drawing['solver']}, guidance {drawing['guidance_scale']:g}, "
        f"seed {drawing['seed']}"
    )


def _draw(path: Path, about: str, parts: list[tuple[Any, Any]], record: Mapping[str, Any]) -> None:
    """Panels in rows of three; each part is a function (axes, record, what it draws) and what it draws."""
    from matplotlib.figure import Figure

    columns = min(3, len(parts))
    rows = -(-len(parts) // columns)
    size = (max(columns, 2) * PANEL_INCHES[0], rows * PANEL_INCHES[1] + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(about, fontsize=9)
    for place, (draw, what) in enumerate(parts):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        draw(axes, record, what)
    figure.savefig(path, dpi=DPI)


def _over_steps(axes: Axes, record: Mapping[str, Any], panel: Panel) -> None:
    steps = record["drawing"]["steps"]
    for (label, values), marker in zip(panel.lines.items(), "os", strict=False):
        axes.errorbar(steps, values, yerr=panel.spread, marker=marker, capsize=3, label=label)
    if panel.real is not None:
        axes.axhline(panel.real, color="black", linestyle="--", label="real images")
    axes.set_xscale("log")
    axes.set_xticks(steps, [f"{count}" for count in steps])
    axes.set_xticks([], minor=True)
    if panel.log and min(min(values) for values in panel.lines.values()) > 0:
        axes.set_yscale("log")
    if panel.span is not None:
        axes.set_ylim(*panel.span)
    axes.set(title=panel.title, xlabel=f"solver steps ({record['drawing']['solver']})", ylabel=panel.unit)
    if any(panel.lines) or panel.real is not None:
        axes.legend(fontsize=8)


def _histogram(axes: Axes, record: Mapping[str, Any], what: None) -> None:
    straight = record["trajectories"]["straightness"]
    axes.hist(straight["by_image"], bins=20)
    axes.axvline(straight["mean"], color="black", linestyle="--", label=f"mean {straight['mean']:.4f}")
    title = f"straightness of {record['trajectories']['images']} trajectories"
    axes.set(title=title, xlabel="distance over length (1 is straight)", ylabel="images")
    axes.legend(fontsize=8)


def _deviation(axes: Axes, record: Mapping[str, Any], what: None) -> None:
    found = record["trajectories"]["deviation"]
    axes.plot(found["t"], found["mean"])
    axes.set(
        title="where trajectories bend",
        xlabel="t (0 is data, 1 is noise)",
        ylabel="|velocity - straight| / |straight|",
        xlim=(0, 1),
        ylim=(0, None),
    )


def _loss_by_t(axes: Axes, record: Mapping[str, Any], what: None) -> None:
    losses = record["validation"]["loss_by_t"]
    middles = [(number + 0.5) / len(losses) for number in range(len(losses))]
    heights = [loss or 0 for loss in losses]  # none where no image is
    axes.bar(middles, heights, width=0.9 / len(losses))
    axes.axhline(record["validation"]["loss"], color="black", linestyle="--", label="mean of all images")
    axes.set(title="loss by t", xlabel="t (0 is data, 1 is noise)", ylabel="mean squared error", xlim=(0, 1))
    axes.legend(fontsize=8)


def _loss_by_bucket(axes: Axes, record: Mapping[str, Any], what: None) -> None:
    losses = {name: loss for name, loss in record["validation"]["loss_by_bucket"].items() if loss is not None}
    axes.barh(list(losses), list(losses.values()))
    axes.set(title="loss by bucket", xlabel="mean squared error", ylabel="latent height x width")


def write_plan_plot(record: Mapping[str, Any], path: Path) -> None:
    """Draw a plan: memory of a rank by bucket, and how its last phase goes on other numbers of GPUs.

    Args:
        record: of a plan, as its JSON has it.
        path: of the PNG.
    """
    parts: list[tuple[Any, Any]] = [(_memory_bars, phase) for phase in record["phases"]]
    parts += [(_scaling_curves, kind) for kind in ("weak", "strong") if record["scaling"]]
    about = f"{sum(record['parameters'].values()):,} parameters on {record['world_size']} x {record['device']}"
    _draw(path, about, parts, record)


def _memory_bars(axes: Axes, record: Mapping[str, Any], phase: Mapping[str, Any]) -> None:
    names, done = [bucket["name"] for bucket in phase["buckets"]], [0.0] * len(phase["buckets"])
    for part in ("states", "gradients", "buckets", "gathered", "activations", "at work"):
        sizes = [bucket["memory"].get(part, 0) / 2**30 for bucket in phase["buckets"]]
        axes.barh(names, sizes, left=done, label=part)
        done = [before + size for before, size in zip(done, sizes, strict=True)]
    if record["usable_bytes"] is not None:
        axes.axvline(record["usable_bytes"] / 2**30, color="black", linestyle="--", label=f"{record['device']} gives")
    title = f"memory of a rank, steps {phase['start']:,} to {phase['until']:,}"
    axes.set(title=title, xlabel="GiB", ylabel="latent height x width")
    axes.legend(fontsize=7)


def _scaling_curves(axes: Axes, record: Mapping[str, Any], kind: str) -> None:
    rows = [row for row in record["scaling"] if row[kind] is not None]
    worlds = [row["world_size"] for row in rows]
    axes.plot(worlds, [100 * row[f"{kind}_efficiency"] for row in rows], marker="o", label="planned")
    axes.axvline(record["world_size"], color="black", linestyle="--", label="this plan")
    title = {"weak": "weak scaling: batch grows with GPUs", "strong": "strong scaling: one global batch"}[kind]
    axes.set_xscale("log", base=2)
    axes.set(title=title, xlabel="GPUs", ylabel="% of the computing alone", ylim=(0, 105))
    axes.legend(fontsize=8)
