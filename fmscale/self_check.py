"""The proof of an export before it gets its name: diffusers alone reads it back and is asked what the run is asked.

1. the run's own network        velocities at a few t; again with its weights rounded as they are stored, and an image
2. the network in the files     the same velocities through its public class, and the image by the stock pipeline
3. each text encoder in them    features of a caption

All compute in float32, so that what the files hold shows apart from how coarsely 16 bits compute. One network is in
memory at a time, of which float32 takes as much as two copies in 16 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmscale.batch import COUNT, Conditioning
from fmscale.distributed import world_from_environment
from fmscale.encoders.text import TextEncoder, TextEncoders, assemble, expand, load_text_encoder
from fmscale.encoders.vae import Vae
from fmscale.encoders.weights import read_safetensors
from fmscale.errors import OutageError, UserError
from fmscale.flow.noise import draw_noise
from fmscale.flow.solver import Velocity, time_grid
from fmscale.log import get_logger
from fmscale.models.families import FORMS, NAMES, blueprint
from fmscale.models.published import adopt
from fmscale.objective import shift_for
from fmscale.pictures import Guidance, guided_velocity, sample_latents
from fmscale.pipelines import (
    FLUX_WIDTH,
    PIPELINES,
    Written,
    network_config,
    reads_single_files,
    scheduler_config,
    stock_classes,
)
from fmscale.runs import Run, Weights

log = get_logger(__name__)
TIMES = (0.9, 0.5, 0.1)
SIGMAS = (1.0, 0.75, 0.5, 0.25)  # before the shift
PATCHES = 16  # on a side of the image, at most
CAPTION, TOKENS = "a photograph of a dog on a beach", 64
GPU_SHARE = 0.8  # of a GPU's free memory that a network may take

# How far apart float32 may come in another order of sums: a few dozen roundings of 2^-24, as a share of the largest
# value, or of 1 where that is less. Four steps feed one another's errors.
SAME, SAME_LATENTS, SAME_LEVELS = 1e-5, 1e-4, 1.0
ROUNDINGS = 2.0  # see `rounding_bound`


class Question(NamedTuple):
    """What both are asked.

    Attributes:
        noise: shape (1, C, H, W).
        given: text of one image.
        times: of the solver.
        told: strength of guidance, to a network that is told.
    """

    noise: Tensor
    given: Conditioning
    times: list[float]
    told: float | None


class Answer(NamedTuple):
    """What one of them says.

    Attributes:
        velocities: at `TIMES`, shape (3, C, H, W).
        latents: drawn, shape (1, C, H, W).
        image: of them, shape (1, 3, height, width) in [0, 255]; None without a VAE.
    """

    velocities: Tensor
    latents: Tensor
    image: Tensor | None


def check_export(
    run: Run, weights: Weights, written: Written, vae: Vae | None, features: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """Compare what was written with the run.

    Args:
        run: that was exported.
        weights: as for `export`.
        written: what is to be checked.
        vae: the run's, where it is in the export.
        features: what the run's text encoders say of `CAPTION`, where those are in it.

    Returns:
        For each thing compared, how far apart it is and how far it may be; and what read the files.

    Raises:
        OutageError: they do not say the same.
        UserError: they do, but the dtype is too coarse for these weights.
    """
    device, question = _device(run), _question(run, features)
    question = question._replace(noise=question.noise.to(device), given=_moved(question.given, device))
    with _full_float32():
        trained, own = _ask_run(run, weights, written.dtype, question, vae)
        rounds = written.dtype != torch.float32
        rounding = {"rounding": _rounding(run, trained, own.velocities, written.dtype)} if rounds else {}
        network, reader = _read_network(run, written)
        pipeline = _read_pipeline(run, written, network)
        text = {} if features is None else dict(_read_features(run, written, pipeline))
        pipeline.register_modules(**_no_text(run))  # a GPU need not hold T5 beside the network
        stock = _ask_stock(pipeline.to(device), question)
    figures = _figures(stock, own, text, features or {})
    _judge(figures, reader)
    return _told(figures | rounding, reader)


def check_import(run: Run, network: Any) -> dict[str, Any]:
    """Compare a run that was imported with the network in the files that it comes from.

    Args:
        run: that was made.
        network: as its public class reads it.

    Returns:
        As `check_export`.

    Raises:
        OutageError: they do not say the same.
        UserError: the network says nothing finite.
    """
    device, question = _device(run), _question(run, None)
    question = question._replace(noise=question.noise.to(device), given=_moved(question.given, device))
    with _full_float32():
        _, own = _ask_run(run, "ema", torch.float32, question, None)
        stock = _ask_stock(_around(run, network.float()).to(device), question)
    figures, reader = _figures(stock, own, {}, {}), type(network).__name__
    _judge(figures, reader)
    return _told(figures, reader)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Convolutions on a GPU without TF32, to which cuDNN rounds what it multiplies unless it is told not to."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _figures(
    stock: Answer, own: Answer, text: Mapping[str, Tensor], features: Mapping[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """How far apart what was read is, and how far it may be."""
    figures = {"velocity": (_apart(stock.velocities, own.velocities), SAME)}
    figures["latents"] = (_apart(stock.latents, own.latents), SAME_LATENTS)
    if own.image is not None and stock.image is not None:
        figures["image_levels"] = (float((own.image - stock.image).abs().max()), SAME_LEVELS)
    if features:
        apart = [_apart(text[name], value) for name, value in features.items() if not name.endswith(COUNT)]
        figures["text"] = (float(torch.tensor(apart).max()), SAME)  # NaN wins, as it would not in Python's max
    return figures


def _told(figures: Mapping[str, tuple[float, float]], reader: str) -> dict[str, Any]:
    """The figures, which are shown too, as they are stored."""
    shown = ", ".join(f"{name} {value:.1e} of {bound:.1e}" for name, (value, bound) in figures.items())
    log.info("read by %s, against the run: %s", reader, shown)
    told = {name: {"difference": value, "bound": bound} for name, (value, bound) in figures.items()}
    return {"read_by": reader, **told}


def _judge(figures: Mapping[str, tuple[float, float]], reader: str) -> None:
    wrong = {name: pair for name, pair in figures.items() if not pair[0] <= pair[1]}  # NaN is apart, too
    if wrong:
        said = ", ".join(f"{name} by {value:.1e}, at most {bound:.1e}" for name, (value, bound) in wrong.items())
        raise OutageError(f"what was written does not say what the run says, read by {reader}: {said}; it was removed")


def _apart(stock: Tensor, own: Tensor) -> float:
    """The largest difference, as a share of the largest value where that is above 1."""
    return float((stock.cpu() - own.cpu()).abs().max() / own.abs().max().clamp(min=1).cpu())


def _rounding(run: Run, trained: Tensor, rounded: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """What storing weights in 16 bits does to velocities: RMS of the difference over RMS, and its bound."""
    apart, size = (value.square().mean().sqrt().item() for value in ((rounded - trained).double(), trained.double()))
    found, bound = apart / size if size else 0.0, rounding_bound(run, dtype)
    if not found <= bound:
        raise UserError(
            f"{str(dtype).removeprefix('torch.')} is too coarse for these weights: velocities move by {found:.1e} of "
            f"their size, at most {bound:.1e}; give another --dtype"
        )
    return found, bound


def rounding_bound(run: Run, dtype: torch.dtype) -> float:
    """How far rounding weights may move velocities, as a share of their size.

    Each weight moves by up to u = eps / 2 of itself, so each product does by less than u of its size, in a direction of
    its own. A token passes n of them, four in a block, which add up like a random walk: u √n. That times `ROUNDINGS`
    leaves room for what attention and gates make of it.
    """
    model = run.config.model
    blocks = model.layers + getattr(model, "single_layers", 0)
    return ROUNDINGS * torch.finfo(dtype).eps / 2 * sqrt(4 * (blocks + 1))


def _device(run: Run) -> torch.device:
    """The GPU, where the network fits on it in float32."""
    device = world_from_environment().device
    size = 4 * sum(torch.Size(shape).numel() for shape in run.checkpoint.index["parameters"].values())
    if device.type == "cuda" and size > GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def _moved(given: Conditioning, device: torch.device) -> Conditioning:
    repeats = None if given.repeats is None else given.repeats.to(device)
    return Conditioning(given.context.to(device), given.pooled.to(device), repeats)


def _question(run: Run, features: Mapping[str, Tensor] | None) -> Question:
    """A small image; where the export has no text encoders, of text that is noise, which a network cannot tell."""
    model, flow = run.config.model, run.config.flow
    side = min(model.base_size, PATCHES) * model.patch_size
    shift = shift_for(flow, model, side, side) if flow.shift == "flux" else scheduler_config(run.config)["shift"]
    if features is None:
        shapes = {"context": (1, TOKENS, model.context_dim), "pooled": (1, model.pooled_dim)}
        given = Conditioning(**{name: draw_noise(shape, "export", name) for name, shape in shapes.items()})
    else:
        given = assemble(features, context_dim=model.context_dim, t5_length=run.made_by["t5_length"])
    noise = draw_noise((1, model.latent_channels, side, side), "export")
    return Question(noise, given, time_grid(len(SIGMAS), shift), 1.0 if run.takes_guidance else None)


@torch.no_grad()
def _ask_run(
    run: Run, weights: Weights, dtype: torch.dtype, question: Question, vae: Vae | None
) -> tuple[Tensor, Answer]:
    """Velocities of the weights as they were trained, and the answer of the same weights rounded."""
    model = run.model(weights).to(question.noise.device)
    guidance = Guidance(told=question.told)
    field = guided_velocity(model, question.given, None, guidance, run.config.flow)
    trained = rounded = _velocities(field, question.noise)
    if not trained.isfinite().all():
        raise UserError(f"{run.path}: the velocity of these weights is not finite; give an earlier --step")
    if dtype != torch.float32:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        rounded = _velocities(field, question.noise)
    latents = sample_latents(model, question.noise, question.times, question.given, None, guidance)
    if vae is None:
        return trained, Answer(rounded, latents, None)
    vae.model.to(latents.device)
    return trained, Answer(rounded, latents, (vae.decode(latents) + 1) * 127.5)


def _velocities(field: Velocity, noise: Tensor) -> Tensor:
    return torch.cat([field(noise, torch.full((1,), t, device=noise.device)) for t in TIMES])


@torch.no_grad()
def _ask_stock(pipeline: Any, question: Question) -> Answer:
    """As a pipeline of diffusers answers it, with the scheduler that was exported."""
    from diffusers import FluxPipeline

    pipeline.set_progress_bar_config(disable=True)
    is_flux, noise, given = isinstance(pipeline, FluxPipeline), question.noise, _written_out(question.given)
    factor = pipeline.vae_scale_factor
    height, width = (factor * side for side in noise.shape[-2:])
    drawn: dict[str, Tensor] = {}

    def keep(pipeline: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        drawn.update(tensors)
        return tensors

    images = pipeline(
        prompt_embeds=given.context,
        pooled_prompt_embeds=given.pooled,
        latents=FluxPipeline._pack_latents(noise, *noise.shape) if is_flux else noise,
        height=height,
        width=width,
        sigmas=list(SIGMAS),
        num_inference_steps=len(SIGMAS),
        guidance_scale=1.0,
        output_type="latent" if pipeline.vae is None else "pt",
        callback_on_step_end=keep,
    ).images
    latents = drawn["latents"]
    if is_flux:
        latents = FluxPipeline._unpack_latents(latents, height, width, factor)
    ask = _flux_velocity if is_flux else _sd3_velocity
    velocities = _velocities(lambda x, t: ask(pipeline.transformer, x, t, given), noise)
    return Answer(velocities, latents, None if pipeline.vae is None else images * 255)


def _written_out(given: Conditioning) -> Conditioning:
    """Text of one image as stock networks take it: without padding that is not seen, and with each repetition."""
    if given.repeats is None or given.repeats.ndim == 1:
        return expand(given)
    return Conditioning(given.context[:, given.repeats[0] > 0], given.pooled)


def _sd3_velocity(network: Any, latents: Tensor, t: Tensor, given: Conditioning) -> Tensor:
    return network(latents, given.context, given.pooled, 1000 * t, return_dict=False)[0]


def _flux_velocity(network: Any, latents: Tensor, t: Tensor, given: Conditioning) -> Tensor:
    from diffusers import FluxPipeline

    rows, columns = (side // 2 for side in latents.shape[-2:])
    made: dict[str, Any] = {"device": latents.device, "dtype": latents.dtype}
    velocity = network(
        FluxPipeline._pack_latents(latents, *latents.shape),
        given.context,
        given.pooled,
        t,
        img_ids=FluxPipeline._prepare_latent_image_ids(1, rows, columns, **made),
        txt_ids=torch.zeros(given.context.shape[1], 3, **made),
        guidance=torch.ones_like(t) if network.config.guidance_embeds else None,
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(velocity, *latents.shape[-2:], 1)


def _read_network(run: Run, written: Written) -> tuple[Any, str]:
    """The network in the files, through its public class, made float32; and what read it."""
    _, network = stock_classes(run.config.model.family)
    folder = written.folder
    if written.form != "single":
        place = folder / "transformer" if written.form == "pipeline" else folder
        read = network.from_pretrained(place, use_safetensors=True, local_files_only=True)
        return read.float(), f"{network.__name__}.from_pretrained"
    if not reads_single_files(run.config.model):
        return _by_names(run, written, network), f"{network.__name__}, by the names of fmscale"
    read = network.from_single_file(
        str(written.file), config=str(folder), subfolder="transformer", local_files_only=True
    )
    return read.float(), f"{network.__name__}.from_single_file"


def _by_names(run: Run, written: Written, network: Any) -> Any:
    """A FLUX of another width than diffusers reads from a single file: as its class, under names that we give it."""
    log.warning("diffusers reads single files of FLUX %d wide alone; names are checked by fmscale's own", FLUX_WIDTH)
    family = run.config.model.family
    model = blueprint(family, run.config.model.model_dump())
    names = {
        name.removeprefix("model.diffusion_model."): value for name, value in read_safetensors(written.file).items()
    }
    others = ("vae.", "text_encoders.")
    state = {name: value.float() for name, value in names.items() if not name.startswith(others)}
    with torch.device("meta"):
        empty = network(**network_config(run.config.model))
    empty.load_state_dict(
        NAMES[family].to_diffusers(adopt(state, model, FORMS[family]["original"]), model), assign=True
    )
    return empty.eval()


def _read_pipeline(run: Run, written: Written, network: Any) -> Any:
    """The pipeline in the files around a network; its text encoders are read one at a time, but from a single file."""
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading
    pipeline, _ = stock_classes(run.config.model.family)
    no_text = _no_text(run)
    options = {"transformer": network, "local_files_only": True}
    if written.form == "pipeline":
        return pipeline.from_pretrained(written.folder, **no_text, **options)
    if written.form == "single":
        absent = {} if "vae" in written.parts else {"vae": None}
        if "text" in written.parts:
            no_text = _no_text(run, run.made_by["text"])
        return pipeline.from_single_file(str(written.file), config=str(written.folder), **no_text, **absent, **options)
    return _around(run, network)


def _around(run: Run, network: Any) -> Any:
    """The pipeline around a network, with nothing else in it but the run's scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline, _ = stock_classes(run.config.model.family)
    scheduler = FlowMatchEulerDiscreteScheduler(**scheduler_config(run.config))
    return pipeline(transformer=network, scheduler=scheduler, vae=None, **_no_text(run))


