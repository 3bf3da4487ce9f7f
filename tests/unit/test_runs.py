"""Which configs may go on in a run directory, and what is refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fmscale.building import check_setup
from fmscale.config import TrainConfig
from fmscale.errors import UserError
from fmscale.runs import check_run_dir, differences, list_checkpoints, open_run, start_run_dir
from fmscale.train import train

Make = Callable[..., TrainConfig]
SNAPSHOTS = "ema.snapshot_every_steps=5"


def test_free_keys_may_change(tmp_path: Path, make_config: Make) -> None:
    old = make_config(tmp_path)
    new = make_config(
        tmp_path,
        "micro_batch=4",
        "engine.zero_stage=3",
        "data.workers=2",
        "log.every_steps=1",
        "steps=99",
        "validation={path: held_out}",
    )
    assert differences(old, new) == []
    averaging = "ema.sigma_rels=[0.1]"
    assert differences(make_config(tmp_path, averaging), make_config(tmp_path, averaging, SNAPSHOTS)) == []


def test_mathematics_may_not_change(tmp_path: Path, make_config: Make) -> None:
    old, new = make_config(tmp_path), make_config(tmp_path, "optimizer.lr=2e-3", "steps=4")
    assert differences(old, new) == ["steps: 8 in the run, 4 given", "optimizer.lr: 0.001 in the run, 0.002 given"]


def test_a_cosine_that_ends_at_steps_bends_with_them(tmp_path: Path, make_config: Make) -> None:
    cosine = "optimizer.schedule=cosine"
    old, new = make_config(tmp_path, cosine), make_config(tmp_path, cosine, "steps=99")
    assert differences(old, new) == ["steps: 8 in the run, 99 given"]
    bends = "phases=[{until_step: 4}, {optimizer: {schedule: cosine}}]"
    old, new = make_config(tmp_path, bends), make_config(tmp_path, bends, "steps=99")
    assert differences(old, new) == ["steps: 8 in the run, 99 given"]
    ended = "phases=[{until_step: 4, optimizer: {schedule: cosine}}, {optimizer: {schedule: constant}}]"
    assert differences(make_config(tmp_path, ended), make_config(tmp_path, ended, "steps=99")) == []


def test_another_config_is_refused_unless_allowed(tmp_path: Path, make_config: Make) -> None:
    start_run_dir(make_config(tmp_path / "run"), ["cpu"], {})
    other = make_config(tmp_path / "run", "seed=1")
    check_run_dir(other, allow_changes=False)  # nothing was trained yet
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(UserError, match="seed: 0 in the run, 1 given"):
        check_run_dir(other, allow_changes=False)
    check_run_dir(other, allow_changes=True)


def test_a_folder_of_something_else_is_refused(tmp_path: Path, make_config: Make) -> None:
    (tmp_path / "thesis.txt").write_text("dear to somebody")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        check_run_dir(make_config(tmp_path), allow_changes=False)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.latent_channels=16", "the dataset's latents have 4"),
        ("model.context_dim=32", "context_dim"),
        ("model.pooled_dim=31", "the dataset's pooled text has 32"),
        ("model.pos_embed_max_size=4", "the dataset has bucket"),
        ("model.patch_size=3", "does not divide the dataset's bucket"),
        ("flow.coupling=paired", "needs a dataset made by `fmscale reflow`"),
        ("data.path=/nowhere", "/nowhere: no such folder"),
        ("global_batch=1", "cannot be split over 2 ranks"),
    ],
)
def test_a_setup_that_cannot_work_leaves_nothing(tmp_path: Path, make_config: Make, override: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        check_setup(make_config(tmp_path / "run", override), world_size=2)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_opening_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        open_run(tmp_path)


def test_datasets_may_move_and_weights_may_not(tmp_path: Path, make_config: Make) -> None:
    def mixed(folder: str, weight: float) -> TrainConfig:
        parts = f"data.mixture=[{{path: /{folder}/a, weight: 1.0}}, {{path: /{folder}/b, weight: {weight}}}]"
        return make_config(tmp_path, "data.path=null", parts)

    assert differences(mixed("old", 2.0), mixed("new", 2.0)) == []
    assert len(differences(mixed("old", 2.0), mixed("new", 3.0))) == 1
    assert differences(make_config(tmp_path), make_config(tmp_path, "data.max_bad_fraction=0.5")) == []


def test_checkpoints_are_listed_with_their_state(
    tmp_path: Path, make_config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_config(tmp_path / "run", "steps=6", "checkpoint.every_steps=2"))
    root = tmp_path / "run" / "checkpoints"
    (root / "step-00000002" / "index.json").unlink()
    file = next((root / "step-00000004").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    capsys.readouterr()
    for deep, states in ((False, ["damaged", "whole", "whole"]), (True, ["damaged", "damaged", "sound"])):
        assert list_checkpoints(tmp_path / "run", deep) == 2
        lines = capsys.readouterr().out.splitlines()[1:]
        assert [line.split()[0] for line in lines] == ["2", "4", "6"]
        assert all(state in line for state, line in zip(states, lines, strict=True))
    assert open_run(tmp_path / "run").checkpoint.step == 6
    with pytest.raises(UserError, match="holds no checkpoint"):
        list_checkpoints(tmp_path, False)
