"""The end of a step: how long the gradient is, what it is divided by, and whether it may be used at all.

DeepSpeed casts every gradient to fp64 for its norm, reads norms back to the host, and clips in a pass of its own. Here
all of that stays on the device: the norm is taken in fp32 over the flat gradient, and AdamW's kernel divides by what
clipping asks for, or leaves everything as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmscale.distributed import total
from fmscale.engine.optim import AdamWEMA

ROW = 4096
CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def norm(vector: Tensor) -> Tensor:
    """2-norm of a vector, fp32, off by less than 1e-6.

    Rows first: torch adds up on a CPU in so few running sums that a vector of 3e7 elements loses 1e-3.
    """
    if len(vector) <= ROW:
        return torch.linalg.vector_norm(vector)
    whole = len(vector) - len(vector) % ROW
    rows = torch.linalg.vector_norm(vector[:whole].view(-1, ROW), dim=1)
    return norm(torch.cat([rows, vector[whole:]]))


class Flat(list[Tensor]):
    """A gradient in one piece: where DeepSpeed finds `flat_partition`, it does not make one itself."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__([flat])
        self.flat_partition = flat


class Tail:
    """Measures, clips and judges the gradient in DeepSpeed's stead.

    Args:
        zero: DeepSpeed's ZeRO optimizer; it is told to ask here.
        stage: of ZeRO.
        partitions: what the optimizer works on.
        optimizer: divides the gradient, or ignores it.
        clip_norm: largest global gradient norm, 0 for none.
        device: of the network.

    Attributes:
        norm: of the last step's gradient over all ranks, before clipping; not finite where any element is not.
        applied: whether it was used, a bool scalar on the device.
    """

    def __init__(
        self,
        zero: Any,
        stage: int,
        partitions: Sequence[Tensor],
        optimizer: AdamWEMA,
        clip_norm: float,
        device: torch.device,
    ) -> None:
        self.zero, self.partitions, self.optimizer = zero, partitions, optimizer
        self.clip_norm, self.device = clip_norm, device
        self.norm = torch.zeros((), device=device)
        self.applied = torch.zeros((), device=device, dtype=torch.bool)
        self._kept: dict[int, Tensor] = {}
        if stage == 3:
            self._offloaded = bool(zero.offload_optimizer)
            self._flatten = self._slice
            self._replace("_get_norm_groups", lambda: [self.judge()])
            self._replace("unscale_and_clip_grads", lambda *_: None)  # with nothing to clip it would multiply by 1
        else:
            self._offloaded = bool(zero.cpu_offload)
            self._flatten = self._copy_together
            self._replace("scaled_global_norm", self.judge)
            if torch.distributed.get_world_size() == 1 and not self._offloaded and not self._compact():
                # What one rank has is reduced already: it needs no way through buckets.
                self._replace("reduce_independent_p_g_buckets_and_remove_grads", lambda *_: None)
                zero.reduce_bucket_size = 1  # element: buckets are made all the same, in each micro-batch

    def _replace(self, method: str, ours: Callable[..., Any]) -> None:
        assert callable(getattr(self.zero, method)), method
        setattr(self.zero, method, ours)

    def _compact(self) -> bool:
        """Whether DeepSpeed adds what leaves a bucket to the flat gradient there and then."""
        return any(map(self.zero._use_compact_grad_partition_buffer, range(len(self.partitions))))

    def judge(self) -> Tensor:
        """Measure the gradient, and tell the optimizer what to make of it.

        Returns:
            0 on the host, which DeepSpeed takes for a norm that it may go on with: it waits for no device.
        """
        norms = torch.stack([norm(flat) for flat in self._gradients()])
        self.norm = total(norms.square().sum().to(self.device)).sqrt()
        self.applied = self.norm.isfinite()
        home = norms.device
        self.optimizer.found_inf = (~self.applied).float().to(home)
        if self.clip_norm:
            self.optimizer.grad_scale = ((self.norm + CLIP_EPS) / self.clip_norm).clamp(min=1).to(home)
        return torch.zeros(())

    def _gradients(self) -> list[Tensor]:
        """The step's gradient as this rank owns it: a vector for each partition."""
        if self._offloaded:
            return [partition.grad for partition in self.partitions if partition.grad is not None]
        groups = self.zero.averaged_gradients
        for group, grads in groups.items():
            if not hasattr(grads, "flat_partition"):
                groups[group] = Flat(self._flatten(group, grads))
        return [grads.flat_partition for grads in groups.values()]

    def _copy_together(self, group: int, grads: Sequence[Tensor]) -> Tensor:
        """Gradients in any dtype as one fp32 vector."""
        flat = self._kept.get(group)
        if flat is None:
            flat = torch.empty_like(self.partitions[group])
        if flat.device.type == "cpu":  # which takes a new block from the system page by page, at thrice a copy's time
            self._kept[group] = flat
        torch._foreach_copy_(flat.split([grad.numel() for grad in grads]), [grad.flatten() for grad in grads])
        return flat

    def _slice(self, group: int, grads: Sequence[Tensor]) -> Tensor:
        """Gradients that are neighbours in ZeRO-3's one buffer, as the vector that they are there."""
        start, end = grads[0].storage_offset(), grads[-1].storage_offset() + grads[-1].numel()
        assert end - start == len(self.partitions[group])
        return grads[0].as_strided((end - start,), (1,))
