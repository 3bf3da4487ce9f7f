"""The page, as a person sees it: a real browser types a prompt and is shown what `fmscale sample` would draw."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from fmscale.distributed import free_port
from fmscale.flow.noise import draw_noise
from fmscale.pictures import Guidance
from fmscale.sample import draw_images, open_generator

CHROMIUM = shutil.which("chromium")
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
PROMPT, SEED, STEPS, GUIDANCE = "a handwritten seven", 3, 2, 4
WAIT_S = 180
SCREENSHOT = "FMSCALE_TEST_SCREENSHOT"  # a file, for those who want to see what the browser saw

pytestmark = pytest.mark.skipif(
    not CHROMIUM or not find_spec("gradio") or not find_spec("playwright"),
    reason="needs Debian's chromium and pip install 'fmscale[browser]'",
)


@pytest.fixture
def page(chain: Path) -> Iterator[Any]:
    """The page of a run beside its export, in a browser."""
    from playwright.sync_api import sync_playwright

    port = free_port()
    command = [sys.executable, "-m", "fmscale", "demo", str(chain / "run"), str(chain / "export"), "--port", str(port)]
    server = subprocess.Popen(command)
    try:
        wait_for_server(server, f"http://127.0.0.1:{port}/")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
            shown = browser.new_page(viewport={"width": 1000, "height": 1000})
            shown.set_default_timeout(1000 * WAIT_S)
            shown.goto(f"http://127.0.0.1:{port}/", wait_until="domcontentloaded")
            yield shown
            browser.close()
    finally:
        server.terminate()
        server.wait(timeout=60)


def wait_for_server(server: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        assert server.poll() is None, f"the server ended with exit code {server.returncode}"
        try:
            with urlopen(address):
                return
        except URLError:
            time.sleep(0.2)
    raise AssertionError(f"{address} does not answer")


def drawn(page: Any, place: int) -> np.ndarray:
    """The first image of one side."""
    image = page.locator(".gallery-item img, .grid-container img").nth(place)
    image.wait_for()
    with urlopen(image.get_attribute("src")) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())))


def test_a_prompt_goes_in_and_its_picture_comes_out(page: Any, chain: Path) -> None:
    page.get_by_role("button", name="draw").click()
    page.get_by_text("prompt: say what to draw").first.wait_for()  # it shows mistakes as a line
    page.get_by_label("seed").fill(str(SEED))
    page.get_by_label("number input for steps").fill(str(STEPS))
    page.get_by_label("number input for guidance").fill(str(GUIDANCE))
    page.get_by_label("prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="draw").click()
    pictures = [drawn(page, 0), drawn(page, 1)]
    if place := os.environ.get(SCREENSHOT):
        page.screenshot(path=place)
    for picture, source in zip(pictures, (chain / "run", chain / "export"), strict=True):
        generator = open_generator(source)
        side = generator.base_size * generator.patch_size * generator.vae.factor
        noise = torch.stack([draw_noise(generator.latent_shape(side, side), "sample", SEED, 0, 0)])
        told = generator, noise, PROMPT, "", Guidance(GUIDANCE), STEPS, "euler", SEED
        assert np.array_equal(picture, draw_images(*told, 1)[0])
        assert picture.std() > 1
