"""The whole chain on bundled real images, each stage through the function that its command runs.

images (handwritten digits, alone and in pairs) -> encode -> train -> sample -> export
-> the exported folder in stock diffusers -> a classifier, fitted on the real digits, reads what was drawn
"""

from __future__ import annotations

import importlib.resources
import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
import yaml
from PIL import Image

from fmscale import digits
from fmscale.config import EncodeConfig, TrainConfig, check
from fmscale.distributed import check_can_spawn, spawn, world_from_environment
from fmscale.encode import encode
from fmscale.encoders.clip import random_clip
from fmscale.encoders.vae import load_vae
from fmscale.engine.metrics import read_metrics
from fmscale.errors import UserError
from fmscale.export import export
from fmscale.log import get_logger
from fmscale.pictures import contact_sheet
from fmscale.runs import open_run
from fmscale.train import train

log = get_logger(__name__)
SEED = 0
PAIRS = 900  # of each layout, side by side and stacked
IMAGES_PER_SHARD = 1000
T5_LENGTH = 256  # zeros in T5's place, as many as the stock pipeline feeds
CAPTION_TOKENS = 16
EVALUATED_PER_DIGIT = 20
EVALUATED_PAIRS = 50  # of each layout
SOLVER_STEPS = 12  # more make no difference that the classifier sees
GUIDANCE_SCALE = 4.0


def quickstart(out: Path, nproc: int = 1) -> dict[str, Any]:
    """Run the chain and write `report.json` and `samples.png`.

    Args:
        out: folder to make.
        nproc: local ranks that train.

    Returns:
        The report.

    Raises:
        UserError: `out` exists and is not empty, or a stage refused.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; give another folder with --out, or remove it")
    if nproc > 1:
        check_can_spawn(nproc)
    clock = Clock()
    with clock.stage("images"):
        write_images(out / "images")
    with clock.stage("encode"):
        encode_config = write_encoders(out)
        encode(encode_config)
    with clock.stage("train"):
        config_path = write_train_config(out)
        run_training(config_path, nproc)
    with clock.stage("export"):
        export(open_run(out / "run"), out / "export", dtype="fp32")
    with clock.stage("evaluate"):
        results = evaluate(out)
    report = {"seconds": clock.seconds, **describe(out, nproc), **results}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    _conclude(out, report)
    return report


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block and say that it began."""
        log.info("\n== %s", name)
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)


def write_images(folder: Path) -> None:
    """Handwritten digits as image tars with captions: the training split alone, and in pairs of both layouts."""
    split = digits.load_split()
    enlarged, labels = digits.enlarge(split.train_images), split.train_labels
    random = np.random.default_rng(SEED)
    samples = [(image, digits.caption(label)) for image, label in zip(enlarged, labels, strict=True)]
    for layout in LAYOUTS.values():
        first, second = random.integers(len(labels), size=(2, PAIRS))
        captions = [layout.caption(*pair) for pair in zip(labels[first], labels[second], strict=True)]
        samples += zip(layout.join(enlarged[first], enlarged[second]), captions, strict=True)
    folder.mkdir(parents=True)
    order = random.permutation(len(samples))
    for number in range(0, len(order), IMAGES_PER_SHARD):
        _write_tar(folder, number, [samples[i] for i in order[number : number + IMAGES_PER_SHARD]])


def _write_tar(folder: Path, first: int, samples: list[tuple[np.ndarray, str]]) -> None:
    with webdataset.TarWriter(str(folder / f"{first // IMAGES_PER_SHARD:05d}.tar")) as tar:
        for offset, (pixels, caption) in enumerate(samples):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            tar.write({"__key__": f"{first + offset:09d}", "png": png.getvalue(), "txt": caption.encode()})


