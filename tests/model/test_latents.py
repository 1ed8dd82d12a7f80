"""Raw latents to what the UNet sees and back, with all numbers of a VAE's config; unknown ones are refused."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from support.tiny_model import TINY
from trainer.core.errors import UserError
from trainer.model.latents import (
    LatentScale,
    check_vae_config,
    describe_numbers,
    find_other_numbers,
    read_latent_scale,
    scale_latents,
    unscale_latents,
)
from trainer.model.vae import build_vae, decode_latents

CHANNELS = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}


def test_scaling_is_what_diffusers_pipelines_do() -> None:
    raw = torch.randn(2, 4, 3, 5)
    assert torch.equal(scale_latents(raw, LatentScale(0.13025)), raw * 0.13025)
    assert torch.equal(scale_latents(raw, LatentScale(0.5, 0.25)), (raw - 0.25) * 0.5)
    scale = read_latent_scale({"scaling_factor": 0.5, **CHANNELS})
    mean, std = (torch.tensor(CHANNELS[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    assert torch.equal(scale_latents(raw, scale), (raw - mean) * 0.5 / std)
    assert torch.equal(scale_latents(raw[0], scale), scale_latents(raw, scale)[0])


@pytest.mark.parametrize("numbers", [{}, {"shift_factor": 0.25}, CHANNELS])
def test_decoding_undoes_all_of_it(numbers: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = TINY["vae"] | numbers
    original = AutoencoderKL.from_config(config).eval()
    vae = build_vae(config, original.state_dict(), torch.float32)
    raw, scale = torch.randn(1, 4, 4, 4), read_latent_scale(config)
    assert torch.allclose(unscale_latents(scale_latents(raw, scale), scale), raw, atol=1e-6)
    with torch.no_grad():
        expected = original.decode(raw).sample
    assert torch.allclose(decode_latents(vae, scale_latents(raw, scale)), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling_factor": None}, "says no scaling_factor"),
        ({"scaling_factor": 0}, "scaling_factor must be above 0"),
        ({"scaling_factor": "0.13"}, "scaling_factor must be a finite number"),
        ({"shift_factor": float("nan")}, "shift_factor must be a finite number"),
        ({"latents_mean": [0.0] * 4}, "one of latents_mean and latents_std"),
        ({"latents_std": [1.0] * 4}, "one of latents_mean and latents_std"),
        (CHANNELS | {"latents_std": [1.0] * 16}, "latents_std must be four finite numbers"),
        (CHANNELS | {"latents_std": [1.0, 0.0, 1.0, 1.0]}, "latents_std must be above 0"),
        (CHANNELS | {"shift_factor": 0.1}, "shift_factor beside latents_mean"),
        ({"latents_scale": [1.0] * 4}, r"has latents_scale = .*not known here"),
        ({"batch_norm_eps": 1e-4}, r"has batch_norm_eps = 0\.0001"),
        ({"_class_name": "AutoencoderDC"}, "is an AutoencoderDC"),
    ],
)
def test_numbers_that_are_not_known_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_vae_config(TINY["vae"] | changes)


def test_settings_that_change_no_latents_are_fine() -> None:
    """What diffusers writes beside the numbers, and what it leaves empty."""
    more = {"_diffusers_version": "0.36.0", "latents_mean": None, "latents_std": None, "shift_factor": None,
            "use_quant_conv": True, "sample_size": 1024, "unknown": None, "use_tiling": False}  # fmt: skip
    assert check_vae_config(TINY["vae"] | more) == LatentScale(0.2)
    assert check_vae_config(AutoencoderKL.from_config(TINY["vae"]).config) == LatentScale(0.2)


def test_numbers_are_recorded_where_they_are_not_the_default_and_compared() -> None:
    plain, channels = LatentScale(0.13025), read_latent_scale({"scaling_factor": 0.13025, **CHANNELS})
    assert describe_numbers(plain) == {"scaling_factor": 0.13025, "shift_factor": None}
    assert describe_numbers(channels) == {"scaling_factor": 0.13025, "shift_factor": None, **CHANNELS}
    for scale in (plain, channels, LatentScale(0.5, 0.25)):
        assert read_latent_scale(describe_numbers(scale)) == scale
        assert find_other_numbers(describe_numbers(scale), scale) is None
    assert find_other_numbers({"scaling_factor": 0.806, "shift_factor": None}, plain) == (
        "scaling_factor 0.806 there, 0.13025 now"
    )
    assert "latents_mean None there" in str(find_other_numbers(describe_numbers(plain), channels))
    assert find_other_numbers({}, plain) is None  # of a version that did not record them
