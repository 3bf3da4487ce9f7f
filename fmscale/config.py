"""Every setting of every program: strict, frozen records, read from YAML and `a.b=c` overrides.

A YAML file holds only differences: what it does not say comes from its one `base:` parent, then from the defaults here.
Config is data. It has no behaviour, and a key that is not listed here is an error with a suggestion.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, WrapValidator, model_validator

from fmscale.encode_config import EncodeConfig as EncodeConfig
from fmscale.errors import UserError
from fmscale.plain_yaml import parse_yaml
from fmscale.section import ConfigType, Fraction, Place, Positive, Section, check
from fmscale.section import dump as dump
from fmscale.section import flatten as flatten
from fmscale.section import flatten_schema as flatten_schema

MOST_IMAGES = 2**20  # of a step: `data.sequence` counts no further at a time
Beta = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(gt=0, lt=1)]
Width = Annotated[float, Field(gt=0, lt=0.28)]


class MixturePart(Section):
    path: Place
    """Indexed dataset: a folder or a URL."""
    weight: Annotated[float, Field(gt=0)]
    """Its share of the samples is its weight over the sum of all weights."""


class RemoteConfig(Section):
    cache: Path | None = None
    """Folder on each machine for what is fetched; null is ~/.cache/fmscale."""
    cache_gb: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Most gigabytes of each dataset's shards that are kept there."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """A request without an answer has failed after so long."""
    attempts: Positive = 6
    """How often a request is made, with pauses that double from half a second, before the run stops."""


class DataConfig(Section):
    path: Place | None = None
    """Indexed dataset: a folder of latent shards with their index, or its URL (http, https, s3, gs, az, hf)."""
    mixture: tuple[MixturePart, ...] = ()
    """Several datasets in place of `path`; each runs over its own epochs."""
    run: Positive = 1
    """Neighbouring samples that are drawn together, for storage that reads runs faster; 1 shuffles every sample."""
    max_bad_fraction: Fraction = 0.01
    """The run stops when a larger share of the images it drew was damaged; checked from 1,000 images on."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes per rank that read and decode; 0 reads in the training process."""
    text_encoders: dict[Place, Path] = Field(default={})
    """Folders by role, such as `clip_l: DIR`, of frozen text encoders that are no longer where they were; for a dataset
    that leaves captions to be encoded in training, and for `log.prompts`."""
    vae: Path | None = None
    """Folder of the frozen VAE that is no longer where it was: for a dataset of images that training encodes, and for
    `log.images_every_steps`."""
    remote: RemoteConfig = RemoteConfig()
    """How datasets behind URLs are read."""

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if (self.path is None) == (not self.mixture):
            raise ValueError("give either `path` (a dataset) or `mixture` (several), not both")
        return self


class NetworkConfig(Section):
    layers: Positive = 24
    heads: Positive = 24
    head_dim: Positive = 64
    """Width of one attention head; the model's width is heads x head_dim."""
    latent_channels: Positive = 16
    patch_size: Positive = 2
    """Latent pixels on a side of one image token."""
    context_dim: Positive = 4096
    """Width of a text token; narrower CLIP features are padded with zeros."""
    pooled_dim: Positive = 2048
    base_size: Positive = 16
    """Patches on a side of a square image at the base resolution: what is drawn unless one says otherwise."""
    leap_embed: bool = False
    """The network is told how far it is to leap, as the objectives of few steps need it (`flow.objective`)."""
    init_from: Path | None = None
    """Weights that a new run starts from: a run directory, whose averaged weights are taken; or published ones: a
    folder of diffusers (a pipeline's or a transformer's), or its name on the Hugging Face hub, or a single
    .safetensors file."""


class MMDiTConfig(NetworkConfig):
    family: Literal["mmdit"] = "mmdit"
    """Stable Diffusion 3 and 3.5, whose positions count from the base resolution."""
    pos_embed_max_size: Positive = 192
    """Patches on a side that the position grid covers."""
    position_origin: float | None = None
    """The patch of the grid with position 0, and"""
    position_step: Annotated[float, Field(gt=0)] | None = None
    """the distance of neighbours, for `init_from` weights that learned other positions; null is what base_size says."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, as SD3.5 has it; `init_from` weights without it get one."""
    dual_attention_layers: tuple[int, ...] = ()
    """Layers with a second attention over the image alone, as SD3.5-medium has it."""


