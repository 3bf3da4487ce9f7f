"""Captions -> Conditioning, through frozen text encoders, exactly as diffusers' pipelines of SD3 and FLUX compute it.

1. `load_text_encoders`  networks and their tokenizers, each for one of the roles clip_l, clip_g, t5
2. `TextEncoders`        captions -> features by name, which are what a dataset stores
3. `assemble`            features, fresh or stored -> `Conditioning`, which is what the network takes
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fmscale.batch import COUNT, Conditioning
from fmscale.encoders.clip import PAD_TOKENS, clip_tokenizer, from_open_clip, load_open_clip
from fmscale.encoders.weights import load_pretrained, read_config, weight_files
from fmscale.errors import UserError
from fmscale.files import sha256

Pipeline = Literal["sd3", "flux"]
CLIP_ROLES = ("clip_l", "clip_g")
ROLES = (*CLIP_ROLES, "t5")
TRIM_TOKENS = 32  # what `trim` leaves is a multiple of this, so that shapes are few
MODEL_TYPES = {"clip_l": ("clip_text_model", "clip"), "clip_g": ("clip_text_model", "clip"), "t5": ("t5",)}


@dataclass(frozen=True)
class TextEncoder:
    """One frozen text encoder.

    Attributes:
        role: clip_l, clip_g or t5.
        model: `CLIPTextModelWithProjection`, for FLUX `CLIPTextModel`, or `T5EncoderModel`; in evaluation mode.
        tokenizer: its tokenizer.
        max_length: tokens L that every caption is padded or cut to.
        files: the weight files that it was read from.
        pipeline: whose features it computes.
    """

    role: str
    model: Any
    tokenizer: Any
    max_length: int
    files: tuple[Path, ...]
    pipeline: Pipeline = "sd3"

    @torch.no_grad()
    def encode(self, captions: list[str]) -> dict[str, Tensor]:
        """Features of B captions: tokens (B, L, d) under the role's name and, of CLIP, `ROLE_pooled` (B, p).

        As in the pipelines, CLIP's tokens are the last layer's input, T5 sees its padding, and long captions are cut.
        Of CLIP, FLUX takes no tokens, and what is pooled before the projection.
        """
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        ids = tokens.input_ids.to(self.model.device)
        if self.role == "t5":
            return {"t5": self.model(ids).last_hidden_state.to(self.model.dtype)}
        if self.pipeline == "flux":
            return {f"{self.role}_pooled": self.model(ids).pooler_output}
        output = self.model(ids, output_hidden_states=True)
        return {self.role: output.hidden_states[-2], f"{self.role}_pooled": output.text_embeds}

    def count(self, captions: list[str]) -> list[int]:
        """Tokens that each caption has, the start and end tokens among them, whether or not they all fit."""
        return [len(ids) for ids in self.tokenizer(captions, verbose=False).input_ids]

    def save(self, folder: Path | str, tokenizer_folder: Path | str | None = None) -> None:
        """Write the model, and the tokenizer beside it or in a folder of its own, as transformers reads them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(tokenizer_folder or folder)

    def identity(self) -> dict[str, Any]:
        """What makes two sets of features the same kind: the shape of the tokens and the digest of the weight files."""
        return {"max_length": self.max_length, "width": self.model.config.hidden_size, "sha256": sha256(*self.files)}


class TextEncoders:
    """The text encoders of a model, each with its role."""

    def __init__(self, encoders: Iterable[TextEncoder]) -> None:
        """Take at most one encoder per role.

        Raises:
            UserError: a role is given twice, or the two CLIP encoders disagree about the length of a caption.
        """
        given = sorted(encoders, key=lambda encoder: ROLES.index(encoder.role))
        self.by_role = {encoder.role: encoder for encoder in given}
        if len(self.by_role) < len(given):
            raise UserError(f"a text encoder role is given twice: {', '.join(encoder.role for encoder in given)}")
        lengths = {self.by_role[role].max_length for role in CLIP_ROLES if role in self.by_role}
        if len(lengths) > 1:
            raise UserError(f"clip_l and clip_g must take equally many tokens, not {' and '.join(map(str, lengths))}")

    def encode(self, captions: list[str], counted: bool = False) -> dict[str, Tensor]:
        """Features of B captions by name, batch first: what a dataset stores and `assemble` takes.

        Args:
            captions: at least one; the empty caption is one too.
            counted: tell how many tokens each caption has, too.

        Returns:
            `clip_l`, `clip_g`, `t5` (B, L, d) and `clip_l_pooled`, `clip_g_pooled` (B, p), for the roles given, each
            in its model's dtype and on its device; for FLUX `t5` and `clip_l_pooled`. Counted, also `ROLE_count` (B,),
            int64, of each role that has tokens.
        """
        features: dict[str, Tensor] = {}
        for role, encoder in self.by_role.items():
            features |= encoder.encode(captions)
            if counted and role in features:
                features[role + COUNT] = torch.tensor(encoder.count(captions), device=features[role].device)
        return features

    def count(self, captions: list[str]) -> dict[str, list[int]]:
        """By role, the tokens that each caption has before it is cut."""
        return {role: encoder.count(captions) for role, encoder in self.by_role.items()}

    def identity(self) -> dict[str, Any]:
        """The encoders' identities by role, to be written into a dataset's manifest."""
        return {role: encoder.identity() for role, encoder in self.by_role.items()}

    def save(self, role: str, folder: Path | str, tokenizer_folder: Path | str | None = None) -> None:
        """Write one role's model and tokenizer as transformers folders: one folder, or two as in a pipeline."""
        self.by_role[role].save(folder, tokenizer_folder)


