from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmscale.config import CONFIGS, EncodeConfig, TrainConfig, dump, flatten, load, merge, parse_overrides, schema
from fmscale.errors import UserError
from fmscale.flow.coupling import COUPLINGS
from fmscale.flow.few_step import FEW_STEP
from fmscale.flow.loss import LOSSES
from fmscale.flow.path import PATHS
from fmscale.flow.prediction import PREDICTIONS
from fmscale.flow.solver import SOLVERS
from fmscale.flow.timesteps import TIMESTEP_SAMPLERS
from fmscale.flow.transport import TRANSPORTS
from fmscale.flow.weights import WEIGHTS
from fmscale.models.families import MODELS
from fmscale.pictures import LEAP
from fmscale.plain_yaml import parse_yaml

BASE = "run_dir: r\nsteps: 10\nglobal_batch: 64\nmicro_batch: 8\ndata: {path: x}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "a.yaml"
    file.write_text(BASE)
    return file


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(TrainConfig, path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_child_overrides_its_base_key_by_key(path: Path) -> None:
    child = path.with_name("b.yaml")
    child.write_text("base: a.yaml\nsteps: 20\noptimizer: {lr: 3e-4}\n")
    config = load(TrainConfig, child, ["optimizer.weight_decay=0.1"])
    assert (config.steps, config.global_batch) == (20, 64)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (3e-4, 0.1)


def test_a_dumped_config_loads_as_the_same_config(path: Path) -> None:
    config = load(TrainConfig, path, ["optimizer.lr=1e-7", "model.dual_attention_layers=[0, 3]", "ema.decays=[0.5]"])
    path.write_text(dump(config))
    assert load(TrainConfig, path) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("-3", -3), ("1_000", 1000), ("no", "no"), ("on", "on"), ("off", "off")]
    + [("true", True), ("null", None), ("", None), ("010", "010"), ("1:30", "1:30"), ("2026-01-01", "2026-01-01")],
)
def test_scalars_are_what_they_look_like(text: str, value: object) -> None:
    parsed = parse_yaml(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers())
def test_numbers_survive_the_command_line(number: float, integer: int) -> None:
    parsed = parse_overrides([f"a.b={number!r}", f"a.c={integer}"])
    assert parsed == {"a": {"b": number, "c": integer}}


def test_merge_lays_one_mapping_over_another_and_changes_neither() -> None:
    below, above = {"a": {"b": 1, "c": 2}, "d": {"e": 3}}, {"a": {"c": 4}, "d": 5}
    assert merge(below, above) == {"a": {"b": 1, "c": 4}, "d": 5}
    assert below == {"a": {"b": 1, "c": 2}, "d": {"e": 3}}


def test_an_unknown_key_gets_its_nearest_spelling_and_what_is_allowed(path: Path) -> None:
    line = refusal(path, "gloabl_batch=3")
    assert line.startswith("command line: gloabl_batch: no such key; did you mean global_batch? allowed here: run_dir,")


def test_a_key_of_another_part_is_found(path: Path) -> None:
    assert "did you mean engine.zero_stage?" in refusal(path, "zero_stage=1")
    assert "did you mean engine.dtype?" in refusal(path, "engine.dtpye=bf16")


@pytest.mark.parametrize(
    ("text", "allowed"), [(BASE + "'': 1\n", "run_dir,"), (BASE.replace("x}", "x, '': 1}"), "path, mixture,")]
)
def test_an_empty_key_is_refused_as_any_other(path: Path, text: str, allowed: str) -> None:
    path.write_text(text)
    assert f": no such key; allowed here: {allowed}" in refusal(path)


