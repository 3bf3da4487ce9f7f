"""Every setting of every program: strict, frozen records, read from YAML and `a.b=c` overrides.

A YAML file holds only differences: what it does not say comes from its one `base:` parent, then from the defaults here.
Config is data. It has no behaviour, and a key that is not listed here is an error with a suggestion.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from fmscale.encode_config import EncodeConfig as EncodeConfig
from fmscale.errors import UserError
from fmscale.plain_yaml import parse_yaml
from fmscale.section import ConfigType, Fraction, Place, Positive, Section, check
from fmscale.section import dump as dump
from fmscale.section import flatten as flatten
from fmscale.section import flatten_schema as flatten_schema

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
    that leaves captions to be encoded in training."""
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
    init_from: Path | None = None
    """Published weights that a new run starts from: a folder of diffusers (a pipeline's or a transformer's), or its
    name on the Hugging Face hub, or a single .safetensors file."""


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


class FlowConfig(Section):
    timesteps: Literal["uniform", "logit_normal"] = "logit_normal"
    """Row of `fmscale.flow.timesteps.TIMESTEP_SAMPLERS`."""
    logit_mean: float = 0.0
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    shift: Annotated[float, Field(gt=0)] = 1.0
    """Resolution shift of t, in training and in the exported scheduler; 3.0 is the paper's at 1024 px."""
    coupling: Literal["independent", "paired"] = "independent"
    """`independent`: fresh noise for each sample and step. `paired`: the noise that a reflow pair was made from."""


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
    """Compile each block with torch.compile; the first step of each bucket takes a minute or more."""
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


class LogConfig(Section):
    every_steps: Positive = 10
    """Steps between two writes of metrics; each step has its own line all the same."""
    tensorboard: bool = True
    """Show the numbers of each step as curves there."""
    histogram_every_steps: Positive | None = None
    """Steps between two histograms of weights and clipped gradients in TensorBoard; null is never."""
    images_every_steps: Positive | None = None
    """Steps between two sheets of images in RUN/samples and TensorBoard; null is never."""

    @model_validator(mode="after")
    def _histograms_have_a_place(self) -> LogConfig:
        if self.histogram_every_steps is not None and not self.tensorboard:
            raise ValueError("histogram_every_steps needs tensorboard: true")
        return self


class TrainConfig(Section):
    run_dir: Path
    """Where the run lives; a run directory that holds a checkpoint is resumed."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: Positive
    """Optimizer steps."""
    global_batch: Positive
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


class ReflowConfig(Section):
    teacher: Path
    """Run directory whose EMA weights generate."""
    data: DataConfig
    """Indexed dataset that gives the text features and the shapes."""
    out: Path
    """Dataset of (noise, latent) pairs to write; `train` takes it with flow.coupling=paired."""
    pairs: Positive
    """Pairs to generate, spread over the buckets as the dataset is."""
    solver: Literal["euler", "heun"] = "euler"
    solver_steps: Positive = 50
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """Of classifier-free guidance, 1 is none; a teacher with `guidance_embed` is told it instead."""
    batch: Positive = 16
    dtype: Literal["bf16", "fp16", "fp32"] = "fp32"
    """Storage of the generated latents."""
    shard_samples: Positive = 10_000
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


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