class FluxConfig(NetworkConfig):
    family: Literal["flux"]
    """FLUX.1: `layers` blocks of two streams, then `single_layers` of one."""
    layers: Positive = 19
    single_layers: Positive = 38
    head_dim: Positive = 128
    pooled_dim: Positive = 768
    rope_dims: tuple[Positive, Positive, Positive] = (16, 56, 56)
    """Channels of a head that turn with each axis of position: one that images do not use, rows, columns."""
    guidance_embed: bool = False
    """The network is told how strong guidance is, as FLUX.1-dev is; in training, 1."""


def _family(given: Any) -> str:
    family = given.get("family", "mmdit") if isinstance(given, dict) else getattr(given, "family", None)
    return str(family)


ModelConfig = Annotated[
    Annotated[MMDiTConfig, Tag("mmdit")] | Annotated[FluxConfig, Tag("flux")],
    Discriminator(_family, custom_error_type="family", custom_error_message="family must be mmdit or flux"),
]


def _shift(given: Any, read: Callable[[Any], Any]) -> Any:
    """Say in one sentence what both kinds of value may be."""
    try:
        return read(given)
    except ValidationError:
        raise ValueError("give a number above 0, or sqrt, or flux") from None


Shift = Annotated[Annotated[float, Field(gt=0)] | Literal["sqrt", "flux"], WrapValidator(_shift)]


class FlowConfig(Section):
    timesteps: Literal["uniform", "logit_normal", "mode", "cosmap", "beta", "u_shaped", "steps"] = "logit_normal"
    """Row of `fmscale.flow.timesteps.TIMESTEP_SAMPLERS`; `steps`, on pairs of a teacher, distils it."""
    distill_steps: Positive = 1
    """Of `steps`: steps of the Euler sampler whose times alone are learned."""
    logit_mean: float = 0.0
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    mode_scale: Annotated[float, Field(ge=-1, le=1.7519)] = 1.29
    """Of `mode`: above 0 favours the middle of the path, below 0 its ends."""
    beta_a: Annotated[float, Field(gt=0)] = 1.5
    """Of `beta`: below 1 favours data, and"""
    beta_b: Annotated[float, Field(gt=0)] = 1.0
    """below 1 noise."""
    u_steepness: Annotated[float, Field(gt=0, le=100)] = 4.0
    """Of `u_shaped`: the ends count cosh(u_steepness / 2) times as much as the middle."""
    stratified: bool = False
    """Each of `global_batch` equal parts of the law gives one t to each step: less noise in the gradient."""
    shift: Shift = 1.0
    """Resolution shift of t, in training, in sampling and in the exported scheduler; 3.0 is the paper's at 1024 px.
    `sqrt`: of each bucket, the root of its pixels over those of `shift_base`; `flux`: FLUX's, by image tokens."""
    shift_base: Positive = 16
    """Patches on a side of a square image that `sqrt` leaves without shift; 16 are 256 px."""
    path: Literal["rectified", "cosine", "variance_preserving", "variance_exploding"] = "rectified"
    """Row of `fmscale.flow.path.PATHS`: how data turns into noise."""
    sigma: Annotated[float, Field(ge=0)] = 0.0
    """Bandwidth: standard deviation of fresh noise around the path, at all t."""
    prediction: Literal["velocity", "data", "noise"] = "velocity"
    """What the network says, and the loss compares."""
    weight: Literal["none", "snr", "min_snr", "data_end", "noise_end", "sigma_sqrt", "cosmap"] = "none"
    """Row of `fmscale.flow.weights.WEIGHTS`: how much the loss counts at each t."""
    loss: Literal["squared", "huber"] = "squared"
    """Row of `fmscale.flow.loss.LOSSES`: how an error counts."""
    huber_width: Annotated[float, Field(gt=0)] = 0.00054
    """Of `huber`: errors below count by their squares, those above by themselves."""
    snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    """Of `min_snr`: the largest ratio of signal to noise that counts."""
    coupling: Literal["independent", "paired"] = "independent"
    """`independent`: fresh noise for each sample and step. `paired`: the noise that a reflow pair was made from."""
    transport: Literal["none", "exact", "sinkhorn"] = "none"
    """Which noise of a micro-batch goes with which image: `none` as drawn; `exact`, such that their distances are
    least; `sinkhorn`, nearly so, for micro-batches of thousands. Losses then depend on world size and micro-batch."""
    transport_blur: Annotated[float, Field(gt=0)] = 0.05
    """Of `sinkhorn`: entropy is worth so many mean costs; small is near `exact`, and slow."""
    objective: Literal["velocity", "mean_flow", "shortcut"] = "velocity"
    """`velocity`: where the path goes at t. `mean_flow`, `shortcut`: where a whole stretch of it leads, for sampling in
    one step or few; both need `model.leap_embed`."""
    leap_share: Fraction = 0.25
    """Of the images in each step, how many learn to leap; the others learn the velocity."""

    @model_validator(mode="after")
    def _fit(self) -> FlowConfig:
        if self.transport != "none" and self.coupling == "paired":
            raise ValueError("`transport` gives noise to other images, and `coupling: paired` forbids that; drop one")
        if self.objective != "velocity" and (self.prediction != "velocity" or self.sigma or self.loss != "squared"):
            raise ValueError(
                f"objective {self.objective} predicts velocity, by squared error, on a path without sigma; leave "
                "prediction, loss and sigma out"
            )
        if self.timesteps == "steps" and self.coupling != "paired":
            raise ValueError("timesteps `steps` distil a teacher's pairs; set `coupling: paired` too")
        if self.objective == "shortcut" and self.leap_share == 1:
            raise ValueError(
                "a shortcut is learned from velocities; let `leap_share` be below 1, so that some images tell"
            )
        if self.prediction == "noise" and self.path in ("rectified", "cosine"):
            raise ValueError(
                f"prediction noise says nothing at t = 1 of the path {self.path}, where sampling begins; choose "
                "path variance_preserving or variance_exploding, or another prediction"
            )
        return self


