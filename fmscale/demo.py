"""A page on this machine that draws what one types, from one run or export, or from two side by side."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from fmscale.arguments import width
from fmscale.engine.checkpoint import find_all, step_of
from fmscale.errors import UserError
from fmscale.flow.noise import draw_noise
from fmscale.imported import is_published, read_published
from fmscale.log import get_logger
from fmscale.pictures import check_solver, default_solver, default_steps, guidance_of
from fmscale.runs import checkpoints_dir, open_run
from fmscale.sample import Generator, draw_images, open_generator, parse_roles

log = get_logger(__name__)
HOST = "127.0.0.1"  # nobody else can reach the page
NEWEST, ALONE = "newest", "as exported"
SOLVERS = ("auto", "euler", "heun", "midpoint", "rk4", "dpm", "stochastic", "leap")
MOST_IMAGES, MOST_STEPS, MOST_SIDE_PX, MOST_GUIDANCE = 16, 100, 4096, 20.0


class Asked(NamedTuple):
    """What the page was asked for.

    Attributes:
        prompt, negative_prompt: text.
        seed: of the noise.
        images: how many.
        steps: of the solver; 0 is as many as is usual.
        guidance_scale: its strength.
        solver: row of `SOLVERS`.
        height_px, width_px: of an image; 0 is the model's base resolution.
    """

    prompt: str
    negative_prompt: str
    seed: int
    images: int
    steps: int
    guidance_scale: float
    solver: str
    height_px: int
    width_px: int


class Pane:
    """One run or export, with the weights that were asked for last in memory.

    Args:
        source: its folder.
        vae: folder of the VAE, where it has moved.
        text_encoders: folders by role, likewise.

    Raises:
        UserError: it is neither.
    """

    def __init__(self, source: Path, vae: str | None, text_encoders: dict[str, str]) -> None:
        self.source, self._vae, self._text = source, vae, text_encoders
        self._loaded: tuple[str, str] | None = None
        self._generator: Generator | None = None
        if is_published(source):
            read_published(source).check_it_draws()
            self.steps, self.weights = [NEWEST], [ALONE]
            return
        run = open_run(source, weights=None)
        steps = [str(step_of(path)) for path in reversed(find_all(checkpoints_dir(source)))]
        self.steps = [NEWEST, *([] if run.is_imported else steps)]
        averages = [] if run.is_imported else [f"{each:g}" for each in run.config.ema.sigma_rels]
        self.weights = ["ema", "raw", *averages]

    def generator(self, step: str, weights: str) -> Generator:
        """The network that draws; another than before takes its place in memory.

        Raises:
            UserError: there are no such weights.
        """
        if self._generator is None or self._loaded != (step, weights):
            self._generator = self._loaded = None  # what was there makes room
            given: dict[str, Any] = {"vae": self._vae, "text_encoders": self._text}
            if self.weights != [ALONE]:
                if step not in self.steps:
                    raise UserError(f"checkpoint: one of {', '.join(self.steps)}, given {step!r}")
                given |= {"step": None if step == NEWEST else int(step), "weights": weights_of(weights)}
            self._generator, self._loaded = open_generator(self.source, **given), (step, weights)
        return self._generator

    def draw(self, step: str, weights: str, asked: Asked) -> list[Image.Image]:
        """The images that `fmscale sample` draws for the same words and numbers.

        Raises:
            UserError: it cannot be drawn so.
        """
        generator = self.generator(step, weights)
        solver = default_solver(generator.flow) if asked.solver == SOLVERS[0] else asked.solver
        check_solver(solver, generator.flow)
        side = generator.base_size * generator.patch_size * generator.vae.factor
        shape = generator.latent_shape(asked.height_px or side, asked.width_px or side)
        noise = torch.stack([draw_noise(shape, "sample", asked.seed, 0, i) for i in range(asked.images)])
        guidance = guidance_of(asked.guidance_scale, generator.takes_guidance)
        steps = asked.steps or default_steps(solver)
        words = asked.prompt, asked.negative_prompt
        drawn = draw_images(generator, noise, *words, guidance, steps, solver, asked.seed, asked.images)
        return [Image.fromarray(image) for image in drawn]


def weights_of(text: str) -> str | float:
    """What a page's field says of weights: `ema`, `raw`, or the relative width of an average.

    Raises:
        UserError: it says something else.
    """
    if text in ("ema", "raw"):
        return text
    try:
        return width(text or "")
    except argparse.ArgumentTypeError as error:
        raise UserError(f"EMA: ema, raw, or the relative width of an average, which {error}") from None


def demo_command(args: argparse.Namespace) -> None:
    """`fmscale demo`: serves the page until it is interrupted."""
    sources = [Path(args.source), *([Path(args.other)] if args.other else [])]
    page = build(_gradio(), [Pane(source, args.vae, parse_roles(args.text_encoder)) for source in sources])
    try:
        page.launch(
            server_name=HOST, server_port=args.port, share=False, quiet=True, footer_links=[], prevent_thread_lock=True
        )
    except OSError as error:
        raise UserError(f"--port: {args.port} is taken; give another") from error
    log.info("http://%s:%d shows it; Ctrl-C ends it", HOST, args.port)
    page.block_thread()


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it would tell its makers
    try:
        import gradio
    except ImportError as error:
        raise UserError("this needs the package gradio: pip install 'fmscale[demo]'") from error
    return gradio


def build(gradio: Any, panes: Sequence[Pane]) -> Any:
    """The page: what is asked for on top, and below it the images of each pane."""
    with gradio.Blocks(title="fmscale", analytics_enabled=False, fill_width=True) as page:
        prompt = gradio.Textbox("", label="prompt", autofocus=True)
        with gradio.Row():
            seed = gradio.Number(0, label="seed", precision=0, minimum=0)
            steps = gradio.Slider(0, MOST_STEPS, 0, step=1, label="steps, 0 as usual")
            guidance = gradio.Slider(0, MOST_GUIDANCE, 5, label="guidance")
            images = gradio.Slider(1, MOST_IMAGES, 1, step=1, label="images")
        with gradio.Accordion("more", open=False), gradio.Row():
            negative = gradio.Textbox("", label="negative prompt")
            solver = gradio.Dropdown(SOLVERS, value=SOLVERS[0], label="solver")
            tall = gradio.Number(0, label="height px, 0 as usual", precision=0, minimum=0, maximum=MOST_SIDE_PX)
            wide = gradio.Number(0, label="width px, 0 as usual", precision=0, minimum=0, maximum=MOST_SIDE_PX)
        button = gradio.Button("draw", variant="primary")
        asked = [prompt, negative, seed, images, steps, guidance, solver, tall, wide]
        with gradio.Row():
            for pane in panes:
                with gradio.Column():
                    gradio.Markdown(f"`{pane.source}`")
                    with gradio.Row():
                        step = gradio.Dropdown(pane.steps, value=pane.steps[0], label="checkpoint")
                        weights = gradio.Dropdown(
                            pane.weights, value=pane.weights[0], label="EMA", allow_custom_value=len(pane.weights) > 1
                        )
                    gallery = gradio.Gallery(label="images", format="png", object_fit="contain", columns=2)
                gradio.on(
                    [button.click, prompt.submit],
                    _answer(gradio, pane),
                    [step, weights, *asked],
                    gallery,
                    concurrency_limit=1,
                    concurrency_id="device",
                    api_name=False,
                )
    return page


def _answer(gradio: Any, pane: Pane) -> Callable[..., list[Image.Image]]:
    """Draws for the page, which shows a user's mistake as a line."""

    def answer(step: str, weights: str, *asked: Any) -> list[Image.Image]:
        try:
            return pane.draw(step, weights, check_asked(Asked(*asked)))
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    return answer


