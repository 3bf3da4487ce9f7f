"""Writes inception.safetensors: features of two random images that torch-fidelity's Inception v3 of 2015 has, as
torchmetrics calls it for FID, with the weights of `random_inception`.

    pip install torch-fidelity==0.4.0 torchmetrics==1.9.0
    PYTHONPATH=tests python tests/reference/make_inception_reference.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from random_inception import random_inception
from safetensors.torch import save_file
from torchmetrics.image.fid import NoTrainInceptionV3

pixels = torch.randint(0, 256, (2, 48, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
with tempfile.NamedTemporaryFile(suffix=".pth") as file, torch.no_grad():
    torch.save(random_inception(1008), file.name)
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], file.name)
    features = network(pixels.permute(0, 3, 1, 2))
save_file({"pixels": pixels, "features": features}, Path(__file__).with_name("inception.safetensors"))