def write_encoders(out: Path) -> EncodeConfig:
    """Small frozen text encoders with random weights from a fixed seed, and the config that encodes with them.

    Random features tell words apart; the bundled VAE was trained by `tools/train_digits_vae.py`.
    """
    for role, width in (("clip_l", 64), ("clip_g", 96)):
        random_clip(
            out / "encoders" / role,
            width=width,
            layers=2,
            heads=4,
            projection_dim=width,
            max_length=CAPTION_TOKENS,
            seed=SEED,
        )
    data = {
        "images": str(out / "images"),
        "out": str(out / "latents"),
        "vae": str(bundled_vae()),
        "text": {
            "clip_l": {"path": str(out / "encoders" / "clip_l")},
            "clip_g": {"path": str(out / "encoders" / "clip_g")},
            "t5_length": T5_LENGTH,
        },
        "buckets_px": [[64, 64], [64, 128], [128, 64]],
        "batch": 64,
        "dtype": "fp32",
        "shard_samples": 1000,
        "workers": 0,  # such small images are decoded before a process has started
    }
    return _write_config(EncodeConfig, data, out / "encode.yaml", "encode")


def bundled_vae() -> Path:
    """Folder of the VAE that ships with the package."""
    return Path(str(importlib.resources.files("fmscale") / "assets" / "digits_vae"))


def write_train_config(out: Path) -> Path:
    """The config of the training stage: `fmscale train OUT/train.yaml run_dir=…` repeats it."""
    vae = load_vae(bundled_vae())
    data = {
        "run_dir": str(out / "run"),
        "seed": SEED,
        "steps": 700,
        "global_batch": 64,
        "micro_batch": 64,
        "data": {"path": str(out / "latents"), "workers": 1},
        "model": {
            "layers": 4,
            "heads": 4,
            "head_dim": 32,
            "latent_channels": vae.channels,
            "context_dim": 160,
            "pooled_dim": 160,
            "pos_embed_max_size": 16,
            "base_size": 64 // vae.factor // 2,
            "qk_norm": True,
        },
        "optimizer": {"lr": 2e-3, "warmup_steps": 50, "schedule": "cosine", "decay_steps": 700},
        "ema": {"decays": [0.99]},
        "engine": {"dtype": "fp32" if world_from_environment().device.type == "cpu" else "bf16"},
        "checkpoint": {"every_steps": 100, "keep": 2},
    }
    path = out / "train.yaml"
    _write_config(TrainConfig, data, path, "train")
    return path


def _write_config(kind: Any, data: dict[str, Any], path: Path, command: str) -> Any:
    """Write the keys that differ from the defaults, and return the whole config."""
    header = f"# fmscale {command} {path.name}\n"
    path.write_text(header + yaml.safe_dump(data, sort_keys=False))
    return check(kind, data, str(path))


def run_training(config_path: Path, nproc: int) -> None:
    """Train in this process, or on `nproc` local ranks.

    Raises:
        UserError: it did not come to its end.
    """
    from fmscale.config import load

    config = load(TrainConfig, config_path)
    if nproc == 1:
        train(config)
    elif code := spawn(["train", str(config_path)], nproc):
        raise UserError(f"training ended with exit code {code}; see the lines above")
    if open_run(config.run_dir, weights=None).checkpoint.step < config.steps:
        raise UserError(f"training was stopped; `fmscale train {config_path}` goes on with it")


def evaluate(out: Path) -> dict[str, Any]:
    """Draw with stock diffusers from the exported folder, and let a classifier fitted on the real digits read it."""
    from diffusers import StableDiffusion3Pipeline
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading; the next one is of drawing
    split = digits.load_split()
    classifier = digits.fit_classifier(split.train_images, split.train_labels)
    pipeline = StableDiffusion3Pipeline.from_pretrained(out / "export", low_cpu_mem_usage=False)
    pipeline = pipeline.to(world_from_environment().device)
    pipeline.set_progress_bar_config(disable=True)
    singles = np.repeat(np.arange(10), EVALUATED_PER_DIGIT)
    captions = [digits.caption(int(label)) for label in singles]
    drawn = draw(pipeline, captions, (64, 64))
    results = {"conditional_accuracy": float(np.mean(digits.read_digits(classifier, drawn) == singles))}
    shown = list(zip(drawn, captions, strict=True))[::EVALUATED_PER_DIGIT]
    for name, layout in LAYOUTS.items():
        pairs = np.random.default_rng(SEED + 1).integers(10, size=(EVALUATED_PAIRS, 2))
        captions = [layout.caption(*pair) for pair in pairs]
        drawn = draw(pipeline, captions, layout.size)
        read = np.stack([digits.read_digits(classifier, half) for half in layout.halves(drawn)], axis=1)
        results[f"{name}_accuracy"] = float(np.mean(read == pairs))
        results[f"{name}_both_accuracy"] = float(np.mean((read == pairs).all(axis=1)))
        shown += list(zip(drawn[:5], captions[:5], strict=True))
    contact_sheet([image for image, _ in shown], [caption for _, caption in shown], columns=5).save(out / "samples.png")
    return {**results, **measure_vae(classifier, split)}


