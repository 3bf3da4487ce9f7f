"""Words for the person who watches: rank 0 speaks, on standard error, in one voice."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fmscale.distributed import world_from_environment

if TYPE_CHECKING:
    from rich.progress import Progress

# What DeepSpeed warns of at every start, and we do on purpose.
_EXPECTED = ("untested optimizer", "Setting accelerator to CPU")


def setup() -> None:
    """Send the log of rank 0 to standard error, and quiet libraries that talk at every start.

    Other ranks report only warnings and errors.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' and diffusers' bars too
    logging.getLogger("DeepSpeed").addFilter(lambda record: not any(text in record.getMessage() for text in _EXPECTED))
    rank = world_from_environment().rank
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(
        format="%(message)s" if rank == 0 else f"rank {rank}: %(message)s", level=logging.WARNING, force=True
    )
    logging.getLogger("fmscale").setLevel(level)


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; `name` is its `__name__`."""
    return logging.getLogger(name)


@contextmanager
def progress(*fields: str) -> Iterator[Progress]:
    """A progress bar with count, elapsed time and ETA on standard error, drawn by rank 0 on a terminal only.

    Args:
        fields: rich format texts shown after the bar, such as `"loss {task.fields[loss]}"`.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    visible = console.is_terminal and world_from_environment().is_main
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(field) for field in fields),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not visible) as bar:
        yield bar
