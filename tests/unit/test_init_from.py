"""Published weights, read a little at a time, as they are in folders and single files."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmscale.errors import UserError
from fmscale.init_from import Source, open_source
from fmscale.models.families import FORMS, NAMES, build
from fmscale.models.mmdit_names import DIFFUSERS_POSITIONS, ORIGINAL_POSITIONS, position_grid
from fmscale.models.published import publish

SIZES = {"heads": 2, "head_dim": 8, "latent_channels": 4, "patch_size": 2, "context_dim": 12, "pooled_dim": 10}
MMDIT = {"family": "mmdit", **SIZES, "layers": 2, "pos_embed_max_size": 6, "base_size": 4, "qk_norm": True}
MMDIT |= {"dual_attention_layers": (0,), "position_origin": None, "position_step": None, "init_from": None}
FLUX = {"family": "flux", **SIZES, "layers": 1, "single_layers": 2, "rope_dims": (2, 2, 4), "guidance_embed": True}
VALUES: dict[str, dict[str, Any]] = {"mmdit": MMDIT, "flux": FLUX}
CLASSES = {"mmdit": SD3Transformer2DModel, "flux": FluxTransformer2DModel}


def draw(family: str, **changes: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model of a family, and random weights for it."""
    model = build(family, VALUES[family] | changes)
    generator = torch.Generator().manual_seed(0)
    return model, {name: torch.randn(w.shape, generator=generator) for name, w in model.state_dict().items()}


def write_file(path: Path, family: str, form: str, dtype: torch.dtype, prefix: str = "", **changes: Any) -> Path:
    """Those weights as a single file."""
    model, state = draw(family, **changes)
    theirs = publish(state, model, FORMS[family][form])
    if family == "mmdit":
        theirs[DIFFUSERS_POSITIONS if form == "diffusers" else ORIGINAL_POSITIONS] = position_grid(model)
    others = {"first_stage_model.conv.weight": torch.zeros(3)} if prefix else {}
    save_file({prefix + name: value.to(dtype).contiguous() for name, value in theirs.items()} | others, path)
    return path


def write_folder(folder: Path, family: str, **changes: Any) -> Path:
    """Those weights as stock diffusers writes them, in several files."""
    model, state = draw(family, **changes)
    values = VALUES[family] | changes
    sample_size = {"sample_size": 8} if family == "mmdit" else {}
    theirs = CLASSES[family](**NAMES[family].diffusers_config(values, **sample_size))
    theirs.load_state_dict(NAMES[family].to_diffusers(state, model))
    theirs.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def check_reads(source: Source, expected: dict[str, Tensor]) -> None:
    """Whole parameters, and pieces that begin and end anywhere."""
    rng = random.Random(0)
    for name, values in expected.items():
        flat = values.flatten()
        assert torch.equal(source.read(name, 0, len(flat)), flat), name
        for _ in range(20):
            low, high = sorted(rng.choices(range(len(flat) + 1), k=2))
            assert torch.equal(source.read(name, low, high - low), flat[low:high]), (name, low, high)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(("family", "form"), [(family, form) for family in FORMS for form in FORMS[family]])
def test_single_files(tmp_path: Path, family: str, form: str, prefix: str, dtype: torch.dtype) -> None:
    source = open_source(write_file(tmp_path / "x.safetensors", family, form, dtype, prefix), VALUES[family])
    check_reads(source, {name: value.to(dtype).float() for name, value in draw(family)[1].items()})
    assert source.added == []


@pytest.mark.parametrize("family", VALUES)
@pytest.mark.parametrize("within", ["", "transformer"])
def test_folders_of_diffusers(tmp_path: Path, family: str, within: str) -> None:
    write_folder(tmp_path / within, family)
    check_reads(open_source(tmp_path, VALUES[family]), draw(family)[1])


@pytest.mark.parametrize("form", FORMS["mmdit"])
def test_norms_of_queries_and_keys_are_added(tmp_path: Path, form: str) -> None:
    path = write_file(tmp_path / "x.safetensors", "mmdit", form, torch.float32, qk_norm=False)
    source, (model, _) = open_source(path, MMDIT), draw("mmdit")
    assert source.added == [name for name in model.state_dict() if "norm_" in name]
    assert torch.equal(source.read(source.added[0], 2, 3), torch.ones(3))
    check_reads(source, draw("mmdit", qk_norm=False)[1])


def test_norms_are_added_to_a_folder_that_has_none(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path / "folder", "mmdit", qk_norm=False), MMDIT)
    assert len(source.added) == 2 * 2 * 2 + 2


@pytest.mark.parametrize(("family", "which"), [("mmdit", "ln_q"), ("flux", "norm.query_norm"), ("flux", "norm.")])
def test_norms_of_a_network_that_has_some_are_missing(tmp_path: Path, family: str, which: str) -> None:
    """What lacks a part of them is damaged, and a FLUX has them always."""
    path = write_file(tmp_path / "x.safetensors", family, "original", torch.float32)
    save_file({name: value for name, value in load_file(path).items() if which not in name}, path)
    with pytest.raises(UserError, match=rf"weights do not fit the model: missing: \S*{which}"):
        open_source(path, VALUES[family])


