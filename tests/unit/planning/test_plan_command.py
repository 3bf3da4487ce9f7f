"""`fmscale plan`, `submit` and `train` as a user meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from fmscale.cli import main
from fmscale.config import TrainConfig, dump, load
from fmscale.errors import UserError
from fmscale.plan import tell
from fmscale.planning import calibrate
from fmscale.planning.devices import DEVICES
from fmscale.site import Site
from fmscale.train import train

PRESET = str(Path(__file__).parents[3] / "configs" / "sd3_medium_256.yaml")
SITE = Path(__file__).parents[3] / "launch" / "sites" / "gpus.yaml"


@pytest.fixture
def config(make_config: Callable[..., TrainConfig], tmp_path: Path) -> str:
    path = tmp_path / "train.yaml"
    path.write_text(dump(make_config(tmp_path / "run")))
    return str(path)


def test_the_first_lines_are_those_of_train(
    config: str,
    make_config: Callable[..., TrainConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", logger="fmscale"):
        train(make_config(tmp_path / "run"))
    said = [record.getMessage() for record in caplog.records]
    capsys.readouterr()
    assert main(["plan", config, "--device", "cpu"]) == 0
    planned = capsys.readouterr().out.splitlines()
    assert planned[:3] == [line for line in said if line.startswith(("model ", "data ", "batch "))]
    plans = [line for line in said if line.startswith("plan ")]
    assert "GiB of a rank's memory" in plans[0]
    assert [line.split(":")[0] for line in plans[1:]] == [
        "plan     bucket 8x8",
        "plan     bucket 8x16",
        "plan     bucket 16x8",
        "plan     memory",
    ]


def test_json_holds_what_the_lines_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", PRESET, "--world-size", "64", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["device"] == "h100"
    assert sum(data["parameters"].values()) == 2_028_328_000
    assert data["gpu_hours"] == pytest.approx(data["seconds"] * 64 / 3600)
    (phase,) = data["phases"]
    assert phase["step"]["total"] * 500_000 == pytest.approx(data["seconds"])
    assert [row["world_size"] for row in data["scaling"]] == [2**power for power in range(11)]


def test_a_plot_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", PRESET, "--world-size", "64", "--plot", str(tmp_path / "plan.png")]) == 0
    with Image.open(tmp_path / "plan.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_a_price_makes_a_sum(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", PRESET, "--world-size", "64", "--price", "2.5", "--json"]) == 0
    hours = json.loads(capsys.readouterr().out)["gpu_hours"]
    assert main(["plan", PRESET, "--world-size", "64", "--price", "2.5"]) == 0
    assert f", {2.5 * hours:,.0f} at 2.5 an hour" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", ""], "--device: '' is none of"),
        (["--plot", "plan.pdf"], "--plot: plan.pdf cannot be written; give a .png"),
        (["engine.recompute=[wrong]"], "engine.recompute: the blocks have no 'wrong', only mlp, qkv"),
        (["engine.deepspeed={zero_optimization: []}"], "zero_optimization is a section"),
        (["engine.deepspeed={zero_optimization: {reduce_bucket_size: 0}}"], "from 1 on"),
        (
            ["--site", str(SITE), "engine.offload=optimizer", "site.mem_gb=1", "site.signal_delay_s=600"],
            "site.mem_gb: 1, and the ranks of a node hold",
        ),
        (["data.path=s3://nowhere/at/all"], "s3://nowhere/at/all: Install s3fs"),
        (["--device", "h1000"], "--device: 'h1000' is none of"),
        (["--rates", "nowhere.json"], "--rates: nowhere.json cannot be read"),
        (["--rates", PRESET], "is not what `fmscale plan --calibrate --json` prints"),
        (["--calibrate", "--device", "h100"], "--device: --calibrate measures"),
        (["--plot", "no/folder/plan.png"], "--plot: no/folder/plan.png cannot be written"),
        (["site.nodes=2"], "give --site SITE"),
        (["global_batch=2", "--world-size", "3"], "global_batch 2 cannot be split over 3 ranks"),
        (["micro_batch=20000", "global_batch=20000"], "of the 76.0 GiB that h100 gives"),
        (["--site", str(SITE), "site.write_gb_per_s=0.01"], "site.signal_delay_s"),
        (["engine.deepspeed={zero_optimization: {reduce_bucket_size: many}}"], "give a number of elements"),
        (["engine.deepspeed={zero_optimization: {overlap_comm: 'no'}}"], "overlap_comm is 'no'; give true or false"),
        (["engine.deepspeed={gradient_clipping: 1.0}"], "gradient_clipping is decided by fmscale's own settings"),
        (["engine.deepspeed={zero_optimization: {stage: 3}}"], "zero_optimization.stage is decided by fmscale's own"),
        (["global_batch=2000000"], "global_batch: input should be less than or equal to 1048576"),
        (["--network-gbit", "1e-300"], "--network-gbit: 1e-300; no adapter has that"),
    ],
)
def test_what_could_not_run_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", PRESET, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fmscale plan: ")
    assert said in line


def test_a_trial_measures_this_machine(
    config: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "TRIAL_S", 0.05)
    assert main(["plan", config, "--calibrate", "--json"]) == 0
    text = capsys.readouterr().out
    data = json.loads(text)
    assert data["device"] == "cpu"
    assert all(1e6 < data["rates"][name] < 1e14 for name in ("gemm", "attention", "copy", "link"))
    (tmp_path / "rates.json").write_text(text)
    assert main(["plan", config, "--device", "cpu", "--rates", str(tmp_path / "rates.json"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["seconds"] > 0
    rates = {name: rate for name, rate in data["rates"].items() if name != "source"}
    assert {name: again["rates"][name] for name in rates} == rates


def test_rates_of_a_machine_with_one_gpu_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = {"gemm": 6e14, "attention": 3e14, "copy": 2e12, "link": 0.0, "source": "measured on h100"}
    (tmp_path / "rates.json").write_text(json.dumps({"rates": rates}))
    for world_size in ("1", "16"):
        words = ["--rates", str(tmp_path / "rates.json"), "--world-size", world_size]
        assert main(["plan", PRESET, *words]) == 0
    assert "at 360 GB/s within a node" in capsys.readouterr().out  # by the data sheet


def test_rates_are_those_of_a_device_and_a_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [PRESET, "micro_batch=1", "--world-size", "8"]
    assert main(["plan", *small, "--device", "a100-40", "--json"]) == 0
    (tmp_path / "rates.json").write_text(capsys.readouterr().out)
    words = ["plan", *small, "--rates", str(tmp_path / "rates.json")]
    assert main([*words, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["device"] == "a100-40"
    assert data["usable_bytes"] == DEVICES["a100-40"].usable
    assert main([*words, "--device", "h200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "h200"
    assert main([*words, "engine.dtype=fp32"]) == 2
    assert "was measured in bf16, and engine.dtype is fp32" in capsys.readouterr().err
    (tmp_path / "rates.json").write_text(json.dumps({"rates": data["rates"] | {"gemm": True}}))
    assert main(words) == 2
    assert "is not what `fmscale plan --calibrate --json` prints" in capsys.readouterr().err


def test_a_terminal_without_blocks_is_shown_the_rest() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-m", "fmscale", "plan", PRESET]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "????" in done.stdout


def test_disk_is_that_of_all_phases(capsys: pytest.CaptureFixture[str]) -> None:
    later = "{checkpoint: {keep: 50, every_steps: 5}, log: {images_every_steps: 1}}"
    settings = ["steps=1000", "checkpoint.keep=2", "checkpoint.every_steps=100", "log.images_every_steps=100"]
    assert main(["plan", PRESET, *settings, f"phases=[{{until_step: 300}}, {later}]"]) == 0
    out = capsys.readouterr().out
    assert "51 checkpoints of" in out
    assert f", {3 + 700} sheets of samples" in out


def started_by(process: int) -> list[Path]:
    """The ranks that a process has started, each as its folder in `/proc`."""
    ranks = []
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        with suppress(OSError):  # one that ends just now
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                ranks.append(Path(f"/proc/{child}"))
    return ranks


@pytest.mark.slow
def test_a_trial_that_is_interrupted_says_so_in_a_line() -> None:
    words = [sys.executable, "-m", "fmscale", "plan", PRESET, "--calibrate", "engine.dtype=fp32"]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while len(ranks := started_by(process.pid)) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in said
    deadline = time.monotonic() + 10
    while any(rank.exists() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_interruption_waits_until_all_ranks_are_started() -> None:
    """Though threads, which computing starts, take the signal; and ranks do not hear of it."""
    reached = []

    def interrupted() -> None:
        with calibrate.interrupt_later():
            os.kill(os.getpid(), signal.SIGINT)
            child = subprocess.run(["grep", "SigBlk", "/proc/self/status"], capture_output=True, text=True, check=True)
            reached.append(int(child.stdout.split()[1], 16) >> (signal.SIGINT - 1) & 1)

    done = threading.Event()
    threading.Thread(target=done.wait).start()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    done.set()
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) == before


def test_a_site_without_gpus_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", PRESET, "--site", str(SITE.with_name("cpus.yaml")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "cpu"


def test_the_fewest_ranks_of_a_site_must_do_too(capsys: pytest.CaptureFixture[str]) -> None:
    large = ["model.layers=60", "model.heads=60", "engine.zero_stage=3", "engine.recompute_every=1", "micro_batch=1"]
    words = ["--site", str(SITE), "site.nodes=1-64", "site.device=h100", "site.signal_delay_s=3600", *large]
    assert main(["plan", PRESET, *words, "site.write_gb_per_s=1000"]) == 2
    assert "with 8 ranks: a rank needs" in capsys.readouterr().err


def test_each_phase_is_compared_with_its_own_steps(
    make_config: Callable[..., TrainConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    phases = "[{until_step: 3}, {micro_batch: 8}]"
    with caplog.at_level("INFO", logger="fmscale"):
        train(make_config(tmp_path / "run", f"phases={phases}", "log.every_steps=100", "checkpoint.every_steps=100"))
    said = [line.getMessage() for line in caplog.records if line.getMessage().startswith("plan ")]
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    begins = [number for number, line in enumerate(said) if "a rank's memory" in line]
    assert len(begins) == 2
    for phase, lines in enumerate((said[: begins[1]], said[begins[1] :])):
        named = {line.split()[2].rstrip(":") for line in lines if line.endswith("s measured")}
        assert named == {step["bucket"] for step in steps if step["phase"] == phase}


def test_submit_says_what_a_job_needs(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["submit", "train", config, "--site", str(SITE), "--dry-run", "site.device=h100", "site.nodes=2"]
    assert main(words) == 0
    script, log = capsys.readouterr()
    said = log.splitlines()
    assert any(line.startswith("batch    32 images = 16 ranks x 1 accumulation") for line in said), said
    assert any(line.startswith("plan ") and "GiB of a rank's memory" in line for line in said)
    assert script.startswith("#!")


def test_what_no_rank_can_hold_is_not_submitted() -> None:
    config = load(TrainConfig, PRESET, ["model.layers=60", "model.heads=60", "engine.zero_stage=1"])
    with pytest.raises(UserError, match="more than l4 has"):
        tell(config, load(Site, SITE, ["device=l4", "nodes=1"]))


def test_devices_are_by_the_names_that_cuda_gives() -> None:
    assert len({device.cuda_name for device in DEVICES.values()}) == len(DEVICES)
