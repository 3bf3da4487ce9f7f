"""Tars that the real img2dataset wrote, in an environment of its own, from a web server full of all kinds of images."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from range_server import serving
from sklearn.datasets import load_sample_images

from fmscale import inputs
from fmscale.cli import main
from fmscale.config import EncodeConfig, check
from fmscale.data import reasons
from fmscale.data.images import load_image, looks_padded
from fmscale.data.index import Index
from fmscale.data.sources import SourceImage
from fmscale.encode import encode
from fmscale.engine.metrics import read_metrics
from fmscale.quickstart import write_encoders, write_train_config

pytestmark = pytest.mark.slow
VERSION = "img2dataset==1.47.0"
PYTHON = ">=3.10,<3.13"  # it imports imghdr, which later ones lack
SOUND = 260
PER_TAR = 60
VAE_FACTOR = 8
COLUMNS = ["aesthetic", "synthetic"]


@pytest.fixture(scope="module")
def img2dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its program; installed once and kept, or the reason why it cannot be."""
    if not (uv := shutil.which("uv")):
        pytest.skip("uv, which makes an environment for img2dataset, is not installed")
    folder = Path(request.config.cache.mkdir("img2dataset"))
    program, stamp = folder / "venv" / "bin" / "img2dataset", folder / VERSION
    if not stamp.exists():
        for command in (
            ["venv", "--quiet", "--clear", "--python", PYTHON, folder / "venv"],
            ["pip", "install", "--quiet", "--python", folder / "venv" / "bin" / "python", VERSION],
        ):
            elsewhere = tmp_path_factory.mktemp(
                "uv"
            )  # here, uv would hold it to the versions that fmscale was tried with
            done = subprocess.run([uv, *command], capture_output=True, text=True, timeout=300, cwd=elsewhere)
            if done.returncode:
                pytest.skip(f"{VERSION} cannot be installed: {' '.join(done.stderr.split())}")
        stamp.touch()
    return program