class ConditioningConfig(Section):
    dropout: Fraction = 0.1
    """Share of images that train without any text; each of k encoders is dropped with probability dropout^(1/k)."""
    null: Literal["empty", "zeros"] = "empty"
    """What a dropped encoder says: the encoded empty caption, which stock pipelines feed for guidance, or zeros."""
    text: Literal["padded", "masked"] = "padded"
    """`padded`: captions are filled up to full length, and the network sees the padding, as in stock pipelines.
    `masked`: it sees each caption's own tokens alone (where those are zeros, one per encoder); flash kernels cannot do
    that. Stock pipelines must then be given text without padding, as the README.md of an export shows."""


class OptimizerConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Applied to matrices; biases, norms and tables of embeddings have none."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 does not clip."""
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    """Steps over which the learning rate rises linearly from 0."""
    decay_steps: Positive | None = None
    """Step at which a cosine schedule reaches 0; null is `steps`."""


class EmaConfig(Section):
    decays: tuple[Decay, ...] = (0.9999,)
    """One averaged copy of the weights for each; the first is the one that is sampled and exported."""
    warmup: bool = True
    """The decay at update n is at most (1 + n) / (10 + n), so that the first weights are soon forgotten."""
    sigma_rels: tuple[Width, ...] = ()
    """One more copy for each, averaged over a constant share of the time trained: the relative width of a power
    function (arXiv:2312.02696). Where `decays` is empty, the first of these is sampled and exported."""
    snapshot_every_steps: Positive | None = None
    """Copies by `sigma_rels` are kept for ever at so many steps: `export --ema-std` makes any other width from them."""

    @model_validator(mode="after")
    def _fit(self) -> EmaConfig:
        if any(len(set(values)) < len(values) for values in (self.decays, self.sigma_rels)):
            raise ValueError("each of `decays` and of `sigma_rels` must stand once")
        if self.snapshot_every_steps is not None and not self.sigma_rels:
            raise ValueError("`snapshot_every_steps` keeps what `sigma_rels` averages; give those too: [0.05, 0.1]")
        return self


class EngineConfig(Section):
    zero_stage: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO: 1 shards optimizer state and EMA, 2 gradients too, 3 weights too."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the network; weights, moments and EMA are kept in fp32."""
    offload: Literal["none", "optimizer"] = "none"
    """`optimizer` keeps fp32 weights, moments and EMA in host memory, where the update then happens: the GPU holds only
    what forward and backward need, and each step takes longer."""
    recompute_every: Annotated[int, Field(ge=0)] = 0
    """Every so many-th block forgets its activations and computes them again: less memory, more time; 0 is none."""
    recompute: tuple[str, ...] = ()
    """Parts of the other blocks that do the same, by name, for instance [mlp]; a wrong name is told the right ones."""
    compile: bool = False
    """Compile each block with torch.compile before a phase begins; that takes a minute or more for each bucket."""
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = "auto"
    """torch's attention kernel: `auto` tries at the first start which is fastest for each bucket, and keeps to it
    in later starts on such a device; `math` takes every shape, and memory for each pair of tokens."""
    fp8: bool = False
    """Matrix products of the blocks' linear layers in 8-bit floats, through torchao (`pip install fmscale[fp8]`), on
    GPUs of compute capability 8.9 or more. The losses are not quite those of bf16. Set `compile` as well: it makes
    the rounding cheap, and without it ZeRO-3 holds all weights from the forward pass to the backward pass."""
    deepspeed: dict[str, Any] = Field(default={})
    """Raw DeepSpeed settings, laid over those of fmscale, for instance {zero_optimization: {overlap_comm: false}}."""


