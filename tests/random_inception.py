"""Random weights of Inception v3 whose features are of common size: a file of real ones is 95 MB."""

from __future__ import annotations

import torch
from torchvision.models import inception_v3


def random_inception(classes: int) -> dict[str, torch.Tensor]:
    """A state dict under torchvision's names, without counts of batches; the same each time."""
    with torch.device("meta"):
        shapes = inception_v3(num_classes=classes, aux_logits=False, init_weights=False).state_dict()
    generator, state = torch.Generator().manual_seed(0), {}
    for name, value in sorted(shapes.items()):
        if name.endswith("num_batches_tracked"):
            continue
        drawn = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            state[name] = drawn * (2 / value[0].numel()) ** 0.5
        else:
            state[name] = 0.1 * drawn + float(name.endswith((".bn.weight", "_var")))
    return state
