"""Published weights -> a run directory with one checkpoint, that of step 0, which `sample`, `reflow`, `export` and
`model.init_from` take as any other."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from fmscale import __version__
from fmscale.config import dump
from fmscale.engine.saver import write_checkpoint
from fmscale.engine.zero import WEIGHT
from fmscale.errors import UserError
from fmscale.files import new_folder, sha256
from fmscale.imported import Given, Published, PublishedRun, read_published
from fmscale.init_from import Source
from fmscale.log import get_logger
from fmscale.pipelines import FLUX_WIDTH, network_config, reads_single_files, stock_classes
from fmscale.runs import IMPORTED, Run, checkpoints_dir
from fmscale.sample import parse_roles
from fmscale.self_check import check_import

log = get_logger(__name__)


def import_command(args: argparse.Namespace) -> None:
    """`fmscale import`."""
    config = None if args.config is None else Path(args.config)
    given = Given(config, args.vae, parse_roles(args.text_encoder), args.t5_length)
    import_weights(read_published(Path(args.source), given), Path(args.out))


def import_weights(published: Published, out: Path) -> None:
    """Write published weights as a run, read them back, and compare them with what diffusers reads.

    Args:
        published: what to import.
        out: run directory to make; it appears only when it is whole and says what the published network says.

    Raises:
        UserError: `out` exists, or VAE and text encoders are not both there or both absent.
        OutageError: the run does not say what the published network says.
    """
    if bool(published.vae) != bool(published.text):
        absent = "--text-encoder ROLE=DIR" if published.vae else "--vae DIR"
        raise UserError(f"{published.place}: to draw takes a VAE and text encoders; give {absent} too, or neither")
    published = replace(published, config=published.config.model_copy(update={"run_dir": out}))
    with new_folder(out) as folder:
        made = PublishedRun.of(
            published, published.made_by() if published.vae else None, sha256(*published.source.files)
        )
        (folder / "config.yaml").write_text(dump(made.config), encoding="utf-8")
        shapes = made.checkpoint.index["parameters"]
        found = write_checkpoint(checkpoints_dir(folder), made.checkpoint.index, Weights(published.source, shapes))
        check = _check(published, Run(folder, made.config, found))
        note = {"from": str(published.place), "fmscale": __version__, "check": check}
        (folder / IMPORTED).write_text(json.dumps(note, indent=1) + "\n")
    count = sum(map(prod, shapes.values()))
    log.info("imported %s, %s parameters, to %s", published.place, f"{count:,}", out)
    if not published.vae:
        log.info("without a VAE and text encoders it can be trained from and exported as a transformer, not drawn from")


def _check(published: Published, run: Run) -> dict[str, Any] | None:
    """The network as diffusers reads it, against the run; None where diffusers cannot."""
    _, network = stock_classes(run.config.model.family)
    if published.file is None:
        inner = published.place / "transformer"
        place = inner if inner.is_dir() else published.place
        return check_import(run, network.from_pretrained(place, use_safetensors=True, local_files_only=True))
    if not reads_single_files(run.config.model):
        log.warning("not compared: diffusers reads single files of FLUX %d wide alone", FLUX_WIDTH)
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "transformer").mkdir()
        config = {"_class_name": network.__name__, **network_config(run.config.model)}
        (Path(folder) / "transformer" / "config.json").write_text(json.dumps(config))
        options: dict[str, Any] = {"config": folder, "subfolder": "transformer", "local_files_only": True}
        return check_import(run, network.from_single_file(str(published.file), **options))


class Weights(Mapping[str, Tensor]):
    """Weights as a checkpoint names them, each read when it is asked for: memory does not grow with the network.

    Args:
        source: reads them.
        shapes: of all parameters.
    """

    def __init__(self, source: Source, shapes: Mapping[str, list[int]]) -> None:
        self._source, self._lengths = source, {name: prod(shape) for name, shape in shapes.items()}

    def __getitem__(self, key: str) -> Tensor:
        name = key.removeprefix(f"{WEIGHT}/")
        return self._source.read(name, 0, self._lengths[name])

    def __iter__(self) -> Iterator[str]:
        return (f"{WEIGHT}/{name}" for name in self._lengths)

    def __len__(self) -> int:
        return len(self._lengths)
