"""Pixels, raw latents, latents: the posterior's mean, both scalings, and weights that are not the config's."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from trainer.core.errors import UserError
from trainer.model.latents import read_latent_scale, scale_latents
from trainer.model.vae import build_vae, decode_latents, encode_raw_latents, pixels_to_tensor

LEVELS = {"block_out_channels": (8, 8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4,
          "up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 4}  # fmt: skip


def make(**options: object) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**{**LEVELS, "latent_channels": 4, **options})


def test_tensor_range() -> None:
    pixels = np.array([[[0, 255, 51]]], dtype=np.uint8).repeat(2, axis=1)  # (1, 2, 3)
    tensor = pixels_to_tensor(pixels)
    assert tensor.shape == (3, 1, 2) and tensor.dtype == torch.float32
    assert torch.allclose(tensor[:, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))


def test_raw_latents_are_the_posteriors_mean() -> None:
    original = make()
    vae = build_vae(original.config, original.state_dict(), torch.float32)
    pixels = torch.rand(2, 3, 32, 64) * 2 - 1
    raw_latents = encode_raw_latents(vae, pixels)
    assert raw_latents.shape == (2, 4, 4, 8) and raw_latents.dtype == torch.float32
    original.eval().requires_grad_(
        False
    )  # with trainable weights torch picks another attention kernel, even in no_grad
    assert torch.equal(raw_latents, original.encode(pixels).latent_dist.mean)
    assert not vae.training and not any(parameter.requires_grad for parameter in vae.parameters())


@pytest.mark.parametrize("shift", [None, 0.5])
def test_scaling_and_back(shift: float | None) -> None:
    original = make(scaling_factor=0.13025, shift_factor=shift)
    vae = build_vae(original.config, original.state_dict(), torch.float32)
    raw_latents = torch.randn(1, 4, 4, 4)
    latents = scale_latents(raw_latents, read_latent_scale(vae.config))
    assert torch.allclose(latents, (raw_latents - (shift or 0)) * 0.13025)
    with torch.no_grad():
        expected = original.eval().decode(raw_latents).sample
    assert torch.allclose(decode_latents(vae, latents), expected, atol=1e-5)


def test_a_lower_precision_gives_fp32_results() -> None:
    original = make()
    vae = build_vae(original.config, original.state_dict(), torch.bfloat16)
    raw_latents = encode_raw_latents(vae, torch.zeros(1, 3, 16, 16))
    assert vae.dtype == torch.bfloat16 and raw_latents.dtype == torch.float32
    assert decode_latents(vae, raw_latents).dtype == torch.float32


def test_weights_that_are_not_the_configs_are_refused() -> None:
    original = make()
    state = original.state_dict()
    missing = {name: value for name, value in state.items() if name != "quant_conv.bias"}
    for wrong in (missing, state | {"more": torch.zeros(1)}, state | {"quant_conv.bias": torch.zeros(3)}):
        with pytest.raises(UserError, match="do not fit its config"):
            build_vae(original.config, wrong, torch.float32)
    for options, said in (
        ({"latent_channels": 16}, "16 channels at 1/8"),
        ({name: value[:3] if isinstance(value, tuple) else value for name, value in LEVELS.items()}, "at 1/4"),
    ):
        other = make(**options)
        with pytest.raises(UserError, match=said):
            build_vae(other.config, other.state_dict(), torch.float32)