def test_other_values_of_the_same_shapes_are_told_apart(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", "flux", "original", torch.float32)
    digest = open_source(path, FLUX).digest
    assert open_source(path, FLUX).digest == digest
    state = load_file(path)
    save_file({name: value * 1.001 for name, value in state.items()}, path)
    assert open_source(path, FLUX).digest != digest


def test_no_more_is_read_than_asked_for(tmp_path: Path) -> None:
    """As the system counts it."""
    source = open_source(write_file(tmp_path / "x.safetensors", "flux", "original", torch.float32), FLUX)

    def read_bytes() -> int:
        return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])

    own = -read_bytes() + read_bytes()
    before = read_bytes()
    source.read("modulation.weight", 3000, 1000)
    assert read_bytes() - before - own == 1000 * 4


Change = Callable[[dict[str, Tensor]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("proj_out.bias"), r"missing: proj_out\.bias \(1 in all\)"),
        (lambda state: state.update(lora=torch.ones(1)), r"unexpected: lora \(1 in all\)"),
        (lambda state: state.update({"proj_out.bias": torch.ones(3)}), r"of another shape: proj_out\.bias"),
        (
            lambda state: state.update({DIFFUSERS_POSITIONS: torch.zeros(())}),
            r"grid has the shape \(\), which is no square of 16 channels",
        ),
        (
            lambda state: state.update({"proj_out.bias": torch.ones(16, dtype=torch.int8)}),
            r"stored as integers, which say nothing without their scales: proj_out\.bias \(1 in all\)",
        ),
        (
            lambda state: state.update({DIFFUSERS_POSITIONS: torch.zeros(1, 25, 16)}),
            r"grid has 5 patches on a side; set model\.pos_embed_max_size to that",
        ),
        (
            lambda state: state.update({DIFFUSERS_POSITIONS: position_grid(draw("mmdit", base_size=2)[0])}),
            r"other positions .* set model\.position_origin to 2 and model\.position_step to 8",
        ),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    path = write_file(tmp_path / "x.safetensors", "mmdit", "diffusers", torch.float32)
    state = load_file(path)
    change(state)
    save_file(state, path)
    with pytest.raises(UserError, match=rf"^model\.init_from: \S+x\.safetensors: .*{message}"):
        open_source(path, MMDIT)


def test_a_tensor_that_two_files_of_a_folder_hold_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "flux")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    name, value = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: value + 1}, second)
    with pytest.raises(UserError, match=rf"{second.name} and \S+{first.name} both hold {name}; download them again"):
        open_source(folder, FLUX)


def test_other_networks_are_named_by_their_settings(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "mmdit")
    with pytest.raises(UserError, match=r"has model\.layers 2 \(here 3\), model\.pooled_dim 10 \(here 11\); "):
        open_source(folder, MMDIT | {"layers": 3, "pooled_dim": 11})
    with pytest.raises(UserError, match=r"has model\.qk_norm True \(here False\)"):
        open_source(folder, MMDIT | {"qk_norm": False})
    with pytest.raises(UserError, match=r"holds a SD3Transformer2DModel; model\.family flux is a Flux"):
        open_source(folder, FLUX)
    (folder / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel"}))
    with pytest.raises(UserError, match=r"its config\.json lacks 'patch_size'"):
        open_source(folder, MMDIT)


@pytest.mark.parametrize("change", [{"dual_attention_layers": None}, {"num_attention_heads": None}])
def test_a_config_of_other_types_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write_folder(tmp_path / "folder", "mmdit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=r"its config\.json is damaged \(.*\); download it again"):
        open_source(folder, MMDIT)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: neither a folder nor a file; give a folder of diffusers"):
        open_source(tmp_path / "nothing", MMDIT)
    with pytest.raises(UserError, match=r"^model\.init_from: x+: cannot be read: File name too long$"):
        open_source(Path("x" * 300), MMDIT)
    with pytest.raises(UserError, match=r"no model folder, for it holds no config\.json"):
        open_source(tmp_path, MMDIT)
    torch.save({"weight": torch.ones(2)}, pickled := tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=r"only safetensors are read"):
        open_source(pickled, MMDIT)
    save_file({"weight": torch.ones(2)}, foreign := tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"lora\.safetensors holds no weights of a SD3Transformer2DModel"):
        open_source(foreign, MMDIT)
    whole = write_file(tmp_path / "x.safetensors", "mmdit", "original", torch.float32)
    (cut := tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"cut\.safetensors: .*download it again"):
        open_source(cut, MMDIT)


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    source = open_source(path := write_file(tmp_path / "x.safetensors", "flux", "original", torch.float32), FLUX)
    path.write_bytes(path.read_bytes()[:4096])
    with pytest.raises(UserError, match=r"x\.safetensors: cut short; download it again"):
        source.read("modulation.weight", 0, 16)
    path.unlink()
    with pytest.raises(UserError, match=r"x\.safetensors: cannot be read: No such file"):
        source.read("modulation.weight", 0, 16)
