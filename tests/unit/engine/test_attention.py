from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from fmscale.building import attention_shapes
from fmscale.config import TrainConfig
from fmscale.dataset import open_dataset
from fmscale.distributed import World
from fmscale.engine.attention import BACKENDS, FUSED, Choice, Shape, agree, choose, fastest, takes, using
from fmscale.errors import UserError
from fmscale.runs import ATTENTION
from fmscale.train import train

CPU = torch.device("cpu")
ALONE = World(0, 0, 1)
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
Make = Callable[..., TrainConfig]


def shape(dtype: torch.dtype = torch.float32, biases: int = 0, tokens: int = 20) -> Shape:
    return Shape(2, 3, tokens, tokens, 8, dtype, CPU, biases)


def inputs() -> list[torch.Tensor]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 20, 8, generator=generator, requires_grad=True) for _ in range(3)]


def attend(bias_learns: bool = False) -> torch.Tensor:
    return F.scaled_dot_product_attention(*inputs(), attn_mask=torch.zeros(1, 1, 1, 20, requires_grad=bias_learns))


@pytest.mark.parametrize("biases", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_has_one_fused_kernel_which_is_not_timed(dtype: torch.dtype, biases: int) -> None:
    assert choose("auto", shape(dtype, biases)) == Choice("flash", {})


def test_what_no_fused_kernel_takes_is_left_to_math() -> None:
    assert choose("auto", shape(torch.complex64)) == Choice("math", {})
    taken = [kernel for kernel in BACKENDS if takes(kernel, lambda: attend(bias_learns=True).sum().backward(), CPU)]
    assert taken == ["math"]


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_a_kernel_by_name_that_does_not_take_the_shape_is_refused(kernel: str) -> None:
    asked = "2 images x 3 heads x 20 queries x 20 keys of 8 in float32, biased"
    with pytest.raises(
        UserError, match=rf"^engine\.attention: {kernel} does not take {asked} on the CPU; choose auto, "
    ):
        choose(kernel, shape(biases=1))


def test_a_kernel_by_name_is_taken_without_a_trial_of_others() -> None:
    assert choose("flash", shape()) == Choice("flash", {})
    assert choose("math", shape()) == Choice("math", {})


def test_the_least_time_wins_and_of_equals_the_first() -> None:
    assert fastest({"cudnn": 2.0, "flash": 1.5}) == "flash"
    assert fastest({"cudnn": 1.5, "flash": 2.0}) == "cudnn"
    assert fastest({"cudnn": 2.0, "flash": 1.5, "efficient": 1.5}) == "flash"


def test_attention_within_uses_the_kernel_and_outside_torchs_own_choice() -> None:
    before = torch._C._get_sdp_priority_order()
    kernels = []
    for kernel in ("math", "flash", "cudnn"):  # the last takes no shape here, and stands aside
        with using(kernel):
            kernels.append(type(attend().grad_fn).__name__)
    kernels.append(type(attend().grad_fn).__name__)
    flash = "ScaledDotProductFlashAttentionForCpuBackward0"
    assert [kernel == flash for kernel in kernels] == [False, True, True, True]
    assert torch._C._get_sdp_priority_order() == before
    assert torch.compiler.config.cache_key_tag == ""


def test_binding_a_micro_batch_to_its_kernel_costs_nothing_that_shows() -> None:
    times = []
    for _ in range(500):
        began = time.perf_counter()
        with using("flash"):
            pass
        times.append(time.perf_counter() - began)
    print(f"{1e6 * statistics.median(times):.0f} us to enter and leave")
    assert statistics.median(times) < 1e-3


def look(wanted: str, file: Path) -> tuple[list[str], bool]:
    """The kernels of two buckets of one shape and a third, and whether something new was found, which is kept."""
    shapes = {(8, 8): shape(), (8, 16): shape(tokens=30), (16, 8): shape(tokens=30)}
    kernels, record = agree(wanted, shapes, file, ALONE)
    assert list(kernels) == list(shapes)
    if record is not None:
        assert len(record["kernels"]) == 2
        file.write_text(json.dumps(record))
    return list(kernels.values()), record is not None


def test_what_is_stored_is_obeyed_on_the_same_device_and_torch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fmscale")
    file = tmp_path / "attention.json"
    assert look("auto", file) == (["flash"] * 3, True)
    assert len(caplog.messages) == 1
    assert "flash for 2 images x 3 heads x 30 queries" in caplog.text
    assert look("auto", file) == (["flash"] * 3, False)
    kept = json.loads(file.read_text())
    kept["kernels"][shape(tokens=30).name] = "math"
    file.write_text(json.dumps(kept))
    assert look("auto", file) == (["flash", "math", "math"], False)
    assert look("flash", file) == (["flash"] * 3, False)
    assert len(caplog.messages) == 1
    del kept["kernels"][shape().name]
    file.write_text(json.dumps(kept))
    assert look("auto", file) == (["flash", "math", "math"], True)
    assert "30 queries" not in caplog.messages[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "NVIDIA H100"}, "was made on NVIDIA H100 with torch"),
        ({"torch": "2.10.0"}, "was made on the CPU with torch 2.10.0"),
        ({"kernels": 3}, "cannot be read"),
        ({"kernels": {shape().name: "quick"}}, "cannot be read"),
    ],
)
def test_what_is_stored_for_others_is_tried_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, object], said: str
) -> None:
    caplog.set_level(logging.INFO, "fmscale")
    kernels = {shape().name: "math", shape(tokens=30).name: "math"}
    file = tmp_path / "attention.json"
    file.write_text(json.dumps({"device": "the CPU", "torch": torch.__version__, "kernels": kernels, **change}))
    assert look("auto", file) == (["flash"] * 3, True)
    assert said in caplog.messages[0]
    assert look("auto", file) == (["flash"] * 3, False)