def check_asked(asked: Asked) -> Asked:
    """What the page's fields say, as the texts and numbers that they are; an empty field may be None.

    Raises:
        UserError: there is no prompt, or an empty or a large number.
    """
    asked = asked._replace(prompt=asked.prompt or "", negative_prompt=asked.negative_prompt or "")
    texts = asked.prompt, asked.negative_prompt
    if any("\ud800" <= char <= "\udfff" for text in texts for char in text):
        raise UserError("prompt: not UTF-8 text")
    if not asked.prompt.strip():
        raise UserError("prompt: say what to draw")
    bounds = {"seed": 2**63 - 1, "images": MOST_IMAGES, "steps": MOST_STEPS, "height_px": MOST_SIDE_PX}
    for name, most in {**bounds, "width_px": MOST_SIDE_PX}.items():
        value = getattr(asked, name)
        if not isinstance(value, (int, float)) or not 0 <= value <= most or value != int(value):
            raise UserError(f"{name}: a whole number from 0 to {most}, given {value}")
    if not isinstance(asked.guidance_scale, (int, float)) or not 0 <= asked.guidance_scale <= MOST_GUIDANCE:
        raise UserError(f"guidance: a number from 0 to {MOST_GUIDANCE:g}, given {asked.guidance_scale}")
    whole: dict[str, Any] = {name: int(getattr(asked, name)) for name in (*bounds, "width_px")}
    return asked._replace(**whole | {"images": max(whole["images"], 1)})
