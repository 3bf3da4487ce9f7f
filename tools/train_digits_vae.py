"""Trains the small VAE of the quickstart on handwritten digits, and measures it on held-out ones.

The weights in fmscale/assets/digits_vae were made, in about ten minutes on one CPU core, by

    OMP_NUM_THREADS=1 python tools/train_digits_vae.py --out fmscale/assets/digits_vae --steps 2000 --seed 0

The result is a diffusers `AutoencoderKL` folder: factor 8, 4 latent channels, fp16 on disk. Pictures of one digit, and
of two side by side or stacked, pass through it. The decoder only ever sees samples of the posterior, whose width the
KL term keeps up: it leaves two channels that carry the picture and two that are nearly empty, and a decoder that
forgives errors, so that a small flow model can learn the latents.

Measured on held-out digits: PSNR 40.5 dB (pairs: side by side 42.0, stacked 31.8, where the strokes of two digits meet
at the seam); a classifier reads 0.99 of the rebuilt digits rightly, as many as of the originals.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from fmscale import digits

CHANNELS = (8, 16, 32, 40)
LATENT_CHANNELS = 4
BATCH_IMAGES = 16  # 64 x 64 pictures of one digit; half as many pictures of two
PEAK_LR = 3e-3
WARMUP_STEPS = 50


def main() -> None:
    """Train, measure what is stored, write the folder."""
    args = parse_args()
    torch.manual_seed(args.seed)
    split = digits.load_split()
    vae = build_vae()
    train(vae, digits.enlarge(split.train_images), args.steps, args.kl_weight, np.random.default_rng(args.seed))
    vae.half().float().eval()  # measure what is stored: weights rounded to fp16, arithmetic in fp32
    mean, std = latent_statistics(vae, digits.enlarge(split.train_images))
    vae.register_to_config(shift_factor=mean, scaling_factor=1 / std)
    report(vae, split)
    vae.half().to(memory_format=torch.contiguous_format).save_pretrained(args.out, safe_serialization=True)
    print(f"wrote {args.out}: {sum(file.stat().st_size for file in args.out.iterdir()) / 1e3:.0f} kB")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the quickstart's VAE on handwritten digits.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kl-weight", type=float, default=2e-3, help="per latent element, against L1 per pixel")
    return parser.parse_args()


def build_vae() -> AutoencoderKL:
    """A VAE shaped as SD3's (no quant convolutions), with few channels and no attention, so that any size passes."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=digits.SIDE_PX,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    return vae.to(memory_format=torch.channels_last)  # a quarter faster on a CPU


def train(
    vae: AutoencoderKL, images: NDArray[np.uint8], steps: int, kl_weight: float, rng: np.random.Generator
) -> None:
    """Minimise L1 plus weighted KL with AdamW: linear warm-up, then a cosine to zero."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps))
    started = time.monotonic()
    for step in range(steps):
        batch = to_tensor(draw_pictures(images, rng))
        posterior = vae.encode(batch).latent_dist
        l1 = (vae.decode(posterior.sample()).sample - batch).abs().mean()
        kl = posterior.kl().sum() / posterior.mean.numel()
        optimizer.zero_grad()
        (l1 + kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            passed_s = time.monotonic() - started
            print(f"step {step}: L1 {l1.item():.4f}, KL {kl.item():.3f} per element, {passed_s:.0f} s", flush=True)


def lr_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate at `step`."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


def draw_pictures(images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """One batch of random pictures: of one digit half of the time, else of two, side by side or stacked."""
    batch = images[rng.integers(len(images), size=BATCH_IMAGES)]
    if rng.random() < 0.5:
        return batch
    join = digits.side_by_side if rng.random() < 0.5 else digits.stacked
    return join(batch[::2], batch[1::2])


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Pictures (N, H, W, 3), uint8, as the VAE takes them: (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, images: NDArray[np.uint8]) -> tuple[float, float]:
    """Mean and standard deviation over all elements of the posterior means of `images`."""
    means = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in to_tensor(images).split(64)])
    return means.mean().item(), means.std().item()


def report(vae: AutoencoderKL, split: digits.DigitSplit) -> None:
    """Print what the VAE does to held-out pictures of each shape, and to the eyes of a classifier."""
    singles = digits.enlarge(split.heldout_images)
    classifier = digits.fit_classifier(split.train_images, split.train_labels)
    rebuilt = round_trip(vae, singles)
    print(f"latents of training digits: mean {vae.config.shift_factor:.4f}, std {1 / vae.config.scaling_factor:.4f}")
    for name, images in (("originals", singles), ("rebuilt", rebuilt)):
        right = (digits.read_digits(classifier, images) == split.heldout_labels).mean()
        print(f"classifier on held-out {name}: {right:.4f} right")
    print(f"held-out PSNR, one digit: {psnr_db(singles, rebuilt):.2f} dB")
    for join in (digits.side_by_side, digits.stacked):
        pairs = join(singles[::2], singles[1::2])
        print(f"held-out PSNR, {join.__name__}: {psnr_db(pairs, round_trip(vae, pairs)):.2f} dB")


@torch.no_grad()
def round_trip(vae: AutoencoderKL, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures encoded to the posterior mean and decoded."""
    decoded = [vae.decode(vae.encode(chunk).latent_dist.mean).sample for chunk in to_tensor(images).split(64)]
    pixels = ((torch.cat(decoded).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()


def psnr_db(images: NDArray[np.uint8], rebuilt: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio over all pixels together."""
    error = (images.astype(np.float64) - rebuilt) ** 2
    return 10 * math.log10(255**2 / error.mean())


if __name__ == "__main__":
    main()
