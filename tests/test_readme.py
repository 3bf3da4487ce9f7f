"""The README speaks of what is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fmscale.cli import COMMANDS, _parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md"]
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_every_command_is_in_its_table() -> None:
    assert re.findall(r"^\| `fmscale (\w+)", TEXT, flags=re.MULTILINE) == list(COMMANDS)


def test_every_path_that_it_names_exists() -> None:
    for path in re.findall(r"`((?:fmscale|configs|launch|tools|tests|\.ci)/[\w./]+)`", TEXT):
        assert (ROOT / path).exists(), path


def test_every_command_line_is_understood() -> None:
    lines = re.findall(r"^    (?:.*&& )?(?:uv run )?fmscale (.+)$", TEXT, flags=re.MULTILINE)
    assert {line.split()[0] for line in lines} >= {"quickstart", "train", "encode", "export"}
    for line in lines:
        name, *arguments = shlex.split(line, comments=True)
        _parser(name, COMMANDS[name]).parse_intermixed_args(arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_every_help_is_understood(name: str) -> None:
    program, command, *arguments = shlex.split(COMMANDS[name].example)
    assert (program, command) == ("fmscale", name)
    _parser(name, COMMANDS[name]).parse_intermixed_args(arguments)
