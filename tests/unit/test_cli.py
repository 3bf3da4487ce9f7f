from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fmscale.cli import COMMANDS, main
from fmscale.config import TrainConfig, dump


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"example:\n  fmscale {command}" in capsys.readouterr().out


def test_help_imports_no_heavy_library() -> None:
    program = (
        "import sys\nfrom fmscale.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'pydantic', 'deepspeed', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_runs_where_one_logs_in_needs_no_torch(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config, site = tmp_path / "train.yaml", Path(__file__).parents[2] / "launch" / "sites" / "cpus.yaml"
    config.write_text(dump(make_config(tmp_path / "run")))
    (tmp_path / "other" / "slurm").mkdir(parents=True)
    for words in (
        ["submit", "train", str(config), "--site", str(site), "--dry-run", "site.device=h100"],
        ["plan", str(config), "--world-size", "4", "--site", str(site)],
        *([command, str(tmp_path / "other")] for command in ("status", "stop", "logs")),
        ["requeue", str(tmp_path / "other"), "0"],
    ):
        program = (
            f"import sys\nfrom fmscale.cli import main\nmain({words})\n"
            "print(sorted({'torch', 'deepspeed', 'transformers', 'webdataset'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]", (words, done.stdout, done.stderr)


def test_an_unknown_command_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["trian"])
    assert left.value.code == 2
    assert "quickstart" in capsys.readouterr().err


def test_a_typo_in_an_override_leaves_nothing(
    tmp_path: Path, make_config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    path = tmp_path / "train.yaml"
    path.write_text(dump(make_config(run_dir)))
    assert main(["train", str(path), "--nproc", "2", "gloabl_batch=8"]) == 2
    message = capsys.readouterr().err
    assert "did you mean global_batch?" in message
    assert message.count("\n") == 1
    assert not run_dir.exists()


def test_print_config_is_the_merged_config(
    tmp_path: Path, make_config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.yaml"
    config = make_config(tmp_path / "run")
    path.write_text(dump(config))
    assert main(["train", str(path), "--print-config", "steps=77"]) == 0
    assert capsys.readouterr().out == dump(config).replace("steps: 8\n", "steps: 77\n", 1)
