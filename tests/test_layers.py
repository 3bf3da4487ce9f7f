"""The import direction: programs -> config -> parts -> leaves, and each heavy library in its own few files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "fmscale"
LEAVES = {"batch", "distributed", "log", "errors", "files", "plain_yaml", "section"}
PARTS = {"flow", "models", "encoders", "data", "engine"}
HEAVY = {
    "deepspeed": {"engine/zero.py"},
    "webdataset": {"data/*", "quickstart.py"},
    "transformers": {"encoders/*", "export.py"},
    "open_clip": {"encoders/*"},
    "torchao": {"engine/fp8.py"},
    "torchmetrics": {"quality.py"},
    "matplotlib": {"plots.py"},
    "gradio": {"demo.py"},
    "ot": {"flow/transport.py"},
    "torchdiffeq": {"flow/solver.py"},
    "diffusers": {"encoders/vae.py", "export.py", "pipelines.py", "quickstart.py", "self_check.py"},
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def modules() -> list[tuple[str, Path]]:
    return [(path.relative_to(PACKAGE).as_posix(), path) for path in sorted(PACKAGE.rglob("*.py"))]


def test_parts_know_only_themselves_and_leaves() -> None:
    for name, path in modules():
        part = name.split("/")[0]
        if part not in PARTS:
            continue
        for imported in imports(path):
            if imported.startswith("fmscale."):
                target = imported.split(".")[1]
                assert target == part or target in LEAVES, f"{name} imports {imported}"


def test_leaves_know_no_part() -> None:
    for leaf in LEAVES:
        targets = {i.split(".")[1] for i in imports(PACKAGE / f"{leaf}.py") if i.startswith("fmscale.")}
        assert targets <= LEAVES | {"cli"}, leaf  # a spawned rank starts at the command line again


def test_config_knows_no_part() -> None:
    found = {i for name in ("config.py", "encode_config.py") for i in imports(PACKAGE / name)}
    ours = {"fmscale.encode_config", "fmscale.errors", "fmscale.plain_yaml", "fmscale.section"}
    assert {i for i in found if i.startswith("fmscale.")} == ours


def test_heavy_libraries_stay_in_their_files() -> None:
    for name, path in modules():
        for imported in imports(path):
            library = imported.split(".")[0]
            if library in HEAVY:
                allowed = HEAVY[library]
                assert name in allowed or f"{name.split('/')[0]}/*" in allowed, f"{name} imports {imported}"


def test_files_can_be_read() -> None:
    for name, path in modules():
        assert len(path.read_text().splitlines()) <= 500, name