def test_the_shapes_of_a_run_are_those_that_its_network_works_on(tmp_path: Path, make_config: Make) -> None:
    config = make_config(tmp_path / "run", "steps=3", "engine.attention=math")
    found = set(attention_shapes(config, open_dataset(config), 32, CPU).values())
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        train(config)
    asked = {
        tuple(tuple(size) for size in event.input_shapes[:4])
        for event in profiled.events()
        if event.name == "aten::scaled_dot_product_attention"
    }
    tokens = {query[2] for query, *_ in asked}
    assert tokens
    assert asked == {
        ((32, 2, shape.queries, 16), (32, 2, shape.keys, 16), (32, 2, shape.keys, 16), (shape.biases, 1, 1, shape.keys))
        for shape in found
        if shape.queries in tokens
    }


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_its_kernels(tmp_path: Path, make_config: Make) -> None:
    used, run_dir = [], tmp_path / "run"
    for steps, settings in ((2, []), (4, []), (6, ["engine.recompute_every=1"]), (8, ["engine.attention=flash"])):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            train(make_config(run_dir, f"steps={steps}", *settings))
        used.append(any(event.key == FLASH for event in profiled.key_averages()))
        stored = json.loads((run_dir / ATTENTION).read_text())
        if steps == 2:
            assert set(stored["kernels"].values()) == {"flash"}
            stored["kernels"] = dict.fromkeys(stored["kernels"], "math")
            (run_dir / ATTENTION).write_text(json.dumps(stored))
    assert set(stored["kernels"].values()) == {"math"}
    assert used == [True, False, False, True]


def test_a_start_that_is_refused_writes_nothing(tmp_path: Path, make_config: Make) -> None:
    config = make_config(tmp_path / "run", "engine.attention=cudnn", "engine.dtype=bf16", "steps=2")
    with pytest.raises(UserError, match=r"engine\.attention: cudnn does not take .* in bfloat16, biased on the CPU"):
        train(config)
    assert not (tmp_path / "run/config.yaml").exists()
    assert not (tmp_path / "run" / ATTENTION).exists()


@pytest.mark.slow
def test_what_is_compiled_and_cached_on_disk_is_bound_to_its_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    used = []
    for kernel in ("flash", "math", "flash"):
        torch.compiler.reset()
        counters.clear()
        compiled = torch.compile(F.scaled_dot_product_attention, dynamic=False, fullgraph=True)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(3):
                with using(kernel):
                    compiled(*inputs()).sum().backward()
        used.append(any(event.key == FLASH for event in profiled.key_averages()))
        assert counters["stats"]["unique_graphs"] == 1
    assert used == [True, False, True]
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("biases", [0, 1, 2])
def test_a_gpu_times_the_fused_kernels_that_take_the_shape(biases: int) -> None:
    device = torch.device("cuda", 0)
    asked = Shape(2, 8, 1101, 1101, 64, torch.bfloat16, device, biases)
    found = choose("auto", asked)
    assert found.kernel in FUSED
    assert len(found.times_ms) != 1
    assert not found.times_ms or found.kernel == fastest(found.times_ms)
    size = (2, 8, 1101, 64)
    query, key, value = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(3))
    results = {}
    for kernel in ("math", *(found.times_ms or [found.kernel])):
        with using(kernel):
            results[kernel] = F.scaled_dot_product_attention(query, key, value)
    for result in results.values():
        assert torch.allclose(result, results["math"], atol=2e-2)
