"""A run directory: what is in it, whether a config may go on with it, and how its weights are read back.

RUN/starts.jsonl      who trains here: one object when a start of the run begins, one when it ends
    config.yaml       the merged config, written first
    environment.json  versions, git hash, host and devices of the last start
    dataset.json      digest of every shard, of each generation of the data
    imported.json     where its weights come from, and how they compare: `fmscale import` made it, not training
    attention.json    the kernel of each attention, for the device and the torch that it was tried with
    metrics.jsonl     one object per optimizer step
    tensorboard/      the same, as curves
    checkpoints/      step-00001000/ and so on
    ema/              likewise, with averages alone, from which others are made
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fmscale import __version__, slurm
from fmscale.config import FluxConfig, TrainConfig, check, dump, flatten, load
from fmscale.errors import UserError
from fmscale.files import replace_text
from fmscale.phases import phases_of
from fmscale.starts import STARTS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fmscale.engine.checkpoint import Checkpoint

# Keys that leave the mathematics of a run alone: they may change between one start and the next.
FREE_KEYS = {
    "run_dir",
    "micro_batch",
    "data.path",
    "data.vae",
    "data.workers",
    "data.max_bad_fraction",
    "ema.snapshot_every_steps",
    "engine.zero_stage",
    "engine.offload",
    "engine.recompute_every",
    "engine.recompute",
    "engine.compile",
    "engine.attention",
}
DATASET = "dataset.json"
ATTENTION = "attention.json"
IMPORTED = "imported.json"
BEFORE_CONFIG = {STARTS, slurm.FOLDER}  # may be there before the config is
Result = TypeVar("Result")
Weights = str | float  # of a run: `ema`, `raw`, or the relative width of an average that is made from snapshots
FREE_PARTS = ("checkpoint.", "guard.", "log.", "validation", "data.remote.", "data.text_encoders.")
_PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "webdataset", "safetensors", "numpy")


def checkpoints_dir(run_dir: Path) -> Path:
    """Where a run's checkpoints are."""
    return run_dir / "checkpoints"


def snapshots_dir(run_dir: Path) -> Path:
    """Where the averages are kept from which others are made."""
    return run_dir / "ema"


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """The changes from one config to another that would make it another run, one text each."""
    before, after = flatten(old), flatten(new)
    keys = dict.fromkeys([*after, *before])
    changed = [key for key in keys if before.get(key) != after.get(key) and not _may_change(key, old, new)]
    return [f"{key}: {before.get(key)} in the run, {after.get(key)} given" for key in changed]


def _may_change(key: str, old: TrainConfig, new: TrainConfig) -> bool:
    if key == "steps":
        # A cosine that ends at `steps` bends with it.
        last = phases_of(new)[-1].config.optimizer
        return new.steps > old.steps and (last.schedule == "constant" or last.decay_steps is not None)
    if key == "data.mixture":  # the datasets may have moved: their fingerprint is compared
        return [part.weight for part in old.data.mixture] == [part.weight for part in new.data.mixture]
    return key in FREE_KEYS or key.startswith(FREE_PARTS)


def check_run_dir(config: TrainConfig, allow_changes: bool) -> None:
    """Refuse a run directory that belongs to another run, or that cannot be written to; nothing is written.

    Args:
        config: what is about to be trained.
        allow_changes: go on although the config differs.

    Raises:
        UserError: says each difference.
    """
    run_dir = config.run_dir.absolute()
    nearest = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"run_dir: cannot write to {nearest}; give another run_dir")
    if (run_dir / IMPORTED).is_file():
        raise UserError(
            f"run_dir: {config.run_dir} holds imported weights; give another run_dir, and "
            f"model.init_from={config.run_dir} to start from them"
        )
    written = run_dir / "config.yaml"
    if not written.is_file():
        if run_dir.is_dir() and {entry.name for entry in run_dir.iterdir()} - BEFORE_CONFIG:
            raise UserError(f"run_dir: {config.run_dir} is not empty and holds no run; give another run_dir")
        return
    if not any(checkpoints_dir(run_dir).glob("step-*")):
        return  # nothing was trained yet that another config could spoil
    changes = differences(load(TrainConfig, written), config)
    if changes and not allow_changes:
        raise UserError(
            f"run_dir: {config.run_dir} holds a run with another config ({'; '.join(changes)}); "
            "give another run_dir, or --allow-config-change to go on with it all the same"
        )