def save(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pictures() -> Iterator[Image.Image]:
    """Crops of two photographs, and gradients with noise, of many shapes."""
    random = np.random.default_rng(0)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in range(SOUND):
        short, aspect = int(random.integers(110, 220)), float(random.uniform(1, 2.6))
        size = (short, int(short * aspect)) if number % 2 else (int(short * aspect), short)
        if number % 4 < 2:
            left, top = (int(random.integers(room)) for room in (640 - size[0], 427 - min(size[1], 420)))
            yield photographs[number % 2].crop((left, top, left + size[0], top + size[1]))
        else:
            ramp = np.linspace(0, 200, size[0])[None, :, None] * random.uniform(0, 1, 3)
            yield Image.fromarray((ramp + random.uniform(0, 50, (size[1], size[0], 3))).astype(np.uint8))


def turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 8
    return save(image.transpose(Image.Transpose.ROTATE_270), "JPEG", exif=exif)


def sixteen_bits(image: Image.Image) -> bytes:
    return save(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")


FORMS: list[Callable[[Image.Image], bytes]] = [
    lambda image: save(image, "JPEG"),
    lambda image: save(image.convert("L"), "JPEG"),
    lambda image: save(image.convert("CMYK"), "JPEG"),
    lambda image: save(image, "JPEG", progressive=True, quality=60),
    lambda image: save(image, "PNG"),
    lambda image: save(image.convert("RGBA"), "PNG"),
    lambda image: save(image.convert("LA"), "PNG"),
    lambda image: save(image.quantize(50), "PNG"),
    lambda image: save(image.convert("1"), "PNG"),
    lambda image: save(image, "WEBP"),
    lambda image: save(image, "GIF", save_all=True, append_images=[image.rotate(180)]),
    lambda image: save(image, "BMP"),
    lambda image: save(image, "TIFF", compression="tiff_lzw"),
    turned,
    sixteen_bits,
]


def broken() -> dict[str, tuple[bytes, str]]:
    """Files that cannot be used, each with its reason."""
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    flipped = bytearray(save(noise, "PNG"))
    flipped[len(flipped) // 2] ^= 255
    return {
        "page": (b"<!DOCTYPE html><title>404</title>" * 9, reasons.NOT_AN_IMAGE),
        "drawing": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', reasons.NOT_AN_IMAGE),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", reasons.NOT_AN_IMAGE),
        "cut_jpeg": (save(noise, "JPEG")[:-4000], reasons.TRUNCATED),
        "cut_png": (save(noise, "PNG")[:-4000], reasons.TRUNCATED),
        "cut_webp": (save(noise, "WEBP")[:-4000], reasons.BROKEN),
        "flipped_png": (bytes(flipped), reasons.BROKEN),
        "no_end_of_header": (save(noise, "PNG")[:20], reasons.TRUNCATED),
        "bomb": (save(Image.new("1", (12_000, 12_000)), "PNG"), reasons.TOO_MANY_PIXELS),
        "floats": (save(Image.new("F", (128, 128)), "TIFF"), reasons.UNKNOWN_RANGE),
        "icon": (save(noise.resize((16, 16)), "PNG"), reasons.TOO_SMALL),
        "banner": (save(noise.resize((900, 100)), "JPEG"), reasons.TOO_LONG),
    }


class Web:
    """A folder of files to serve, and what is said of each."""

    def __init__(self, folder: Path):
        self.folder, self.rows = folder, list[dict[str, Any]]()
        self.sizes: dict[str, tuple[int, int]] = {}
        folder.mkdir()

    def add(self, name: str, data: bytes, caption: str, **columns: Any) -> None:
        (self.folder / name).write_bytes(data)
        row = {"url": name, "caption": caption, "synthetic": f"ai {name}", "aesthetic": 6.0}
        self.rows.append(row | columns)

    def fetch(self, program: Path, out: Path, *options: str) -> Path:
        """What img2dataset makes of it."""
        with serving(self.folder) as server:
            rows = [row | {"url": f"{server.url}/{row['url']}"} for row in self.rows]
            table = out.with_suffix(".jsonl")
            table.write_text("".join(json.dumps(row) + "\n" for row in rows))
            command = [program, table, f"--output_folder={out}", "--input_format=jsonl", "--caption_col=caption"]
            command += ["--output_format=webdataset", f"--save_additional_columns={COLUMNS}", "--thread_count=8"]
            environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "no_proxy": "127.0.0.1"}
            done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=100, env=environment)
        assert done.returncode == 0, done.stderr
        return out


def config_of(tmp_path: Path, **settings: Any) -> EncodeConfig:
    written = write_encoders(tmp_path).model_dump(mode="json")
    return check(EncodeConfig, written | settings, "test")


def members(folder: Path, suffix: str) -> dict[str, bytes]:
    """Content of all members of tars that end so, by `TAR__KEY`."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith(suffix):
                    file = tar.extractfile(name)
                    assert file
                    found[f"{path.stem}__{name.removesuffix(suffix)}"] = file.read()
    return found


def test_what_img2dataset_fetched_is_encoded_and_what_is_broken_is_counted(img2dataset: Path, tmp_path: Path) -> None:
    web = Web(tmp_path / "web")
    for number, picture in enumerate(pictures()):
        web.add(name := f"{number:03d}", FORMS[number % len(FORMS)](picture), f"picture {number}")
        web.sizes[name] = picture.size
    refused = {}
    for name, (data, reason) in broken().items():
        web.add(name, data, "not to be seen")
        refused[name] = reason
    web.add("wordless", web.folder.joinpath("000").read_bytes(), "  ", synthetic=None)
    web.add("ugly", web.folder.joinpath("001").read_bytes(), "ugly", aesthetic=1.5)
    refused |= {"wordless": reasons.NO_CAPTION, "ugly": "aesthetic out of range"}
    options = ["--disable_all_reencoding=True", f"--number_sample_per_shard={PER_TAR}"]
    images = web.fetch(img2dataset, tmp_path / "images", *options)
    said = {key: json.loads(text) for key, text in members(images, ".json").items()}
    names = {key: meta["url"].rpartition("/")[2] for key, meta in said.items()}
    assert sorted(names.values()) == sorted(row["url"] for row in web.rows)

    config = config_of(
        tmp_path,
        images=str(images),
        captions={"txt": 1, "json.synthetic": 3},
        filters={"max_aspect": 3, "scores": {"aesthetic": {"min": 5}}},
    )
    index = encode(config)
    made = {key.partition("__")[2]: json.loads(text) for key, text in members(config.out, ".json").items()}
    assert {names[key] for key in made} == web.sizes.keys()
    for key, meta in made.items():
        width, height = web.sizes[names[key]]
        assert meta["original_size_px"] == [height, width]
        assert tuple(meta["size_px"]) == bucket_of(height, width)
        assert meta["captions"] == {"txt": f"picture {int(names[key])}", "json.synthetic": f"ai {names[key]}"}
        assert meta["caption"] == meta["captions"][meta["caption_from"]]
    drawn = sum(meta["caption_from"] == "txt" for meta in made.values()) / SOUND
    assert abs(drawn - 1 / 4) < 5 * sqrt(3 / 16 / SOUND)
    sizes = Counter(bucket_of(height, width) for width, height in web.sizes.values())
    assert {(bucket.height, bucket.width): bucket.count for bucket in index.buckets} == {
        (height // VAE_FACTOR, width // VAE_FACTOR): count for (height, width), count in sizes.items()
    }
    failures = [json.loads(line) for line in (config.out / "failures.jsonl").read_text().splitlines()]
    assert {names[failure["key"]]: failure["reason"] for failure in failures} == refused
    assert_of_use(index, tmp_path)


def assert_of_use(index: Index, folder: Path) -> None:
    """Its bytes are sound, stock webdataset reads the same samples, and a run trains on them."""
    assert main(["index", str(index.path), "--verify"]) == 0
    tars = sorted(map(str, index.path.glob("*.tar")))
    stock = {sample["__key__"]: set(sample) for sample in webdataset.WebDataset(tars, shardshuffle=False)}
    assert stock.keys() == {index.key(row) for row in range(len(index))}
    assert all(members >= {"safetensors", "json"} for members in stock.values())
    write_train_config(folder)
    settings = [f"data.path={index.path}", "steps=3", "global_batch=16", "micro_batch=16", "engine.dtype=fp32"]
    assert main(["train", str(folder / "train.yaml"), f"run_dir={folder / 'run'}", *settings]) == 0
    assert [record["step"] for record in read_metrics(folder / "run" / "metrics.jsonl")] == [1, 2, 3]


def bucket_of(height: int, width: int) -> tuple[int, int]:
    """Of the three: nearest in the logarithm of the aspect ratio means that the border lies at the root of 2."""
    return (128, 64) if height > sqrt(2) * width else (64, 128) if width > sqrt(2) * height else (64, 64)


def test_what_img2dataset_padded_is_seen(img2dataset: Path, tmp_path: Path) -> None:
    """In its json, and in the pixels alone."""
    web = Web(tmp_path / "web")
    for number, picture in enumerate(pictures()):
        if number < 60:
            square = min(picture.size)
            web.add(f"{number:03d}", FORMS[0](picture if number % 3 else picture.crop((0, 0, square, square))), "x")
            web.sizes[f"{number:03d}"] = (square, square) if number % 3 == 0 else picture.size
    images = web.fetch(img2dataset, tmp_path / "images", "--image_size=128")
    prepare = inputs.preparation(config_of(tmp_path, images=str(images))).prepare
    seen = []
    for unit in inputs.open_units(config_of(tmp_path, images=str(images))):
        for source in unit.read():
            assert isinstance(source, SourceImage)
            width, height = web.sizes[source.meta["url"].rpartition("/")[2]]
            assert prepare(source)[0].padded == (abs(width - height) > 0.02 * height)
            if max(width, height) > 1.1 * min(width, height) or width == height:
                assert looks_padded(load_image(source.data, 10**6).image) == (width != height)
                seen.append(width == height)
    assert Counter(seen)[True] == 20
    assert len(seen) > 50
