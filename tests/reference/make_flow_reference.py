"""What `flow_matching` and `torchcfm` say of paths, targets and couplings, for tests/numerics/test_flow_reference.py.

They pull in packages of which fmscale wants none, so they run in an environment of their own:

    uv venv reference && uv pip install --python reference/bin/python torch numpy safetensors pot torchdiffeq
    uv pip install --python reference/bin/python --no-deps flow-matching==1.0.10 torchcfm==1.0.7
    reference/bin/python tests/reference/make_flow_reference.py

It writes flow.safetensors beside itself. Times and velocities are theirs: t = 0 is noise, t = 1 data.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch
from flow_matching.path import AffineProbPath
from flow_matching.path.scheduler import CondOTScheduler, CosineScheduler, Scheduler, VPScheduler
from safetensors.torch import save_file
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher, VariancePreservingConditionalFlowMatcher
from torchcfm.optimal_transport import OTPlanSampler

BATCH, SHAPE, SIGMA = 12, (2, 3, 4), 0.1
SCHEDULERS: dict[str, Scheduler] = {
    "rectified": CondOTScheduler(),
    "cosine": CosineScheduler(),
    "variance_preserving": VPScheduler(),
}


def main() -> None:
    """Draw inputs, ask both packages, write all of it."""
    generator = torch.Generator().manual_seed(0)
    latents, noise, jitter = (torch.randn(BATCH, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(3))
    their_t = torch.rand(BATCH, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    found = {"latents": latents, "noise": noise, "jitter": jitter, "their_t": their_t}
    for name, scheduler in SCHEDULERS.items():
        path = AffineProbPath(scheduler)
        sample = path.sample(x_0=noise, x_1=latents, t=their_t)
        found |= {f"{name}.point": sample.x_t, f"{name}.velocity": sample.dx_t}
        found[f"{name}.data"] = path.velocity_to_target(sample.dx_t, sample.x_t, their_t[:, None, None, None])
        found[f"{name}.noise"] = path.velocity_to_epsilon(sample.dx_t, sample.x_t, their_t[:, None, None, None])
    for name, kind in (("rectified", ConditionalFlowMatcher), ("cosine", VariancePreservingConditionalFlowMatcher)):
        matcher = kind(sigma=SIGMA)
        found[f"{name}.cfm_point"] = matcher.sample_xt(noise, latents, their_t, jitter)
        found[f"{name}.cfm_velocity"] = matcher.compute_conditional_flow(noise, latents, their_t, sample.x_t)
    found["exact_plan"] = torch.from_numpy(OTPlanSampler("exact").get_map(latents, noise))
    found["sinkhorn_plan"] = torch.from_numpy(OTPlanSampler("sinkhorn", reg=3.0).get_map(latents, noise))
    made_by = {name: version(name) for name in ("flow-matching", "torchcfm", "pot", "torch")}
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, FILE, made_by)


FILE = Path(__file__).parent / "flow.safetensors"

if __name__ == "__main__":
    main()
