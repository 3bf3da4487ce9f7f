"""Inception v3 as a measure of images: 2048 features each, from weights in a file on this machine.

Two sets of weights are in use, and figures compare only where the features are the same. Those of 2015, with 1008
classes, are what FID was defined with; their network pools otherwise than torchvision's, whose own weights have 1000
classes. The file says which it holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fmscale.encoders.weights import read_safetensors
from fmscale.errors import UserError
from fmscale.files import sha256

SIDE_PX = 299
FEATURES = 2048
CLASSES = {1008: "Inception v3 of 2015, as FID was defined", 1000: "Inception v3 of torchvision"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AVERAGING = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b")


class Inception:
    """Frozen features of images.

    Args:
        file: a state dict in safetensors.
        device: where they are computed.

    Attributes:
        width: features of an image.

    Raises:
        UserError: no such file, not safetensors, or weights of another network.
    """

    width = FEATURES

    def __init__(self, file: Path, device: torch.device | str = "cpu") -> None:
        state = read_safetensors(file)
        classes = len(state["fc.bias"]) if "fc.bias" in state else 0
        if classes not in CLASSES:
            raise UserError(
                f"{file}: not the weights of an Inception v3, whose fc.bias has {' or '.join(map(str, CLASSES))} "
                "numbers; give those of FID (pt_inception-2015-12-05) or torchvision's, as safetensors"
            )
        self.file, self.device, self.kind = file, torch.device(device), CLASSES[classes]
        self.of_2015 = classes == 1008
        self.model = self._build(state, classes).requires_grad_(False).eval().to(device)

    def _build(self, state: dict[str, Tensor], classes: int) -> nn.Module:
        from torchvision.models import inception_v3

        with torch.device("meta"):
            model: Any = inception_v3(weights=None, num_classes=classes, aux_logits=False, init_weights=False)
        used = {name: value.float() for name, value in state.items() if not name.startswith("AuxLogits.")}
        counts = {name: torch.zeros((), dtype=torch.int64) for name in model.state_dict() if name.endswith("_tracked")}
        try:
            model.load_state_dict({**counts, **used}, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.file}: not the weights of {self.kind} ({reason})") from error
        model.fc, model.transform_input = nn.Identity(), False
        if self.of_2015:
            for name in AVERAGING:
                block = getattr(model, name)
                block.branch_pool = nn.Sequential(_WithoutPadding(), block.branch_pool)
            model.Mixed_7c = _MaxPooled(model.Mixed_7c)
        return model

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """Features of images of any size, which are brought to 299 x 299 pixels first.

        Args:
            pixels: shape (B, height, width, 3), uint8.

        Returns:
            Shape (B, 2048), float32, on the CPU.
        """
        given = pixels.to(self.device).permute(0, 3, 1, 2).float()
        given = functional.interpolate(given, (SIDE_PX, SIDE_PX), mode="bilinear", antialias=True)
        return self.model(self._normalized(given)).cpu()

    def _normalized(self, pixels: Tensor) -> Tensor:
        if self.of_2015:
            return (pixels - 128) / 128
        mean, std = (
            torch.tensor(values, device=self.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        return (pixels / 255 - mean) / std

    def identity(self) -> dict[str, Any]:
        """What makes figures comparable."""
        return {"features": self.kind, "width": self.width, "path": str(self.file), "sha256": sha256(self.file)}


class _WithoutPadding(nn.Module):
    """Turns means over 3 x 3 pixels, zeros beyond the edge among them, into means over those that are there."""

    def forward(self, means: Tensor) -> Tensor:
        return means / functional.avg_pool2d(torch.ones_like(means[:1, :1]), 3, stride=1, padding=1)


class _MaxPooled(nn.Module):
    """A last block whose pooling branch takes the largest of 3 x 3 pixels; torchvision's takes their mean."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = self.block.branch_pool(functional.max_pool2d(pixels, 3, stride=1, padding=1))
        return torch.cat([self.block(pixels)[:, : -pooled.shape[1]], pooled], dim=1)