def start_run_dir(
    config: TrainConfig, devices: list[str], dataset: Mapping[str, Any], attention: Mapping[str, Any] | None = None
) -> None:
    """Make the run directory and write what is going to run, where, on what data, and the kernels that were tried."""
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        replace_text(config.run_dir / "config.yaml", dump(config))
        replace_text(config.run_dir / "environment.json", json.dumps(environment(devices), indent=1) + "\n")
        replace_text(config.run_dir / DATASET, json.dumps(dataset) + "\n")
        if attention is not None:
            replace_text(config.run_dir / ATTENTION, json.dumps(attention, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"run_dir: cannot write to {config.run_dir}: {error.strerror}") from None


def environment(devices: list[str]) -> dict[str, Any]:
    """Versions, git hash, host and devices: what one wants to know of a run a year later."""
    return {
        "fmscale": __version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "git": git_hash(),
        "host": platform.node(),
        "platform": platform.platform(),
        "devices": devices,
    }


def git_hash() -> str | None:
    """Commit of the checkout that this code is in, with `-dirty` for local changes; None outside a checkout."""
    submitted = Path(__file__).parents[1] / "commit"  # beside a copy that `fmscale submit` made
    if submitted.is_file():
        return submitted.read_text() or None
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return result.stdout.strip() or None


@dataclass(frozen=True)
class Run:
    """A run that has saved at least one checkpoint.

    Attributes:
        path: its directory.
        config: as it was trained.
        checkpoint: the one that was asked for.
    """

    path: Path
    config: TrainConfig
    checkpoint: Checkpoint

    @property
    def description(self) -> Mapping[str, Any]:
        """What training wrote into the checkpoint beside the weights: the dataset and what made it, images seen."""
        return self.checkpoint.index["description"]

    @property
    def made_by(self) -> Mapping[str, Any]:
        """What made the dataset: VAE, text encoders, their paths.

        Raises:
            UserError: the dataset was indexed by hand, so nobody wrote it down.
        """
        made_by = self.description["dataset"]["made_by"]
        if not made_by:
            raise UserError(f"{self.path}: its dataset does not say which VAE and text encoders made it")
        return made_by

    @property
    def is_imported(self) -> bool:
        """Its weights are published ones, and what its config says of training is not so."""
        return "imported" in self.description

    @property
    def takes_guidance(self) -> bool:
        """The network is told how strong guidance is."""
        return isinstance(self.config.model, FluxConfig) and self.config.model.guidance_embed

    def weight_kind(self, weights: Weights) -> str:
        """Name of weights, as checkpoints have it; `ema` is the first of several averages, and of imported weights all.

        Raises:
            UserError: it has no such weights.
        """
        from fmscale.engine.optim import ema_names, sigma_name
        from fmscale.engine.zero import WEIGHT

        if self.is_imported:
            if isinstance(weights, float):
                raise UserError(f"{self.path}: was imported with one set of weights, of which no average can be made")
            return WEIGHT
        if isinstance(weights, float):
            return sigma_name(weights)
        if weights == "raw":
            return WEIGHT
        names = ema_names(self.config.ema.decays, self.config.ema.sigma_rels)
        if not names:
            raise UserError(
                f"{self.path}: was trained without EMA, and its raw weights must be asked for (--weights raw), where a "
                "command takes those"
            )
        return names[0]

    def state(self, weights: Weights) -> dict[str, Tensor]:
        """Weights by parameter name, float32.

        Raises:
            UserError: the checkpoint is damaged, has no such weights, or there is nothing to make them from.
        """
        from fmscale.engine.checkpoint import Fragments

        if (average := self._made(weights)) is not None:
            return {name: average(name) for name in self.checkpoint.index["parameters"]}
        return dict(Fragments(self.checkpoint).full(self.weight_kind(weights)))

    def parts(self, weights: Weights) -> Callable[[str], Iterable[tuple[int, Tensor]]]:
        """Reads a parameter a little at a time.

        Returns:
            A function of a parameter's name that gives stretches of the flattened parameter, float32, and where each
            begins, in any order; it may be called by several threads. Both raise UserError as `state` does.
        """
        from fmscale.engine.checkpoint import Fragments

        if (average := self._made(weights)) is not None:
            return lambda name: [(0, average(name).flatten())]
        return functools.partial(Fragments(self.checkpoint).chunks, self.weight_kind(weights))

    def _made(self, weights: Weights) -> Callable[[str], Tensor] | None:
        """Makes parameters of an average that training did not track; None for other weights."""
        from fmscale.engine.snapshots import make_average

        if not isinstance(weights, float) or self.sources(weights) == [self.weight_kind(weights)]:
            return None
        return make_average(snapshots_dir(self.path), self.checkpoint, self.config.ema.sigma_rels, weights)

    def sources(self, weights: Weights) -> list[str]:
        """Names of the weights that have to be read for these."""
        from fmscale.engine.optim import sigma_name

        kind = self.weight_kind(weights)
        if isinstance(weights, float) and kind not in self.checkpoint.index["kinds"]:
            return [sigma_name(width) for width in self.config.ema.sigma_rels]
        return [kind]

    def model(self, weights: Weights) -> nn.Module:
        """The network with its weights, on the CPU in float32, in evaluation mode."""
        import torch

        with torch.device("meta"):
            model = build_model(self.config)
        model.load_state_dict(self.state(weights), assign=True)
        return model.requires_grad_(False).eval()


def build_model(config: TrainConfig) -> nn.Module:
    """The network that a config describes, freshly initialised."""
    from fmscale.models.families import build

    return build(config.model.family, config.model.model_dump())


def open_run(path: Path, step: int | None = None, weights: Weights | None = "ema") -> Run:
    """Open a run directory for reading.

    Args:
        path: the directory that `fmscale train` was given as run_dir.
        step: of the checkpoint; None for the newest whose weights are sound: damaged ones are named and passed over.
        weights: that will be read, and are looked at; for those made from snapshots, a snapshot of the step will do.
            None for none, so that they need not be sound.

    Raises:
        UserError: not a run directory, no such checkpoint, or damaged weights.
    """
    from fmscale.engine.checkpoint import verify

    def sound(run: Run) -> Run:
        if weights is not None:
            verify(run.checkpoint, run.sources(weights))
        return run

    return use_run(path, step, weights, sound)


def use_run(path: Path, step: int | None, weights: Weights | None, use: Callable[[Run], Result]) -> Result:
    """Do something with the weights of a run directory that reads them all, so that they need no look beforehand.

    Args:
        path, step, weights: as for `open_run`.
        use: is called again with an older checkpoint where it finds the newest to be damaged.

    Returns:
        What `use` returns.

    Raises:
        UserError: as for `open_run`.
    """
    from fmscale.engine.checkpoint import at_step, find_all, step_of

    def opened(checkpoint: Checkpoint) -> Result:
        config = check(TrainConfig, checkpoint.index["description"]["config"], str(checkpoint.path / "index.json"))
        return use(Run(path, config, checkpoint))

    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: not a run directory (no config.yaml in it)")
    root, snapshots = checkpoints_dir(path), snapshots_dir(path)
    if isinstance(weights, float) and step is not None and step in map(step_of, find_all(snapshots)):
        root = snapshots
    return at_step(root, step, opened)


def list_checkpoints(path: Path, deep: bool) -> int:
    """Print a run's checkpoints, oldest first.

    Args:
        path: run directory.
        deep: also compare every file with its checksum.

    Returns:
        Exit code: 0, or 2 where one is damaged or cannot be read.

    Raises:
        UserError: it holds none.
    """
    from fmscale.engine.checkpoint import find_all

    folders = find_all(checkpoints_dir(path))
    if not folders:
        raise UserError(f"{path}: holds no checkpoint; give a run directory that has saved one")
    print(f"{'step':>10}  {'saved':16}  {'size':>10}  {'ranks':>5}  state")
    all_sound = True
    for folder in folders:
        sound, line = _describe(folder, deep)
        print(line, flush=True)
        all_sound = all_sound and sound
    return 0 if all_sound else 2


def _describe(folder: Path, deep: bool) -> tuple[bool, str]:
    """Whether a checkpoint is sound, and a line that tells of it."""
    from fmscale.engine.checkpoint import open_checkpoint, verify

    step = f"{int(folder.name.split('-')[1]):>10,}"
    try:
        found = open_checkpoint(folder)
        saved = datetime.fromtimestamp((folder / "index.json").stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        if deep:
            verify(found)
    except UserError as error:
        return False, f"{step}  damaged: {error}"
    except OSError as error:
        return False, f"{step}  cannot be read: {error}"
    size = sum(partition["bytes"] for partition in found.index["partitions"])
    ranks = found.index["world_size"]
    return True, f"{step}  {saved}  {size / 1e9:>7.3f} GB  {ranks:>5}  {'sound' if deep else 'whole'}"