class GuardConfig(Section):
    max_skipped_steps: Positive = 10
    """Steps in a row that may be dropped, because a gradient was not finite or the loss leapt; then the run goes back
    to the weights of its last checkpoint, and on with the data that comes next."""
    max_loss_ratio: Annotated[float, Field(gt=1)] | None = 5.0
    """A step is dropped whose loss is more than so many times what its timesteps cost as a rule; null drops none."""
    silent_s: Annotated[float, Field(ge=5)] = 60.0
    """The job ends when a rank, which says once a second where it is, has not been heard of for so long, because it was
    stopped or killed."""
    stalled_s: Annotated[float, Field(gt=0)] = 540.0
    """The job ends when no rank has moved on for so long; what compiles or reads for longer needs more."""


class CheckpointConfig(Section):
    every_steps: Positive = 1000
    keep: Positive = 3
    """Newest checkpoints that are kept."""
    keep_every_steps: Positive | None = None
    """Checkpoints of steps that this divides are kept for ever."""
    private: bool = True
    """Only you may read the files; false leaves that to your umask."""


class ValidationConfig(Section):
    path: Place
    """Indexed dataset that is held out, made as the training data was: a folder of latent shards, or its URL."""
    every_steps: Positive = 1000
    """Steps between two measurements; the last step is measured too."""
    images: Positive = 1024
    """About so many images, or all: of each bucket its share, and at least one."""


class LogConfig(Section):
    every_steps: Positive = 10
    """Steps between two writes of metrics; each step has its own line all the same."""
    tensorboard: bool = True
    """Show the numbers of each step as curves there."""
    histogram_every_steps: Positive | None = None
    """Steps between two histograms of weights and clipped gradients in TensorBoard; null is never."""
    images_every_steps: Positive | None = None
    """Steps between two sheets of images in RUN/samples and TensorBoard; null is never."""
    prompts: tuple[str, ...] = ()
    """What these images show, by the text encoders that made the dataset; none are captions of its first samples."""

    @model_validator(mode="after")
    def _are_shown(self) -> LogConfig:
        if self.histogram_every_steps is not None and not self.tensorboard:
            raise ValueError("histogram_every_steps needs tensorboard: true")
        if self.prompts and self.images_every_steps is None:
            raise ValueError("`prompts` are drawn every `images_every_steps`; give that too")
        return self