def test_a_typo_in_a_file_names_the_file(path: Path) -> None:
    path.write_text(BASE + "enigne: {}\n")
    assert refusal(path).startswith(f"{path}: enigne: no such key; did you mean engine?")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("engine.zero_stage=0", "engine.zero_stage: input should be 1, 2 or 3; given 0"),
        ("steps=1.5", "steps: input should be a valid integer"),
        ("steps=-1", "steps: input should be greater than 0"),
        ("optimizer.lr=fast", 'given "fast"'),
        ("optimizer.lr=.nan", "optimizer.lr:"),
        ("data=3", "data: input should be an object; given 3"),
        ("ema.decays=[1.0]", "ema.decays.0: input should be less than 1"),
        ("ema.sigma_rels=[0.3]", "ema.sigma_rels.0: input should be less than 0.28"),
        ("ema.sigma_rels=[0.1, 0.1]", "each of `decays` and of `sigma_rels` must stand once"),
        ("ema.snapshot_every_steps=9", "keeps what `sigma_rels` averages"),
        ("steps", "'steps' is not an override; write key=value"),
        ("a..b=1", "is not an override"),
        ("model={layers: 1, layers: 2}", "key 'layers' stands twice"),
    ],
)
def test_bad_values_are_named(path: Path, override: str, says: str) -> None:
    line = refusal(path, override)
    assert says in line
    assert line.startswith("command line")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BASE + "steps: 11\n", ":6: not valid YAML: key 'steps' stands twice"),
        ("[1]\n", "a config is a mapping"),
        ("a: [\n", "not valid YAML"),
        ("a: !!python/object/apply:os.system [id]\n", "not valid YAML"),
        ("base: a.yaml\n", "leads back to itself"),
        ("base: [x]\n", "takes the path of one YAML file"),
        ("base: gone.yaml\n", "gone.yaml: cannot read the config: No such file"),
        ("steps: 1\n", "run_dir: must be given"),
        ("", "must be given"),
    ],
)
def test_bad_files_are_named(path: Path, text: str, says: str) -> None:
    path.write_text(text)
    assert says in refusal(path)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("captions={.txt: 1}", "captions: .txt is no place: write an extension without its dot, or json.FIELD"),
        ("captions={a/b: 1}", "captions: a/b is no place"),
        ("captions={txt: 0}", "every weight is 0"),
        ("resolutions_px=[256, 256]", "one comes twice"),
    ],
)
def test_what_makes_no_sense_of_a_source_is_named(tmp_path: Path, override: str, says: str) -> None:
    path = tmp_path / "encode.yaml"
    path.write_text("images: i\nout: o\nvae: v\ntext: {clip_l: {path: c}}\n")
    assert load(EncodeConfig, path, ["captions={txt: 1, json.a/b: 2}"]).captions["json.a/b"] == 2
    with pytest.raises(UserError, match=says):
        load(EncodeConfig, path, [override])


def test_configs_cannot_be_changed(path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(TrainConfig, path).steps = 3  # type: ignore[misc]


def test_literals_are_the_tables_rows() -> None:
    properties: dict[str, set[object]] = {}
    for kind in CONFIGS.values():
        for name, allowed in _fields(kind):
            properties.setdefault(name, set()).update(allowed)
    assert properties["flow.timesteps"] == set(TIMESTEP_SAMPLERS)
    assert properties["flow.coupling"] == set(COUPLINGS)
    assert properties["model.family"] == set(MODELS)
    assert properties["solver"] == {*SOLVERS, "auto", LEAP}
    assert properties["flow.loss"] == set(LOSSES)
    assert properties["flow.weight"] == set(WEIGHTS)
    assert properties["flow.path"] == set(PATHS)
    assert properties["flow.prediction"] == set(PREDICTIONS)
    assert properties["flow.transport"] == {"none", *TRANSPORTS}
    assert properties["flow.objective"] == {"velocity", *FEW_STEP}


def _fields(kind: type) -> list[tuple[str, tuple[object, ...]]]:
    from typing import get_args

    from fmscale.config import flatten_schema

    return [(name, get_args(field.annotation)) for name, field in flatten_schema(kind)]


@pytest.mark.parametrize("command", CONFIGS)
def test_the_schema_describes_every_key(command: str) -> None:
    described = json.loads(schema(command))
    assert set(CONFIGS[command].model_fields) | {"base"} == set(described["properties"])
    assert described["additionalProperties"] is False


def test_flatten_names_every_value(path: Path) -> None:
    values = flatten(load(TrainConfig, path))
    assert values["engine.zero_stage"] == 1
    assert values["data.path"] == "x"
