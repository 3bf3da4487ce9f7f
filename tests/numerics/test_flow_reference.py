"""Paths, targets, conversions and couplings against the packages `flow_matching` and `torchcfm`.

tests/reference/make_flow_reference.py asked them, in an environment of its own. Their t runs from noise to data, so
their velocity is ours turned round.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fmscale.flow.path import VP_FIRST, interpolate
from fmscale.flow.prediction import convert
from fmscale.flow.transport import exact, sinkhorn_plan, squared_distances

SIGMA = 0.1


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent.parent / "reference" / "flow.safetensors")


def our_time(reference: dict[str, Tensor], path: str) -> tuple[Tensor, float]:
    """Our t, and how fast their clock is in ours: of their variance-preserving path we leave out the first moment."""
    t = 1 - reference["their_t"]
    return ((t - VP_FIRST) / (1 - VP_FIRST), 1 - VP_FIRST) if path == "variance_preserving" else (t, 1.0)


@pytest.mark.parametrize("path", ["rectified", "cosine", "variance_preserving"])
def test_points_and_velocities_are_those_of_flow_matching(reference: dict[str, Tensor], path: str) -> None:
    t, faster = our_time(reference, path)
    point, velocity = interpolate(reference["latents"], reference["noise"], t, path)
    torch.testing.assert_close(point, reference[f"{path}.point"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(velocity, -faster * reference[f"{path}.velocity"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", ["rectified", "cosine", "variance_preserving"])
def test_conversions_are_those_of_flow_matching(reference: dict[str, Tensor], path: str) -> None:
    t, faster = our_time(reference, path)
    point, velocity = reference[f"{path}.point"], -faster * reference[f"{path}.velocity"]
    for wanted in ("data", "noise"):
        found = convert(velocity, point, t, "velocity", wanted, path)
        torch.testing.assert_close(found, reference[f"{path}.{wanted}"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", ["rectified", "cosine"])
def test_bandwidth_is_that_of_torchcfm(reference: dict[str, Tensor], path: str) -> None:
    t, _ = our_time(reference, path)
    point, velocity = interpolate(reference["latents"], reference["noise"], t, path, SIGMA, reference["jitter"])
    torch.testing.assert_close(point, reference[f"{path}.cfm_point"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(velocity, -reference[f"{path}.cfm_velocity"], rtol=1e-12, atol=1e-12)


def test_the_exact_coupling_is_that_of_torchcfm(reference: dict[str, Tensor]) -> None:
    cost = squared_distances(reference["latents"], reference["noise"])
    assert torch.equal(exact(cost), reference["exact_plan"].argmax(dim=1))


def test_the_entropic_plan_is_that_of_torchcfm(reference: dict[str, Tensor]) -> None:
    pytest.importorskip("ot", reason="POT is an extra: fmscale[ot]")
    cost = squared_distances(reference["latents"], reference["noise"])
    plan = sinkhorn_plan(cost, 3.0 / cost.mean().item()) / len(cost)
    torch.testing.assert_close(plan, reference["sinkhorn_plan"], rtol=1e-5, atol=1e-7)