def _no_text(run: Run, but: Collection[str] = ()) -> dict[str, None]:
    """What a pipeline is told so that it has no text encoders, but these."""
    folders = PIPELINES[run.config.model.family].folders
    return {name: None for role, names in folders.items() if role not in but for name in names}


def _read_features(run: Run, written: Written, pipeline: Any) -> Iterator[tuple[str, Tensor]]:
    """What the text encoders in the files say of `CAPTION`, by name."""
    row, lengths = PIPELINES[run.config.model.family], run.made_by["t5_length"]
    for role in run.made_by["text"]:
        model, tokenizer = row.folders[role]
        if written.form == "pipeline":
            places: dict[str, Any] = {"path": written.folder / model, "tokenizer": written.folder / tokenizer}
            encoder = load_text_encoder(role, **places, t5_length=lengths, pipeline=row.text)
        else:
            words = getattr(pipeline, tokenizer)
            length = lengths if role == "t5" else words.model_max_length
            module = getattr(pipeline, model).eval()  # diffusers leaves T5 with its dropout
            encoder = TextEncoder(role, module, words, length, (), row.text)
        yield from encoder.encode([CAPTION]).items()


def features_of(text: TextEncoders, masked: bool) -> dict[str, Tensor]:
    """What the run's text encoders say of `CAPTION`."""
    return text.encode([CAPTION], masked)
