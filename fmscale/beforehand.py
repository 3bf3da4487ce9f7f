"""What can be known on a login node, before a job waits for hours to be told of it: sizes and files, without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fmscale.config import EncodeConfig, TrainConfig
from fmscale.data.order import split
from fmscale.data.transport import PIPE, connect, is_remote
from fmscale.errors import UserError
from fmscale.log import get_logger
from fmscale.site import Site, worlds
from fmscale.size import checkpoint_bytes
from fmscale.slurm import leave_s

log = get_logger(__name__)


def check_train(config: TrainConfig, site: Site) -> None:
    """Refuse a training that could not run, or not save in time.

    Raises:
        UserError: says which key of which file is wrong, and what would do.
    """
    check_time(site)
    for world_size in worlds(site):
        split(config.global_batch, world_size, config.micro_batch)
    places = [config.data.path] if config.data.path else [part.path for part in config.data.mixture]
    for place in places:
        if not is_remote(place):
            _look_at_dataset(Path(place))
        elif not place.startswith(PIPE):  # such a program is started by the job alone
            _look_at_url(place, config.data.remote.timeout_s)
    size = checkpoint_bytes(config)
    _check_disk(config, size)
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
    if not is_remote(config.images) and "{" not in config.images and not Path(config.images).exists():
        raise UserError(f"images: {config.images} does not exist")


def check_time(site: Site) -> None:
    """Refuse a time limit in which nothing would be done but coming and going."""
    if site.time_min * 60 < 2 * site.signal_delay_s:
        raise UserError(
            f"site.time_min: of {site.time_min} min the last {site.signal_delay_s} s (site.signal_delay_s) are for "
            "saving; give at least twice that"
        )


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


def _look_at_url(place: str, timeout_s: float) -> None:
    """Whether there is an index; a place that cannot be reached from a login node may be from the others."""
    transport = connect(place, timeout_s, allow_pipe=False)
    manifest = "index/manifest.json"
    try:
        json.loads(transport.read(manifest, 0, None))["shards"]
    except (FileNotFoundError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"data: {transport.where(manifest)} is no index ({error}): run `fmscale index` where the tars lie"
        ) from None
    except Exception as error:  # whatever libraries for stores raise
        log.warning("data: %s cannot be looked at from here (%s); the job will", place, error)


def _check_disk(config: TrainConfig, size: int) -> None:
    """Whether the checkpoints that will be kept, and the one that is being written, have room."""
    run_dir, part = config.run_dir.absolute(), config.checkpoint
    there = len(list((run_dir / "checkpoints").glob("step-*")))
    count = max(min(part.keep, -(-config.steps // part.every_steps)) + 1 - there, 1)
    nearest = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    free = shutil.disk_usage(nearest).free
    if free < count * size:
        raise UserError(
            f"run_dir: {count} checkpoints of {size / 1e9:.1f} GB need {count * size / 1e9:.1f} GB on {nearest}, where "
            f"{free / 1e9:.1f} GB are free; make room, or lower checkpoint.keep"
        )
