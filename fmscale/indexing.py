"""`fmscale index`: index a folder of tars, latents or images; check an indexed one, leave out what is damaged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fmscale import inputs
from fmscale.batch import BadSample
from fmscale.config import EncodeConfig, check, merge, read_layers
from fmscale.data.index import Index, Layout, verify
from fmscale.data.index_build import Row, build_index, repair_index
from fmscale.data.raw import LAYOUT
from fmscale.data.remote import RemoteOptions, is_remote, open_index
from fmscale.data.tar import find_tars
from fmscale.encoders.null import save_null
from fmscale.errors import UserError
from fmscale.features import Encoder, check_buckets
from fmscale.log import get_logger, progress
from fmscale.unfinished import tally

log = get_logger(__name__)


def index(dataset: str, action: str, allow_pipe: bool = False, config: str | None = None) -> int:
    """Index a folder of tars, or check an indexed one byte for byte.

    Args:
        dataset: folder of latent shards, or of tars of images; for `verify` it may be a URL.
        action: `index`; `images`, for tars of those; `verify`, which lists what is damaged; `repair`, which writes an
            index without it.
        allow_pipe: the program of a `pipe:` dataset may be started.
        config: for `images`, the encode config that says what becomes of them.

    Returns:
        Exit code: 0, or 2 where `verify` found damage.
    """
    if action != "verify" and is_remote(dataset):
        raise UserError(
            f"{dataset}: an index is written where the tars lie; do that, and put its folder `index` beside them"
        )
    bad: list[BadSample] = []
    with progress() as bar:
        task = bar.add_task(action, total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if action == "verify":
            opened = open_index(dataset, RemoteOptions(allow_pipe=allow_pipe), check_shards=False)
            bad = verify(opened, report)
        elif action == "repair":
            opened, bad = repair_index(dataset, report)
        elif config is not None:
            opened, bad = index_images(Path(dataset), Path(config), report)
        else:
            opened = build_index(dataset, _made_by(Path(dataset)), report)
    for sample in bad:
        detail = f": {sample.detail}" if sample.detail else ""
        print(f"{sample.shard}: {sample.key or '(the shard itself)'}: {sample.reason}{detail}")
    sizes = ", ".join(f"{bucket.name} ({bucket.count:,})" for bucket in opened.buckets)
    ending = "left out" if action in ("repair", "images") else "damaged"
    if action == "images" and bad:
        ending += f" ({tally(Counter(sample.reason for sample in bad))})"
    print(f"{dataset}: {len(opened):,} samples in {len(opened.shards):,} shards, buckets {sizes}, {len(bad)} {ending}")
    return 2 if bad and action == "verify" else 0


def index_images(folder: Path, path: Path, progress: Callable[[int, int], None]) -> tuple[Index, list[BadSample]]:
    """Index tars of images, which training encodes as `fmscale encode` would.

    Args:
        folder: holds the tars; the empty caption's features go beside them.
        path: an encode config; what it says of `images` and `out` is of no account.
        progress: as for `build_index`.

    Returns:
        The index, and the images that it leaves out: those which `encode` would refuse for what json and head say.

    Raises:
        UserError: config, tars and frozen networks do not fit together, or no image could be used.
    """
    ours = {"images": str(folder), "out": str(folder), "text": {"online": True, "t5_fp8": False}}
    config = check(EncodeConfig, merge(read_layers(path), ours), str(path))
    inputs.check_raw(config)
    if not find_tars(folder):
        raise UserError(f"{folder} holds no *.tar: give the folder that holds the tars of images")
    encoder = Encoder(config)
    raw = inputs.raw_images(config, encoder.vae.identity())
    check_buckets(raw.preparation, encoder.vae)
    left_out: dict[str, list[BadSample]] = {}

    def scan(tar: Path) -> tuple[list[Row], Layout | None]:
        rows, left_out[tar.name] = raw.scan(tar)
        return rows, LAYOUT if rows else None

    save_null(folder, encoder.null())
    made_by = {**encoder.identity(), "program": "fmscale index --images", "images": raw.described()}
    index = build_index(folder, made_by, progress, scan)
    return index, [bad for _, found in sorted(left_out.items()) for bad in found]


def _made_by(dataset: Path) -> dict[str, Any] | None:
    """What an older index of the dataset says about its making, so that indexing again does not forget it."""
    manifest = dataset / "index" / "manifest.json"
    if not manifest.is_file():
        return None
    try:
        return json.loads(manifest.read_text())["made_by"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the old index is of no use, so what made this dataset is forgotten: %s", error)
        return None
