"""Features of Inception v3 from a file: torchvision's network, and that of 2015, which pools otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_inception import random_inception
from safetensors.torch import load_file, save_file
from torch.nn.functional import avg_pool2d, interpolate
from torchvision.models import inception_v3

from fmscale.encoders.inception import CLASSES, Inception, _WithoutPadding
from fmscale.errors import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Random weights of both networks, by number of classes."""
    folder, found = tmp_path_factory.mktemp("inception"), {}
    for classes in CLASSES:
        found[classes] = folder / f"{classes}.safetensors"
        save_file(random_inception(classes), found[classes])
    return found


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return load_file(Path(__file__).parents[2] / "reference" / "inception.safetensors")


def test_torchvision_has_the_same_features(files: dict[int, Path], reference: dict[str, torch.Tensor]) -> None:
    inception = Inception(files[1000])
    theirs = inception_v3(num_classes=1000, init_weights=False, transform_input=False)
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(inception.model.state_dict(), strict=False)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    large = interpolate(reference["pixels"].permute(0, 3, 1, 2).float(), (299, 299), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = theirs.eval()((large / 255 - mean) / std)
    found = inception.images(reference["pixels"])
    assert found.shape == (2, Inception.width)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_fid_is_measured_with_the_same_features(files: dict[int, Path], reference: dict[str, torch.Tensor]) -> None:
    """As torchmetrics computes them with torch-fidelity; tests/reference/make_inception_reference.py asked both."""
    found = Inception(files[1008]).images(reference["pixels"])
    error = (found - reference["features"]).norm() / reference["features"].norm()
    assert error <= 1e-5
    assert (found[0] - found[1]).norm() > 100 * error * found.norm()  # images differ by more


def test_the_edges_count_what_is_there() -> None:
    given = torch.rand(1, 2, 4, 5, generator=torch.Generator().manual_seed(2))
    found = _WithoutPadding()(avg_pool2d(given, 3, stride=1, padding=1))
    torch.testing.assert_close(found, avg_pool2d(given, 3, stride=1, padding=1, count_include_pad=False))


def test_what_is_no_inception_is_refused(tmp_path: Path, files: dict[int, Path]) -> None:
    for name, said in {"weights.pth": "not a .safetensors file; only", "gone.safetensors": "no such file"}.items():
        with pytest.raises(UserError, match=f"{name}: {said}"):
            Inception(tmp_path / name)
    save_file({"fc.bias": torch.zeros(10)}, tmp_path / "ten.safetensors")
    with pytest.raises(UserError, match=r"not the weights of an Inception v3, whose fc\.bias has 1008 or 1000 numbers"):
        Inception(tmp_path / "ten.safetensors")
    save_file({"fc.bias": torch.zeros(1008)}, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match=r"not the weights of Inception v3 of 2015.*Missing key"):
        Inception(tmp_path / "bare.safetensors")
    cut = files[1000].read_bytes()[:1000]
    (tmp_path / "cut.safetensors").write_bytes(cut)
    with pytest.raises(UserError, match=r"cut\.safetensors: damaged"):
        Inception(tmp_path / "cut.safetensors")
