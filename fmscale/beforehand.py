"""What can be known on a login node, before a job waits for hours to be told of it: sizes and files, without torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

from fmscale.config import EncodeConfig, ReflowConfig, TrainConfig
from fmscale.data.order import split
from fmscale.data.transport import PIPE, connect, is_remote
from fmscale.encoders.weights import HUB_NAME
from fmscale.errors import UserError
from fmscale.log import get_logger
from fmscale.phases import phases_of
from fmscale.runs import check_run_dir, checkpoints_dir, snapshots_dir
from fmscale.site import Site, worlds
from fmscale.size import checkpoint_bytes, saves_kept, snapshot_bytes
from fmscale.slurm import leave_s

log = get_logger(__name__)


def check_train(config: TrainConfig, site: Site, flags: Collection[str] = ()) -> None:
    """Refuse a training that could not run, or not save in time.

    Args:
        config, site: what and where.
        flags: what the command line permits, such as `--allow-pipe`.

    Raises:
        UserError: says which key of which file is wrong, and what would do.
    """
    check_time(site)
    check_name("run_dir", config.run_dir)
    check_run_dir(config, "--allow-config-change" in flags)
    for phase in phases_of(config):
        for world_size in worlds(site):
            split(phase.config.global_batch, world_size, phase.config.micro_batch)
    for place, timeout_s in _places(config).items():
        _look_at_place(place, timeout_s, flags)
    if not _count(checkpoints_dir(config.run_dir)):
        _look_at_weights(config.model.init_from)
    size = checkpoint_bytes(config)
    _check_disk(config, size)
    check_save(site, size)


def check_save(site: Site, size: int) -> None:
    """Refuse a site whose time between signal and limit is shorter than a save of so many bytes."""
    save_s, left_s = size / 1e9 / site.write_gb_per_s, leave_s(site.signal_delay_s)
    if save_s > left_s:
        raise UserError(
            f"site.signal_delay_s: {site.signal_delay_s} leaves {left_s:.0f} s for the last step and a save; a "
            f"checkpoint of {size / 1e9:.1f} GB takes {save_s:.0f} s at site.write_gb_per_s={site.write_gb_per_s:g}"
        )


def check_encode(config: EncodeConfig, site: Site) -> None:
    """Refuse to encode what is not there.

    Raises:
        UserError: says which key is wrong.
    """
    check_time(site)
    check_name("out", config.out)
    if not is_remote(config.images) and "{" not in config.images and not Path(config.images).exists():
        raise UserError(f"images: {config.images} does not exist")


def check_reflow(config: ReflowConfig, site: Site, flags: Collection[str]) -> None:
    """Refuse to generate from what is not there.

    Raises:
        UserError: says which key is wrong.
    """
    check_time(site)
    check_name("out", config.out)
    if config.rounds is not None:
        raise UserError(
            "rounds: train too, on one machine; start `fmscale reflow CONFIG --nproc N` there, or leave it out"
        )
    if not _count(checkpoints_dir(config.teacher)):
        raise UserError(f"teacher: {config.teacher} is no run directory that has saved a checkpoint")
    if config.prompts is not None and not config.prompts.is_file():
        raise UserError(f"prompts: {config.prompts} does not exist")
    if config.data is not None:
        for place in [config.data.path] if config.data.path else [part.path for part in config.data.mixture]:
            _look_at_place(place, config.data.remote.timeout_s, flags)


def check_name(key: str, folder: Path) -> None:
    """Refuse the name of a folder that a batch script cannot hold: Slurm replaces `%` and backslashes in it."""
    text = str(folder.absolute())
    if not text.isprintable() or "%" in text or "\\" in text:
        raise UserError(f"{key}: {text!r} holds a %, a backslash or a line break, which Slurm does not take; rename it")


def check_time(site: Site) -> None:
    """Refuse a time limit in which nothing would be done but coming and going."""
    if site.time_min * 60 < 2 * site.signal_delay_s:
        raise UserError(
            f"site.time_min: of {site.time_min} min the last {site.signal_delay_s} s (site.signal_delay_s) are for "
            "saving; give at least twice that"
        )


def _places(config: TrainConfig) -> dict[str, float]:
    """The datasets of all phases, held out or not, and how many seconds a request to each may take."""
    parts = [phase.config for phase in phases_of(config)]
    learned = {
        place: part.data.remote.timeout_s
        for part in parts
        for place in ([part.data.path] if part.data.path else [one.path for one in part.data.mixture])
    }
    return learned | {part.validation.path: part.data.remote.timeout_s for part in parts if part.validation}


def _look_at_place(place: str, timeout_s: float, flags: Collection[str]) -> None:
    if is_remote(place):
        _look_at_url(place, timeout_s, "--allow-pipe" in flags)
    else:
        _look_at_dataset(Path(place))


def _look_at_dataset(path: Path) -> None:
    """Whether a dataset's index and shards are there; the job looks closer."""
    if not path.is_dir():
        raise UserError(f"data: {path}: no such folder; give the folder that holds the dataset's tars")
    try:
        shards = json.loads((path / "index" / "manifest.json").read_text())["shards"]
        sizes = {shard["name"]: shard["size"] for shard in shards}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"data: {path} has no index that can be read ({error}): run `fmscale index {path}`") from None
    for name, size in sizes.items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise UserError(f"data: {path / name} is gone or is not what was indexed: run `fmscale index {path}`")


def _look_at_url(place: str, timeout_s: float, allow_pipe: bool) -> None:
    """Whether there is an index; a place that cannot be reached from a login node may be from the others."""
    transport = connect(place, timeout_s, allow_pipe)
    manifest = "index/manifest.json"
    if place.startswith(PIPE):  # such a program is started by the job alone
        return
    try:
        json.loads(transport.read(manifest, 0, None))["shards"]
    except (FileNotFoundError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"data: {transport.where(manifest)} is no index ({error}): run `fmscale index` where the tars lie"
        ) from None
    except Exception as error:  # whatever libraries for stores raise
        log.warning("data: %s cannot be looked at from here (%s); the job will", place, error)


def _look_at_weights(place: Path | None) -> None:
    """Whether what a new run starts from is there, or may be on the hub."""
    if place is not None and not place.exists() and HUB_NAME.fullmatch(str(place)) is None:
        raise UserError(f"model.init_from: {place}: neither a folder nor a file, nor a name on the hub")


def _check_disk(config: TrainConfig, size: int) -> None:
    """Whether there is room for the checkpoints that will be kept, the one that is being written, and the snapshots."""
    run_dir, (most, most_snapshots) = config.run_dir.absolute(), saves_kept(config)
    count = max(most - _count(checkpoints_dir(run_dir)), 1)
    snapshots = max(most_snapshots - _count(snapshots_dir(run_dir)), 0)
    needed = count * size + snapshots * snapshot_bytes(config)
    nearest = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        more = f" and {snapshots} snapshots" if snapshots else ""
        raise UserError(
            f"run_dir: {count} checkpoints of {size / 1e9:.1f} GB{more} need {needed / 1e9:.1f} GB on {nearest}, where "
            f"{free / 1e9:.1f} GB are free; make room, or keep fewer (checkpoint.keep, checkpoint.keep_every_steps)"
        )


def _count(folder: Path) -> int:
    return len(list(folder.glob("step-*")))
