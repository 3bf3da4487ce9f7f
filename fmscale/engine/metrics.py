"""metrics.jsonl and TensorBoard: one object per optimizer step, written now and then, never twice."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from fmscale.engine.statistics import EDGES
from fmscale.errors import UserError
from fmscale.files import replace_text
from fmscale.log import get_logger

if TYPE_CHECKING:
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

log = get_logger(__name__)


class Named(NamedTuple):
    """Several numbers of one kind, such as the losses of all bins: an object in metrics.jsonl.

    Attributes:
        names: one for each.
        values: shape (len(names),).
    """

    names: Sequence[str]
    values: Tensor


class MetricsLog:
    """Collects a run's numbers and writes them on rank 0.

    Tensors are kept as they are until `flush`, so that a step does not wait for the device.

    Args:
        run_dir: holds `metrics.jsonl` and `tensorboard/`.
        first_step: the next step to be written; lines of that step or later, left by a run that went further before
            it died, are removed.
        tensorboard: write scalars there too.

    Attributes:
        last: the object of the last step that was done before, empty at the start of a run.
        writer: TensorBoard's, or None.
    """

    def __init__(self, run_dir: Path, first_step: int, tensorboard: bool) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.records: list[dict[str, Any]] = []
        kept = keep_before(self.path, first_step)
        self.last: dict[str, Any] = kept[-1] if kept else {}
        self.writer: SummaryWriter | None = None
        self.show(tensorboard, first_step)

    def show(self, tensorboard: bool, first_step: int) -> None:
        """Write scalars to TensorBoard from a step on, or no longer."""
        if tensorboard and self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=first_step)
        elif not tensorboard and self.writer is not None:
            self.writer.close()
            self.writer = None

    def add(self, **record: Any) -> None:
        """Take note of a step; values are numbers, texts, None, scalar tensors or `Named`."""
        self.records.append(record)

    def flush(self) -> list[dict[str, Any]]:
        """Write what was added since; returns it as plain numbers."""
        records = [{key: _plain(value) for key, value in record.items()} for record in self.records]
        self.records = []
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        if self.writer is not None:
            for record in records:
                self._write_scalars(record)
            self.writer.flush()
        return records

    def _write_scalars(self, record: dict[str, Any]) -> None:
        named = (
            (f"{key}/{name}", one) for key, all in record.items() if isinstance(all, dict) for name, one in all.items()
        )
        for key, value in (*record.items(), *named):
            if key != "step" and isinstance(value, int | float):
                self.writer.add_scalar(f"train/{key}", value, record["step"])  # type: ignore[union-attr]

    def add_histogram(self, tag: str, sums: Sequence[float], step: int) -> None:
        """Show TensorBoard how values are distributed, where it is in use.

        Args:
            tag: its name.
            sums: a row of `Look.sums`.
            step: that it is of.
        """
        squares, plain, *counts = sums
        filled = [place for place, count in enumerate(counts) if count]
        if self.writer is None or not filled:
            return
        bins = slice(filled[0], filled[-1] + 1)
        limits = (*EDGES, sys.float_info.max)
        self.writer.add_histogram_raw(
            tag,
            min=(-sys.float_info.max, *EDGES)[filled[0]],  # no closer than the bins are
            max=limits[filled[-1]],
            num=int(sum(counts)),
            sum=plain,
            sum_squares=squares,
            bucket_limits=limits[bins],
            bucket_counts=counts[bins],
            global_step=step,
        )

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Show TensorBoard a number, where it is in use."""
        if self.writer is not None:
            self.writer.add_scalar(tag, value, step)

    def add_image(self, folder: str, image: Image.Image, step: int) -> None:
        """Keep a picture as `folder`/step-XXXXXXXX.png in the run directory, and show it in TensorBoard too.

        A disk that fails is reported, and the run goes on.
        """
        path = self.path.parent / folder / f"step-{step:08d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            image.save(path)
        except OSError as error:
            log.error("%s: cannot be written (%s); the run goes on", path, error.strerror or error)
        if self.writer is not None:
            self.writer.add_image(folder, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left and let go of the files."""
        self.flush()
        if self.writer is not None:
            self.writer.close()


def _plain(value: Any) -> Any:
    if isinstance(value, Named):
        return dict(zip(value.names, map(_plain, value.values.tolist()), strict=True))
    if isinstance(value, Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON knows no NaN


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; a last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines[:-1]]  # what follows the last line break is not whole
    except ValueError as error:
        raise UserError(f"{path}: not what was written there ({error}); mend or remove it") from None


def keep_before(path: Path, first_step: int) -> list[dict[str, Any]]:
    """Keep only a file's lines before `first_step`, and return them; the file is replaced whole or not at all."""
    kept = [record for record in read_metrics(path) if record["step"] < first_step]
    if path.is_file():
        replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept
