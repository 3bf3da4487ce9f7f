"""`fmscale index`: index a folder of tars, check an indexed one, leave out of it what is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fmscale.batch import BadSample
from fmscale.data.index import verify
from fmscale.data.index_build import build_index, repair_index
from fmscale.data.remote import RemoteOptions, is_remote, open_index
from fmscale.errors import UserError
from fmscale.log import get_logger, progress

log = get_logger(__name__)


def index(dataset: str, action: str, allow_pipe: bool = False) -> int:
    """Index a folder of tars, or check an indexed one byte for byte.

    Args:
        dataset: folder of latent shards; for `verify` it may be a URL.
        action: `index`; `verify`, which lists what is damaged; `repair`, which writes an index without it.
        allow_pipe: the program of a `pipe:` dataset may be started.

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
        else:
            opened = build_index(dataset, _made_by(Path(dataset)), report)
    for sample in bad:
        print(f"{sample.shard}: {sample.key or '(the shard itself)'}: {sample.reason}")
    sizes = ", ".join(f"{bucket.name} ({bucket.count:,})" for bucket in opened.buckets)
    ending = "left out" if action == "repair" else "damaged"
    print(f"{dataset}: {len(opened):,} samples in {len(opened.shards):,} shards, buckets {sizes}, {len(bad)} {ending}")
    return 2 if bad and action == "verify" else 0


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
