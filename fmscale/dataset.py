"""The data of a config: opened, and checked against the model that is to learn it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmscale.batch import COUNT
from fmscale.config import DataConfig, TrainConfig
from fmscale.data.counts import counts_of
from fmscale.data.mixture import Address, Mixture, first_difference, only_appended
from fmscale.data.order import Generation
from fmscale.data.prepare import to_floats
from fmscale.data.raw import PIXELS
from fmscale.data.remote import RemoteOptions, open_index
from fmscale.data.tar import DamageError
from fmscale.distributed import world_from_environment
from fmscale.draws import POSTERIOR_NOISE
from fmscale.encoders.null import load_null, load_null_counts
from fmscale.encoders.text import ROLES, TextEncoders, assemble, reopen_text_encoders, zeros_for
from fmscale.encoders.vae import LATENTS, Vae, reopen_vae
from fmscale.errors import UserError
from fmscale.features import STORAGE

MOVED = "data.text_encoders."  # keys by which a user says where they are


@dataclass(frozen=True)
class Dataset:
    """What training needs to know of its data beside the samples.

    Attributes:
        mixture: where each sample is.
        encoders: text encoders whose features are stored.
        t5_length: T5 tokens, or zeros in their place.
        text_tokens: of a caption, as the network takes them: one that stands for many counts once.
        null: per stored text tensor, what replaces it when its encoder is dropped; with counts, where text is masked.
        generations: what was stored when, where shards were appended in mid-run; the last is what is stored now.
        online: encodes captions, where their features are not stored.
        vae: encodes images, where their latents are not stored.
    """

    mixture: Mixture
    encoders: tuple[str, ...]
    t5_length: int
    text_tokens: int
    null: dict[str, Tensor]
    generations: tuple[Generation, ...]
    online: TextEncoders | None = None
    vae: Vae | None = None

    @property
    def counted(self) -> tuple[str, ...]:
        """Text encoders whose tokens are counted, so that padding is not seen; none where it is."""
        return tuple(role for role in ROLES if role + COUNT in self.null)

    def text_of(self, tensors: Mapping[str, Tensor], captions: Sequence[str]) -> Mapping[str, Tensor]:
        """Text features of B samples by name: as they are stored, or encoded now.

        Args:
            tensors: that are stored of them, (B, ...) each.
            captions: of them, where features are not stored.
        """
        return tensors if self.online is None else self.online.encode(list(captions), bool(self.counted))

    def latents_of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Latents (B, C, H, W) of B samples, float32: as they are stored, or encoded now.

        Args:
            tensors: of them, (B, ...) each, as `draws.draw_view` gives them.
        """
        if self.vae is None:
            return tensors[LATENTS].float()
        posterior, noise = self.vae.posterior(to_floats(tensors[PIXELS])), tensors.get(POSTERIOR_NOISE)
        return posterior.mean if noise is None else posterior.sample(noise)

    @property
    def null_sha256(self) -> str:
        """Digest of the null: what is dropped must not change in mid-run either."""
        digest = hashlib.sha256()
        for name, value in sorted(self.null.items()):
            if not name.endswith(COUNT):
                digest.update(name.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """What a checkpoint says about it."""
        return {
            "path": self.mixture.name,
            "generations": [generation._asdict() for generation in self.generations],
            "null_sha256": self.null_sha256,
            "made_by": self.mixture.made_by,
        }

    def to(self, device: torch.device) -> Dataset:
        """The same dataset with its null on `device`."""
        return replace(self, null={name: value.to(device) for name, value in self.null.items()})


def open_dataset(config: TrainConfig, allow_pipe: bool = False) -> Dataset:
    """The dataset of a config, checked against the model that is to learn it.

    Args:
        config: says where it is.
        allow_pipe: programs that it names may be started.
    """
    mixture = open_mixture(config.data, allow_pipe)
    _check_latents(config, mixture)
    _check_coupling(config, mixture)
    online = open_online(config.data, mixture, bool(config.log.prompts))
    if online is None and not text_shapes(mixture):
        raise UserError(
            f"data.path: {mixture.name} holds no text features ({', '.join(ROLES)}); make it by `fmscale encode`"
        )
    masked = config.conditioning.text == "masked"
    null = open_null(mixture, config.conditioning.null, masked)
    if masked and online is None:
        _check_counts(mixture, [role for role in ROLES if role in null])
    encoders = tuple(role for role in ROLES if {role, f"{role}_pooled"} & null.keys())
    t5_length = mixture.made_by.get("t5_length", 256)
    check = assemble(
        {name: value[None] for name, value in null.items()}, context_dim=config.model.context_dim, t5_length=t5_length
    )
    if check.pooled.shape[1] != config.model.pooled_dim:
        raise UserError(
            f"model.pooled_dim: {config.model.pooled_dim}, the dataset's pooled text has {check.pooled.shape[1]}"
        )
    networks = online, open_vae(config.data, mixture)
    return Dataset(mixture, encoders, t5_length, check.context.shape[1], null, (mixture.generation(),), *networks)


def is_online(mixture: Mixture) -> bool:
    """Whether captions are left for encoding in training."""
    return bool(mixture.made_by.get("text_online"))


def open_online(config: DataConfig, mixture: Mixture, prompts: bool) -> TextEncoders | None:
    """The encoders of captions that are left for training, on the device that trains; None where features are stored.

    Args:
        config: says where they are, if they have moved.
        mixture: names them.
        prompts: they are asked for by others too.

    Raises:
        UserError: they are gone, or are not those that the dataset names.
    """
    if not is_online(mixture):
        if config.text_encoders and not prompts:
            raise UserError(f"data.text_encoders: {mixture.name} stores text features; leave that key out")
        return None
    return open_text_encoders(config, mixture)


def open_text_encoders(config: DataConfig, mixture: Mixture) -> TextEncoders:
    """The text encoders of a dataset, on the device that trains; arguments and errors as of `open_online`."""
    device = world_from_environment().device
    dtype = STORAGE[mixture.made_by["dtype"]] if device.type == "cuda" else torch.float32  # CPUs are slow in 16 bits
    return reopen_text_encoders(mixture.made_by, moved_encoders(config), MOVED, device, dtype)


def moved_encoders(config: DataConfig) -> dict[str, str]:
    """Folders by role of text encoders that are no longer where they were."""
    return {role: str(folder) for role, folder in config.text_encoders.items()}


def open_vae(config: DataConfig, mixture: Mixture) -> Vae | None:
    """The VAE of images that are left for training, on the device that trains; None where latents are stored.

    Raises:
        UserError: it is gone, or is not the one that the dataset names.
    """
    if mixture.raw is None:
        return None
    if not (folder := vae_folder(config, mixture)).is_dir():
        raise UserError(f"{folder}: the VAE of the dataset is no longer there; give its folder: data.vae=DIR")
    made = mixture.made_by
    compute = {**made["vae_compute"], "dtype": STORAGE[made["vae_compute"]["dtype"]]}
    return reopen_vae(folder, made["vae"], world_from_environment().device, encodes=True, **compute)


def vae_folder(config: DataConfig, mixture: Mixture) -> Path:
    """Where the VAE is that made a dataset that names one."""
    return config.vae or Path(mixture.made_by["vae"]["path"])


def text_shapes(mixture: Mixture) -> dict[str, tuple[int, ...]]:
    """Shapes of the text features that a sample stores, by name."""
    return {name: shape for name, (_, shape) in mixture.layout.items() if name.removesuffix("_pooled") in ROLES}


def open_null(mixture: Mixture, null: str, masked: bool = False) -> dict[str, Tensor]:
    """What replaces text features that are dropped: those of the empty caption, or zeros.

    Args:
        mixture: stores the features, or beside its shards those of the empty caption alone.
        null: `empty` or `zeros`.
        masked: padding is not seen, so the tokens of the null are counted too.

    Raises:
        UserError: the dataset does not tell what the null is.
    """
    shapes, folder = text_shapes(mixture), mixture.datasets[0].path
    if null == "zeros" and not is_online(mixture):
        features = {name: torch.zeros(shape) for name, shape in shapes.items()}
    else:
        features = load_null(folder, None if is_online(mixture) else shapes)
    roles = [role for role in ROLES if role in features] if masked else []
    if null == "zeros":
        return zeros_for(features | {role + COUNT: torch.empty(()) for role in roles})
    return features | (load_null_counts(folder, roles) if roles else {})


def open_mixture(config: DataConfig, allow_pipe: bool = False) -> Mixture:
    """The datasets that a config names.

    Args:
        config: says where they are.
        allow_pipe: programs that it names may be started.
    """
    remote = config.remote
    options = RemoteOptions(
        remote.cache, round(remote.cache_gb * 1e9), remote.timeout_s, remote.attempts, allow_pipe=allow_pipe
    )
    if config.path is not None:
        return Mixture([open_index(config.path, options)])
    datasets = [open_index(part.path, options) for part in config.mixture]
    first, *others = ((dataset.place, making(dataset.made_by or {})) for dataset in datasets)
    for path, made in others:
        if made != first[1]:
            raise UserError(
                f"data.mixture: {path} and {first[0]} were not made by the same VAE and text encoders; encode one again"
            )
    return Mixture(datasets, [part.weight for part in config.mixture])


def making(made_by: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which numbers a dataset holds for an image, whatever paths the frozen networks had.

    Args:
        made_by: what the manifest of a dataset says about its making.
    """
    text = {role: made.get("sha256") for role, made in made_by.get("text", {}).items()}
    vae = {key: value for key, value in made_by.get("vae", {}).items() if key not in ("path", "copy_sha256")}
    lengths = {name: made_by.get(name) for name in ("clip_length", "t5_length")}
    return {"vae": vae, "text": text, "pipeline": made_by.get("pipeline", "sd3"), **lengths}


def go_on(dataset: Dataset, trained_on: Mapping[str, Any], step: int, shards_file: Path, allow_append: bool) -> Dataset:
    """The dataset of a run that goes on, with what was stored when.

    Args:
        dataset: as it is now.
        trained_on: `Dataset.identity` of the run's checkpoint.
        step: of that checkpoint.
        shards_file: the run's list of shards.
        allow_append: shards may have been added; they are taken in from each bucket's next epoch on.

    Raises:
        UserError: it is not what the run was trained on; names the first shard that differs.
    """
    generations = tuple(Generation(**generation) for generation in trained_on["generations"])
    last, mixture = generations[-1], dataset.mixture
    if last.fingerprint == mixture.fingerprint:
        return replace(dataset, generations=generations)
    before = read_shards(shards_file).get(last.fingerprint)
    appended = before is not None and only_appended(before, mixture.shards())
    if before is None or not appended or not allow_append:
        what = "its fingerprint differs" if before is None else first_difference(before, mixture.shards())
        allow = "add --allow-append to take in what is new, " if appended else ""
        raise UserError(
            f"data: {mixture.name} is not what the run was trained on: {what}; {allow}put it back, or start another "
            "run_dir"
        )
    mixture.check_appended(before, last)
    return replace(dataset, generations=(*generations, mixture.generation(step)))


def read_shards(path: Path) -> dict[str, list[dict[str, str]]]:
    """The shards of each generation that a run has seen, by its fingerprint; empty where that was lost."""
    try:
        seen = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return seen if isinstance(seen, dict) else {}


def _check_latents(config: TrainConfig, mixture: Mixture) -> None:
    if mixture.channels != config.model.latent_channels:
        raise UserError(
            f"model.latent_channels: {config.model.latent_channels}, the dataset's latents have {mixture.channels}"
        )
    covered = getattr(config.model, "pos_embed_max_size", None)  # rotary positions have no end
    limit = covered * config.model.patch_size if covered else None
    for bucket in mixture.buckets:
        if bucket.height % config.model.patch_size or bucket.width % config.model.patch_size:
            raise UserError(
                f"model.patch_size: {config.model.patch_size} does not divide the dataset's bucket {bucket.name}"
            )
        if limit and max(bucket.height, bucket.width) > limit:
            raise UserError(
                f"model.pos_embed_max_size: covers {limit} latent pixels, the dataset has bucket {bucket.name}"
            )


def _check_counts(mixture: Mixture, roles: Sequence[str]) -> None:
    """Refuse a dataset whose first sample does not say how many tokens its caption has."""
    for part in range(len(mixture.datasets)):
        address = Address(part, 0)
        try:
            meta = mixture.sample(address).read_meta()
        except DamageError:
            continue  # training names it, when it comes to it
        counts_of(meta, roles, f"{mixture.key(address)} in {mixture.datasets[part].place}")


def _check_coupling(config: TrainConfig, mixture: Mixture) -> None:
    for dataset in mixture.datasets if config.flow.coupling == "paired" else ():
        if (dataset.made_by or {}).get("program") != "fmscale reflow":
            raise UserError(
                f"flow.coupling: `paired` needs a dataset made by `fmscale reflow`, {dataset.place} is none"
            )
