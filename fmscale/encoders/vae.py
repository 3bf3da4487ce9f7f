"""Images <-> latents, through any local `AutoencoderKL` of diffusers: SD3's, FLUX's, or the quickstart's own.

Latents are the posterior's, moved and scaled so that they have about zero mean and unit variance over the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmscale.encoders.weights import load_pretrained, read_config, weight_files
from fmscale.errors import UserError
from fmscale.files import sha256
from fmscale.log import get_logger

log = get_logger(__name__)
LATENTS = "latents"  # what a dataset calls them: a mean, or one sample
FLIPPED = "latents_flipped"  # those of the mirrored image
LOG_VARIANCE = "_log_variance"  # after either name: of the posterior whose mean is stored under that name


class Posterior(NamedTuple):
    """Normal distribution of latents, each number apart from the others.

    Attributes:
        mean: of the latents.
        log_variance: natural logarithm of their variance; shape of the mean.
    """

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """The latents that standard normal noise of the mean's shape stands for, in float32."""
        return self.mean.float() + (self.log_variance.float() / 2).exp() * noise


class Vae:
    """A frozen VAE.

    Attributes:
        model: diffusers' `AutoencoderKL`, in evaluation mode.
        channels: latent channels C.
        factor: image pixels per latent pixel, along each side.
        scaling_factor: one over the standard deviation of raw latents.
        shift_factor: mean of raw latents.
    """

    def __init__(self, model: Any, files: tuple[Path, ...], memory_format: torch.memory_format) -> None:
        self.model: Any = model.requires_grad_(False).eval().to(memory_format=memory_format)
        self._memory_format = memory_format
        self.channels: int = model.config.latent_channels
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)
        self.scaling_factor: float = model.config.scaling_factor
        self.shift_factor: float = model.config.shift_factor or 0.0  # None before SD3
        self._files = files

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Posterior:
        """The latents that images may have: (z - shift_factor) * scaling_factor, where the raw z are normal.

        Args:
            images: shape (B, 3, H, W), in [-1, 1]; H and W are multiples of `factor`.

        Returns:
            Mean and logarithm of the variance, each (B, C, H / factor, W / factor), float32, on the model's device.
        """
        assert images.shape[-2] % self.factor == images.shape[-1] % self.factor == 0, images.shape
        given = images.to(self.model.device, self.model.dtype, memory_format=self._memory_format)
        raw = self.model.encode(given).latent_dist
        mean = (raw.mean.float() - self.shift_factor) * self.scaling_factor
        return Posterior(mean.contiguous(), (raw.logvar.float() + 2 * math.log(self.scaling_factor)).contiguous())

    def encode(self, images: Tensor) -> Tensor:
        """The mean of `posterior`: latents that decode to the images."""
        return self.posterior(images).mean

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents as images.

        Args:
            latents: shape (B, C, H, W), as `encode` returns them.

        Returns:
            Shape (B, 3, factor * H, factor * W), in [-1, 1], in the model's dtype and on its device.
        """
        raw = latents.to(self.model.device, self.model.dtype) / self.scaling_factor + self.shift_factor
        return self.model.decode(raw).sample.clamp(-1, 1)

    def identity(self) -> dict[str, Any]:
        """What makes two sets of latents the same kind: shape, scale, and the digest of the weight files."""
        return {
            "channels": self.channels,
            "factor": self.factor,
            "scale": self.scaling_factor,
            "shift": self.shift_factor,
            "sha256": sha256(*self._files),
        }

    def save(self, folder: Path | str) -> None:
        """Write the model as a diffusers folder, in safetensors."""
        self.model.save_pretrained(folder, safe_serialization=True)


def load_vae(
    folder: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = False,
    compile: bool = False,
    tile_px: int | None = None,
) -> Vae:
    """A VAE from a diffusers folder on this machine.

    Args:
        folder: holds config.json and diffusion_pytorch_model.safetensors, as the `vae` folder of a pipeline does.
        device: where it computes.
        dtype: in which it computes, whatever the files hold.
        channels_last: the order of numbers in memory; GPUs convolve faster so in 16 bits.
        compile: compile the encoder with torch.compile.
        tile_px: images with a longer side are taken in tiles of this side that overlap by a quarter and are blended, so
            that memory does not grow with the image; None takes them whole. Norms and attention see one tile at a time,
            so latents differ by about what the VAE loses anyway.

    Returns:
        The frozen VAE.

    Raises:
        UserError: no such folder, not an AutoencoderKL, no safetensors, weights that do not fill the model, or tiles
            that do not fit it.
    """
    from diffusers import AutoencoderKL

    folder = Path(folder)
    given = read_config(folder).get("_class_name")
    if given != "AutoencoderKL":
        raise UserError(f"{folder}: holds {given}, not AutoencoderKL; give a pipeline's vae folder")
    files = weight_files(folder, "diffusion_pytorch_model")
    model, info = load_pretrained(
        AutoencoderKL,
        folder,
        torch_dtype=dtype,
        use_safetensors=True,
        low_cpu_mem_usage=False,  # True takes another library, and warns where it is missing
        output_loading_info=True,
    )
    if info["missing_keys"]:
        raise UserError(f"{folder}: the weights lack {info['missing_keys'][0]}; download the model again")
    vae = Vae(model.to(device), files, torch.channels_last if channels_last else torch.contiguous_format)
    if tile_px is not None:
        _tile(vae, tile_px)
    if compile:
        vae.model.encoder.compile()
    return vae


def _tile(vae: Vae, tile_px: int) -> None:
    if tile_px % (4 * vae.factor):  # a quarter of a tile must be whole latent pixels, or what overlaps is not the same
        raise UserError(f"tiles of {tile_px} px: this VAE needs a multiple of {4 * vae.factor}")
    vae.model.enable_tiling()
    vae.model.tile_sample_min_size, vae.model.tile_latent_min_size = tile_px, tile_px // vae.factor


def reopen_vae(
    folder: Path,
    made: Mapping[str, Any],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    encodes: bool = False,
    **compute: Any,
) -> Vae:
    """The VAE that made a dataset.

    Args:
        folder: where it is now.
        made: its `identity` when the dataset was made.
        device, dtype: where and in which it computes.
        encodes: it is to go on making the dataset, so that another decoder too makes it another VAE.
        compute: further arguments of `load_vae`.

    Raises:
        UserError: it is another one.
    """
    vae = load_vae(folder, device, dtype, **compute)
    given = vae.identity()
    if wrong := [key for key in ("channels", "factor", "scale", "shift") if given[key] != made[key]]:
        facts = ", ".join(f"{key} {given[key]} instead of {made[key]}" for key in wrong)
        raise UserError(f"{folder}: not the VAE that made the dataset: {facts}")
    same = given["sha256"] in (made["sha256"], made.get("copy_sha256"))
    if not same and encodes:
        raise UserError(f"{folder}: the weights are not those of the dataset's VAE; give its folder")
    if not same:
        log.warning("the VAE's weights are not those that made the dataset: right for a finetuned decoder, else wrong")
    return vae
