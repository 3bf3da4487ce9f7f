"""The settings of `fmscale encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fmscale.section import Place, Positive, Section


class TextSource(Section):
    """One text encoder: a transformers folder, or an open_clip tower by name with its local checkpoint."""

    path: Path | None = None
    """Transformers folder of a CLIP text model or a T5 encoder; or, where there is no such folder, its name on the
    Hugging Face hub: OWNER/NAME, or OWNER/NAME/FOLDER."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, where it is not in `path`, or its name likewise."""
    open_clip: str | None = None
    """Name of an open_clip model, such as ViT-bigG-14."""
    checkpoint: Path | None = None
    """Local .safetensors checkpoint of that open_clip model."""

    @model_validator(mode="after")
    def _one_source(self) -> TextSource:
        if (self.path is None) == (self.open_clip is None):
            raise ValueError("give either `path` (a transformers folder) or `open_clip` (a model's name), not both")
        if (self.open_clip is None) != (self.checkpoint is None):
            raise ValueError("`open_clip` and `checkpoint` go together")
        return self


class TextConfig(Section):
    clip_l: TextSource | None = None
    clip_g: TextSource | None = None
    t5: TextSource | None = None
    """Null: the model sees zeros in T5's place, as the stock pipeline feeds them."""
    pipeline: Literal["sd3", "flux"] = "sd3"
    """Whose features: SD3's are tokens of all encoders and CLIP's projected pooled embeddings, FLUX's are tokens of t5
    and the pooled embedding of clip_l before its projection."""
    clip_length: Positive | None = None
    """Tokens of clip_l and clip_g; null is what their tokenizers say, 77 for those of SD3 and FLUX."""
    t5_length: Positive = 256
    """Tokens of T5, or of the zeros in its place; stock pipelines use 256 for SD3 and 512 for FLUX.1-dev unless told
    otherwise."""
    online: bool = False
    """Store captions alone: `train` encodes them at every step, with the same encoders on the device that trains. Less
    disk and more time; where a GPU has room for the encoders and text would be most of what is read."""
    t5_fp8: bool = False
    """Store tokens of t5 as 8-bit floats with a scale per token: half the bytes of bf16; the error is measured, printed
    and kept in the manifest."""

    @model_validator(mode="after")
    def _fit(self) -> TextConfig:
        if self.t5_fp8 and (self.t5 is None or self.online):
            raise ValueError("`t5_fp8` stores what t5 gives; give t5, and not `online`")
        if self.pipeline == "flux" and (self.clip_l is None or self.t5 is None or self.clip_g is not None):
            raise ValueError("`pipeline: flux` takes clip_l and t5, and no clip_g")
        if self.clip_l is None and self.clip_g is None:
            raise ValueError("give clip_l or clip_g: the pooled embedding comes from them")
        return self


class ScoreRange(Section):
    min: float | None = None
    """Lower scores are refused."""
    max: float | None = None
    """Higher scores are refused."""


class FilterConfig(Section):
    min_side_px: Annotated[int, Field(ge=0)] = 0
    """Images with a shorter side are refused."""
    max_aspect: Annotated[float, Field(ge=1)] | None = None
    """Images with more of the long side over the short side are refused."""
    scores: dict[Place, ScoreRange] = Field(default={})
    """Ranges of fields of an image's json, such as `aesthetic: {min: 5}`; an image without the field is refused."""


class VaeComputeConfig(Section):
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the VAE."""
    channels_last: bool = False
    """Order of numbers in memory; GPUs convolve faster so in 16 bits."""
    compile: bool = False
    """Compile the encoder with torch.compile: a minute or more at the start, and again for new shapes."""
    tile_px: Positive | None = None
    """Images with a longer side are encoded in overlapping tiles of this side, to save memory; null takes them whole.
    A tile does not see the others, so latents differ by about what the VAE loses anyway."""


class EncodeConfig(Section):
    images: Place
    """A folder of images with a .txt or .json beside each, or with the metadata.csv or metadata.jsonl of Hugging Face's
    image folders; or WebDataset tars as img2dataset writes them: a folder, its URL, or names like `…/{000..099}.tar`.
    """
    captions: dict[Place, Annotated[float, Field(ge=0)]] = Field(default={})
    """Where captions are, and how often each is drawn: `txt: 1, json.synthetic: 3`; empty takes the one there is."""
    filters: FilterConfig = FilterConfig()
    """Which images are wanted."""
    out: Path
    """Dataset to write: latent shards and their index."""
    vae: Path
    """AutoencoderKL folder; or, where there is no such folder, its name on the Hugging Face hub."""
    text: TextConfig
    resolutions_px: Annotated[tuple[Positive, ...], Field(min_length=1)] = (256,)
    """Sides of squares: buckets have the area of one. An image goes into each that it is large enough for."""
    bucket_step_px: Positive = 64
    """Bucket sides are multiples of this."""
    max_aspect: Annotated[float, Field(ge=1)] = 2.0
    """Longest side over shortest side of the most extreme bucket."""
    buckets_px: Annotated[tuple[tuple[Positive, Positive], ...], Field(min_length=1)] | None = None
    """Explicit (height, width) pairs in place of the three keys above."""
    max_upscale: Annotated[float, Field(ge=1)] = 1.25
    """Images that would be enlarged more than so many times for a bucket do not go into it."""
    vae_compute: VaeComputeConfig = VaeComputeConfig()
    """How the VAE is run."""
    latents: Literal["mean", "sample", "posterior"] = "mean"
    """Store the mean of the VAE's posterior, one sample of it, or mean and variance: then each step of a training draws
    a sample of its own."""
    flip: bool = False
    """Store the latents of the mirrored image too: each step of a training draws one of the two. Captions that speak of
    left and right, and pictures of text, are then wrong half of the time."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Storage of latents and text features."""
    batch: Positive = 16
    """Images encoded at once."""
    shard_samples: Positive = 10_000
    """Most samples in a shard; of a folder of images, so many are one piece of work, as a tar is."""
    max_pixels: Positive = 100_000_000
    """Larger images are refused before they are decoded."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that decode images beside the encoding; 0 decodes in a thread."""
    claim_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """A worker on another machine that has not been heard of for so long is dead, and others take over its work."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _sound_captions_and_resolutions(self) -> EncodeConfig:
        for place in self.captions:
            if not place.startswith("json.") and (place.startswith(".") or "/" in place):
                raise ValueError(f"captions: {place} is no place: write an extension without its dot, or json.FIELD")
        if self.captions and not any(self.captions.values()):
            raise ValueError("captions: every weight is 0: give one of them more")
        if len(set(self.resolutions_px)) < len(self.resolutions_px):
            raise ValueError("resolutions_px: one comes twice")
        return self