class TrainConfig(Section):
    run_dir: Path
    """Where the run lives; a run directory that holds a checkpoint is resumed."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: Positive
    """Optimizer steps."""
    global_batch: Annotated[int, Field(gt=0, le=MOST_IMAGES)]
    """Images per optimizer step, over all ranks."""
    micro_batch: Positive
    """Most images that one rank works on at once; accumulation follows from it, global_batch and the world size."""
    data: DataConfig
    model: ModelConfig = MMDiTConfig()
    flow: FlowConfig = FlowConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    engine: EngineConfig = EngineConfig()
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    validation: ValidationConfig | None = None
    """Loss on held-out images, with fixed noise and times, for the raw and the averaged weights; null is none."""
    phases: tuple[dict[str, Any], ...] = ()
    """Changes in the course of the run: `[{until_step: 1000}, {data: {path: …}, flow: {shift: 2}}]`. Each phase goes on
    with what the one before says, but for its own keys; the last ends at `steps`."""


class ReflowConfig(Section):
    teacher: Path
    """Run directory whose averaged weights generate, or the folder of a pipeline of diffusers."""
    step: Annotated[int, Field(ge=0)] | None = None
    """Its checkpoint to use, for a teacher that trains on meanwhile; null is the newest."""
    ema_std: Width | None = None
    """Relative width of the average to use, made from the run's snapshots; null is the first that it tracked."""
    data: DataConfig | None = None
    """Indexed dataset that gives captions, their features and shapes; or"""
    prompts: Path | None = None
    """a text file with one caption a line."""
    sizes_px: tuple[tuple[Positive, Positive], ...] = ()
    """Of images for `prompts`: [[height, width], …] in turns; empty is the teacher's base resolution."""
    out: Path
    """Dataset of (noise, latent) pairs to write; `train` takes it with flow.coupling=paired."""
    pairs: Positive | None = None
    """Pairs to generate, spread over the buckets as the dataset is; null is one for each line of `prompts`."""
    text: Literal["features", "captions"] = "features"
    """What a pair holds of its text: `features`, or the caption alone, which `train` then encodes itself."""
    text_encoders: dict[str, Path] = Field(default={})
    """Folders by role, such as `clip_l: DIR`, where those of the teacher's dataset have moved."""
    solver: Literal["auto", "euler", "heun", "midpoint", "rk4", "dpm", "dopri5", "leap"] = "auto"
    """Row of `fmscale.flow.solver.SOLVERS`, or `leap`; `auto` is euler, or leap for a teacher that has learned it."""
    solver_steps: Positive = 50
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """Of classifier-free guidance, 1 is none; a teacher with `guidance_embed` is told it instead."""
    batch: Positive = 16
    dtype: Literal["bf16", "fp16", "fp32"] = "fp32"
    """Storage of the generated latents."""
    shard_samples: Positive = 1000
    """Pairs in a unit of work, which a worker claims, and most in a shard."""
    claim_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """A worker on another machine that has not been heard of for so long is dead, and others take over its work."""
    rounds: Positive | None = None
    """Rounds of pairs and a student that trains on them and is the next teacher, all below `out`; null is one of pairs
    alone, in `out` itself."""
    student: dict[str, Any] = Field(default={})
    """What students train otherwise than the teacher did, such as {steps: 5000, flow: {timesteps: u_shaped}}, with
    `steps` among it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _one_source(self) -> ReflowConfig:
        if self.student and self.rounds is None:
            raise ValueError("`student` trains in `rounds`: give their number too, such as 1")
        if (self.data is None) == (self.prompts is None):
            raise ValueError("give either `data` (a dataset with captions) or `prompts` (a text file), not both")
        if self.data is not None and self.pairs is None:
            raise ValueError("`pairs`: say how many to generate from `data`")
        if self.data is not None and self.sizes_px:
            raise ValueError("`sizes_px` is for `prompts`; of `data` the dataset gives the shapes")
        return self


CONFIGS: dict[str, type[Section]] = {"train": TrainConfig, "encode": EncodeConfig, "reflow": ReflowConfig}


def read_layers(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file merged over its `base:` parents; a parent's path is relative to the file that names it."""
    if path.resolve() in seen:
        raise UserError(f"{path}: `base:` leads back to itself; break the circle")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot read the config: {reason}") from None
    data = parse_yaml(text, str(path)) or {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, this is a {type(data).__name__}")
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise UserError(f"{path}: `base:` takes the path of one YAML file, given {base!r}")
    return merge(read_layers(path.parent / base, (*seen, path.resolve())), data)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, mapping by mapping; neither is changed."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1", …]` as nested mappings; the value is read as YAML."""
    data: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        parts = name.split(".")
        if not equals or not all(parts):
            raise UserError(f"command line: {override!r} is not an override; write key=value or part.key=value")
        value = parse_yaml(text, f"command line: {name}")
        for part in reversed(parts):
            value = {part: value}
        data = merge(data, value)
    return data


def load(kind: type[ConfigType], path: str | Path, overrides: Sequence[str] = ()) -> ConfigType:
    """Read, merge and check a config.

    Args:
        kind: what it must be, such as `TrainConfig`.
        path: YAML file.
        overrides: `key=value` texts, laid over the file.

    Raises:
        UserError: one line that names the file or the command line, the key, what was given and what is allowed.
    """
    given = parse_overrides(overrides)
    return check(kind, merge(read_layers(Path(path)), given), str(path), given)


def schema(command: str) -> str:
    """JSON schema of a command's config, for editors that complete and check YAML."""
    described = CONFIGS[command].model_json_schema()
    described["properties"]["base"] = {
        "type": "string",
        "description": "YAML file, relative to this one, under this one.",
    }
    described["required"] = []  # a file may leave keys to its `base:` or to the command line
    return json.dumps(described, indent=1) + "\n"