def draw(pipeline: Any, captions: list[str], size: tuple[int, int]) -> np.ndarray:
    """Images that a diffusers pipeline draws of captions.

    Args:
        pipeline: a `StableDiffusion3Pipeline`.
        captions: one for each image.
        size: (height, width) in pixels.

    Returns:
        Shape (len(captions), height, width, 3), uint8.
    """
    images = []
    for start in range(0, len(captions), 50):
        images += pipeline(
            prompt=captions[start : start + 50],
            height=size[0],
            width=size[1],
            num_inference_steps=SOLVER_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator().manual_seed(SEED + start),
        ).images
    return np.stack([np.asarray(image) for image in images])


def measure_vae(classifier: Any, split: digits.DigitSplit) -> dict[str, float]:
    """How well the bundled VAE keeps held-out digits: PSNR in dB, and how many the classifier still reads rightly."""
    vae = load_vae(bundled_vae())
    real = digits.enlarge(split.heldout_images)
    pixels = torch.from_numpy(real).permute(0, 3, 1, 2).float() / 127.5 - 1
    again = torch.cat([vae.decode(vae.encode(part)) for part in pixels.split(60)])
    error = ((again - pixels) / 2).square().mean().item()
    images = again.add(1).div(2).permute(0, 2, 3, 1).numpy()
    accuracy = float(np.mean(digits.read_digits(classifier, images) == split.heldout_labels))
    return {"classifier_accuracy_on_real": accuracy, "vae_psnr_db": round(-10 * float(np.log10(error)), 2)}


def describe(out: Path, nproc: int) -> dict[str, Any]:
    """What trained on what, from the run's own records."""
    metrics = read_metrics(out / "run" / "metrics.jsonl")
    losses = [record["loss"] for record in metrics]
    return {
        "device": str(world_from_environment().device),
        "world_size": nproc,
        "images_seen": metrics[-1]["images_seen"],
        "train_loss_first": losses[0],
        "train_loss_last": float(np.mean(losses[-20:])),  # single steps are noisy
        "prompt_template": digits.PROMPT_TEMPLATE,
        "export": str(out / "export"),
    }


def _conclude(out: Path, report: dict[str, Any]) -> None:
    log.info(
        "\ndrawn by stock diffusers, read by a classifier: %.0f %% of single digits right "
        "(side by side %.0f %%, stacked %.0f %%), in %.0f s",
        100 * report["conditional_accuracy"],
        100 * report["side_by_side_accuracy"],
        100 * report["stacked_accuracy"],
        sum(report["seconds"].values()),
    )
    log.info("look at %s\nreport  %s", out / "samples.png", out / "report.json")
    log.info('draw    fmscale sample %s --prompt "a handwritten seven" --guidance-scale 4', out / "run")


class Layout(NamedTuple):
    """A way to put two digits into one image.

    Attributes:
        join: two arrays of images (N, 64, 64, 3) -> pairs.
        caption: two labels -> words.
        halves: pairs -> two arrays of images.
        size: (height, width) of a pair, in pixels.
    """

    join: Callable[..., np.ndarray]
    caption: Callable[[int, int], str]
    halves: Callable[[np.ndarray], list[np.ndarray]]
    size: tuple[int, int]


LAYOUTS = {
    "side_by_side": Layout(
        digits.side_by_side, digits.side_by_side_caption, lambda images: np.split(images, 2, axis=2), (64, 128)
    ),
    "stacked": Layout(digits.stacked, digits.stacked_caption, lambda images: np.split(images, 2, axis=1), (128, 64)),
}