def load_text_encoders(
    sources: Mapping[str, Mapping[str, Any] | None],
    t5_length: int = 256,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    clip_length: int | None = None,
    pipeline: Pipeline = "sd3",
) -> TextEncoders:
    """The text encoders of a model.

    Args:
        sources: by role, what `load_text_encoder` takes by the names path, tokenizer, open_clip and checkpoint; None
            where a role is empty.
        t5_length: tokens per caption of T5.
        device: where they compute.
        dtype: in which they compute.
        clip_length: tokens per caption of CLIP; None for as many as the tokenizers say.
        pipeline: whose features they compute.

    Returns:
        The frozen encoders.

    Raises:
        UserError: as `load_text_encoder` and `TextEncoders`.
    """
    given = {role: source for role, source in sources.items() if source is not None}
    return TextEncoders(
        load_text_encoder(
            role,
            **source,
            t5_length=t5_length,
            clip_length=clip_length,
            pipeline=pipeline,
            device=device,
            dtype=dtype,
        )
        for role, source in given.items()
    )


def reopen_text_encoders(
    made_by: Mapping[str, Any],
    moved: Mapping[str, str],
    option: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TextEncoders:
    """The text encoders that made a dataset.

    Args:
        made_by: what its manifest says about its making.
        moved: folders by role, where they are no longer where they were.
        option: how the user gives such a folder; followed by ROLE=DIR.
        device: where they compute.
        dtype: in which they compute.

    Raises:
        UserError: one is gone, or is another than the one that made the dataset.
    """
    text = load_text_encoders(
        find_text_encoders(made_by, moved, option),
        made_by["t5_length"],
        device,
        dtype,
        clip_length=made_by.get("clip_length"),
        pipeline=made_by.get("pipeline", "sd3"),
    )
    for role, identity in text.identity().items():
        made = made_by["text"].get(role, {})
        if identity["sha256"] not in (made.get("sha256"), made.get("copy_sha256")):
            raise UserError(
                f"{role}: the weights are not those that made the dataset; give its folder: {option}{role}=DIR"
            )
    return text


def find_text_encoders(made_by: Mapping[str, Any], moved: Mapping[str, str], option: str) -> dict[str, dict[str, Any]]:
    """What `load_text_encoders` takes for those that made a dataset; arguments as of `reopen_text_encoders`.

    Raises:
        UserError: one is gone.
    """
    sources = {role: made["source"] for role, made in made_by["text"].items()}
    for role, folder in moved.items():
        sources[role] = _moved(Path(folder), sources.get(role, {}))
    for role, source in sources.items():
        place = source.get("path") or source.get("checkpoint") or ""
        if not Path(place).exists():
            raise UserError(f"{place}: {role} of the dataset is no longer there; give its folder: {option}{role}=DIR")
    return sources


def _moved(place: Path, source: Mapping[str, Any]) -> dict[str, Any]:
    """The source of a text encoder that has moved: a folder, its tokenizer beside it where it was; or a checkpoint."""
    if source.get("open_clip"):
        return {**source, "checkpoint": str(place)}
    tokenizer = source.get("tokenizer")
    if tokenizer and not Path(tokenizer).exists():
        tokenizer = str(place.parent / Path(tokenizer).name)
    return {"path": str(place), "tokenizer": tokenizer}


def load_text_encoder(
    role: str,
    path: Path | str | None = None,
    *,
    tokenizer: Path | str | None = None,
    open_clip: str | None = None,
    checkpoint: Path | str | None = None,
    t5_length: int = 256,
    clip_length: int | None = None,
    pipeline: Pipeline = "sd3",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TextEncoder:
    """A text encoder from files on this machine: a transformers folder, or an open_clip checkpoint.

    Args:
        role: clip_l, clip_g or t5.
        path: a transformers folder.
        tokenizer: the tokenizer's folder, where it is not in `path`.
        open_clip: instead of `path`, an open_clip model by name, such as ViT-bigG-14.
        checkpoint: that model's weights, a .safetensors file.
        t5_length: tokens per caption of T5.
        clip_length: of CLIP; None for as many as its tokenizer says.
        pipeline: whose features it computes.
        device: where it computes.
        dtype: in which it computes, whatever the files hold.

    Returns:
        The frozen encoder.

    Raises:
        UserError: an unknown role, or files that are missing, damaged, pickled or of another kind of model.
    """
    if role not in ROLES:
        raise UserError(f"text encoder role {role!r} is none of {', '.join(ROLES)}")
    if bool(path) == bool(open_clip) or bool(open_clip) != bool(checkpoint):
        raise UserError(f"{role}: give either `path`, or `open_clip` (a model's name) and its `checkpoint`")
    if open_clip and checkpoint:
        model, words, files = _from_checkpoint(role, open_clip, Path(checkpoint), pipeline, dtype)
    else:
        folder = Path(path or "")
        files = _checked_files(role, folder)
        model = _load_model(role, folder, pipeline, dtype)
        words = _load_tokenizer(role, Path(tokenizer) if tokenizer else folder)
    if role in CLIP_ROLES:
        limit, words.model_max_length = model.config.max_position_embeddings, clip_length or words.model_max_length
        if words.model_max_length > limit:
            whose = "clip_length" if clip_length else "its tokenizer's model_max_length"
            raise UserError(
                f"{path or checkpoint}: {role} takes {limit} tokens, {whose} is {words.model_max_length}; lower that"
            )
    model.requires_grad_(False).eval().to(device)
    return TextEncoder(role, model, words, words.model_max_length if role in CLIP_ROLES else t5_length, files, pipeline)


def _from_checkpoint(
    role: str, name: str, checkpoint: Path, pipeline: Pipeline, dtype: torch.dtype
) -> tuple[Any, Any, tuple[Path, ...]]:
    if role not in CLIP_ROLES:
        raise UserError(f"open_clip has no {role}; give a transformers folder")
    tower = load_open_clip(name, checkpoint)
    model: Any = from_open_clip(tower)
    model.to(dtype)
    tokenizer = clip_tokenizer(model.config.max_position_embeddings, PAD_TOKENS[role])
    if len(tokenizer) != model.config.vocab_size:
        raise UserError(f"open_clip's {name} has {model.config.vocab_size} tokens, not CLIP's {len(tokenizer)}")
    return model.text_model if pipeline == "flux" else model, tokenizer, (checkpoint,)


def _checked_files(role: str, folder: Path) -> tuple[Path, ...]:
    given = read_config(folder).get("model_type")
    if given not in MODEL_TYPES[role]:
        raise UserError(f"{folder}: {role} must be {MODEL_TYPES[role][0]}, config.json says {given}")
    return weight_files(folder, "model")


def _load_model(role: str, folder: Path, pipeline: Pipeline, dtype: torch.dtype) -> Any:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

    clip: Any = CLIPTextModel if pipeline == "flux" else CLIPTextModelWithProjection
    kind: Any = T5EncoderModel if role == "t5" else clip
    model, info = load_pretrained(kind, folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    absent = sorted(info["missing_keys"])  # transformers would leave these at random values
    if absent:
        raise UserError(f"{folder}: the weights lack {absent[0]}; give a folder of a whole {kind.__name__}")
    return model


def _load_tokenizer(role: str, folder: Path) -> Any:
    from transformers import CLIPTokenizer, T5Tokenizer

    files = ("tokenizer.json", "spiece.model") if role == "t5" else ("tokenizer.json", "vocab.json")
    if not any((folder / name).is_file() for name in files):
        raise UserError(f"{folder}: holds no tokenizer ({' or '.join(files)}); give its folder as `tokenizer`")
    kind = T5Tokenizer if role == "t5" else CLIPTokenizer
    return load_pretrained(kind, folder)


def assemble(features: Mapping[str, Tensor], *, context_dim: int, t5_length: int = 256) -> Conditioning:
    """What the network is told about the text: CLIP tokens, padded with zeros to T5's width, then T5 tokens.

    Without T5, pipelines feed `t5_length` zero tokens: one token that stands for so many, see `Conditioning.repeats`.
    FLUX has T5 tokens alone. Where captions are counted, tokens behind a caption's own are padding that is not seen,
    and nothing stands for an absent T5; the two CLIPs share their tokens, so the larger of their counts holds.

    Args:
        features: by name, as `TextEncoders.encode` returns them; each (B, ...).
        context_dim: token width D that the network takes.
        t5_length: zero tokens that stand for an absent T5.

    Returns:
        `context` (B, L, D) and `pooled` (B, P), in the dtype and on the device of the features.

    Raises:
        UserError: there are no CLIP features, or a width does not fit `context_dim`.

    Source: Esser et al. 2024, arXiv:2403.03206, fig. 2 and appendix.
    """
    pools = [features[f"{role}_pooled"] for role in CLIP_ROLES if f"{role}_pooled" in features]
    roles = [role for role in CLIP_ROLES if role in features]
    if not pools or not (roles or "t5" in features):
        raise UserError(f"no CLIP features, which the pooled embedding needs; there are: {', '.join(features)}")
    pooled = torch.cat(pools, dim=-1)
    blocks = [block for block in (roles, ["t5"]) if features.keys() & block]
    counted = any(name.endswith(COUNT) for name in features)
    seen = torch.cat([_seen(features, block) for block in blocks], dim=1) if counted else None
    if "t5" in features and features["t5"].shape[-1] != context_dim:
        raise UserError(f"tokens of t5 are {features['t5'].shape[-1]} wide; the model's context_dim is {context_dim}")
    if not roles:
        return Conditioning(features["t5"].to(pooled.dtype), pooled, seen)
    clip = torch.cat([features[role] for role in roles], dim=-1)
    if clip.shape[-1] > context_dim:
        raise UserError(
            f"tokens of {'+'.join(roles)} are {clip.shape[-1]} wide; the model's context_dim {context_dim} is less"
        )
    clip = F.pad(clip, (0, context_dim - clip.shape[-1]))
    if "t5" not in features and seen is not None:
        return Conditioning(clip, pooled, seen)
    if "t5" not in features:
        repeats = torch.ones(clip.shape[1] + 1, dtype=torch.int64, device=clip.device)
        repeats[-1] = t5_length
        return Conditioning(F.pad(clip, (0, 0, 0, 1)), pooled, repeats)
    return Conditioning(torch.cat([clip, features["t5"].to(clip.dtype)], dim=1), pooled, seen)


def _seen(features: Mapping[str, Tensor], roles: Sequence[str]) -> Tensor:
    """1 for each caption's own tokens of these encoders, which share them, and 0 for the padding: (B, L), int64."""
    count = torch.stack([features[role + COUNT] for role in roles]).amax(dim=0)
    places = torch.arange(features[roles[0]].shape[1], device=count.device)
    return (places < count[:, None]).long()


def zeros_for(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a null of zeros says in place of these features; where tokens are counted, it has one."""
    return {
        name: torch.ones_like(value) if name.endswith(COUNT) else torch.zeros_like(value)
        for name, value in features.items()
    }


def trim(conditioning: Conditioning) -> Conditioning:
    """The same conditioning without tokens that no image sees, but for some that fill up a multiple of `TRIM_TOKENS`.

    Text has no positions, so which tokens go, and from where, makes no difference to the network.
    """
    if conditioning.repeats is None or conditioning.repeats.ndim == 1:
        return conditioning
    seen = conditioning.repeats.any(dim=0).long()
    left = min(-(-int(seen.sum()) // TRIM_TOKENS) * TRIM_TOKENS, len(seen))
    kept = seen.argsort(descending=True, stable=True)[:left].sort().values
    return Conditioning(conditioning.context[:, kept], conditioning.pooled, conditioning.repeats[:, kept])


def expand(conditioning: Conditioning) -> Conditioning:
    """The same conditioning with each token written out as often as it counts, as stock networks take it.

    Args:
        conditioning: with or without `repeats`, the same for all images.

    Returns:
        `context` of shape (B, sum of repeats, D), and no `repeats`.
    """
    if conditioning.repeats is None:
        return conditioning
    context = conditioning.context.repeat_interleave(conditioning.repeats, dim=1)
    return replace(conditioning, context=context, repeats=None)
