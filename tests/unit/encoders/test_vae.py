"""encoders/vae.py, on the quickstart's own weights and handwritten digits that they were not trained on."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

import fmscale
from fmscale import digits
from fmscale.encoders.vae import Vae, load_vae
from fmscale.errors import UserError

DIGITS_VAE = Path(fmscale.__file__).parent / "assets" / "digits_vae"


@pytest.fixture(scope="module")
def vae() -> Vae:
    return load_vae(DIGITS_VAE)


@pytest.fixture(scope="module")
def split() -> digits.DigitSplit:
    return digits.load_split()


def to_tensor(images) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr_db(images: torch.Tensor, rebuilt: torch.Tensor) -> float:
    return 10 * math.log10(4 / (images - rebuilt).square().mean().item())


def test_held_out_digits_survive_the_round_trip(vae, split):
    images = to_tensor(digits.enlarge(split.heldout_images[:120]))
    rebuilt = vae.decode(vae.encode(images))
    assert psnr_db(images, rebuilt) >= 28
    classifier = digits.fit_classifier(split.train_images, split.train_labels)
    pictures = ((rebuilt + 1) / 2).permute(0, 2, 3, 1).numpy()
    assert (digits.read_digits(classifier, pictures) == split.heldout_labels[:120]).mean() >= 0.95


@pytest.mark.parametrize("join", [digits.side_by_side, digits.stacked])
def test_pairs_survive_the_round_trip(vae, split, join):
    singles = digits.enlarge(split.heldout_images[:32])
    images = to_tensor(join(singles[::2], singles[1::2]))
    latents = vae.encode(images)
    assert latents.shape == (16, vae.channels, images.shape[2] // 8, images.shape[3] // 8)
    assert psnr_db(images, vae.decode(latents)) >= 28


def test_latents_of_the_training_digits_are_standardised(vae, split):
    latents = vae.encode(to_tensor(digits.enlarge(split.train_images[:200])))
    assert abs(latents.mean().item()) < 0.05
    assert abs(latents.std().item() - 1) < 0.05


def test_encode_is_the_shifted_and_scaled_posterior(vae, split):
    images = to_tensor(digits.enlarge(split.heldout_images[:2]))
    posterior = vae.model.encode(images).latent_dist
    expected = (posterior.mean - vae.model.config.shift_factor) * vae.model.config.scaling_factor
    torch.testing.assert_close(vae.encode(images), expected)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
    raw = posterior.sample(torch.Generator().manual_seed(3))
    sample = vae.posterior(images).sample(noise)
    torch.testing.assert_close(sample, (raw - vae.shift_factor) * vae.scaling_factor)
    assert not torch.equal(sample, expected)


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_latents(tmp_path):
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    compiled = load_vae(tmp_path / "vae", compile=True)
    torch.testing.assert_close(
        compiled.posterior(images), load_vae(tmp_path / "vae").posterior(images), rtol=1e-4, atol=1e-5
    )
    compiled.save(tmp_path / "saved")
    assert load_vae(tmp_path / "saved").identity() == compiled.identity()


def test_ways_of_computing_change_little(split):
    """Relative to the standard deviation of latents, which is 1."""
    images = to_tensor(digits.enlarge(split.heldout_images[:4]))
    expected = load_vae(DIGITS_VAE).posterior(images)
    channels_last = load_vae(DIGITS_VAE, channels_last=True)
    assert channels_last.model.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last.posterior(images), expected, atol=1e-4, rtol=1e-4)
    for dtype, tolerance in ((torch.bfloat16, 0.2), (torch.float16, 0.02)):
        posterior = load_vae(DIGITS_VAE, dtype=dtype).posterior(images)
        assert posterior.mean.dtype == posterior.log_variance.dtype == torch.float32
        assert 0 < (posterior.mean - expected.mean).abs().max() < tolerance


def test_tiles_lose_no_more_than_the_vae_itself(vae, split):
    page = digits.enlarge(split.heldout_images[:16]).reshape(4, 4, 64, 64, 3).swapaxes(1, 2).reshape(1, 256, 256, 3)
    images = to_tensor(page)
    tiled = load_vae(DIGITS_VAE, tile_px=128)
    whole, pieces = vae.encode(images), tiled.encode(images)
    assert pieces.shape == whole.shape
    assert not torch.equal(pieces, whole)
    assert psnr_db(vae.decode(whole), vae.decode(pieces)) > psnr_db(images, vae.decode(whole))
    assert psnr_db(images, vae.decode(pieces)) > psnr_db(images, vae.decode(whole)) - 3
    assert torch.equal(tiled.encode(images[..., :128, :128]), vae.encode(images[..., :128, :128]))
    with pytest.raises(UserError, match="tiles of 48 px: this VAE needs a multiple of 32"):
        load_vae(DIGITS_VAE, tile_px=48)


def test_decode_undoes_scale_and_shift(vae):
    raw = torch.randn(1, vae.channels, 4, 6, generator=torch.Generator().manual_seed(0))
    images = vae.decode((raw - vae.shift_factor) * vae.scaling_factor)
    expected = vae.model.decode(raw).sample.clamp(-1, 1)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert not images.requires_grad


def test_a_vae_without_shift_and_in_bf16(tmp_path):
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).save_pretrained(tmp_path)
    plain = load_vae(tmp_path, dtype=torch.bfloat16)
    assert (plain.factor, plain.channels, plain.shift_factor, plain.scaling_factor) == (1, 2, 0.0, 0.18215)
    assert plain.decode(plain.encode(torch.zeros(1, 3, 4, 4))).dtype == torch.bfloat16


def test_saved_model_gives_the_same_latents(vae, split, tmp_path):
    images = to_tensor(digits.enlarge(split.heldout_images[:2]))
    vae.save(tmp_path)
    torch.testing.assert_close(load_vae(tmp_path).encode(images), vae.encode(images), atol=0, rtol=0)


def test_identity_names_the_weights(vae, tmp_path):
    identity = json.loads(json.dumps(vae.identity()))
    assert identity == vae.identity()
    assert (identity["channels"], identity["factor"]) == (vae.channels, 8)
    assert (identity["scale"], identity["shift"]) == (vae.scaling_factor, vae.shift_factor)
    copy = shutil.copytree(DIGITS_VAE, tmp_path / "copy")
    assert load_vae(copy).identity() == identity
    with torch.no_grad():
        vae_of_other_weights = load_vae(copy)
        vae_of_other_weights.model.decoder.conv_out.bias += 1
    vae_of_other_weights.save(tmp_path / "other")
    assert load_vae(tmp_path / "other").identity()["sha256"] != identity["sha256"]


def test_folders_that_are_no_vae_are_refused(tmp_path):
    with pytest.raises(UserError, match="no model folder"):
        load_vae(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_vae(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        load_vae(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(UserError, match="UNet2DConditionModel, not AutoencoderKL"):
        load_vae(tmp_path)


def test_pickled_weights_are_never_read(tmp_path):
    shutil.copy(DIGITS_VAE / "config.json", tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="only safetensors are read"):
        load_vae(tmp_path)


def test_a_missing_piece_of_split_weights_is_named(tmp_path):
    shutil.copy(DIGITS_VAE / "config.json", tmp_path)
    index = {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00001.safetensors"}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"00001-of-00001\.safetensors is missing"):
        load_vae(tmp_path)


def test_weights_that_do_not_fill_the_model_are_refused(vae, tmp_path):
    from safetensors.torch import save_file

    shutil.copy(DIGITS_VAE / "config.json", tmp_path)
    state = {name: weight for name, weight in vae.model.state_dict().items() if name != "decoder.conv_out.bias"}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack decoder\.conv_out\.bias"):
        load_vae(tmp_path)


@pytest.mark.parametrize("change", [{"latent_channels": 7}, {"block_out_channels": "x"}])
def test_a_damaged_folder_is_one_line(tmp_path: Path, change: dict[str, object]) -> None:
    shutil.copytree(DIGITS_VAE, tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match="no AutoencoderKL can be loaded from it") as caught:
        load_vae(tmp_path / "vae")
    assert "\n" not in str(caught.value)
