"""The autoencoder: pixels -> raw latents, and latents -> pixels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from trainer.core.errors import UserError, shorten
from trainer.model.latents import check_vae_config, read_latent_scale, unscale_latents
from trainer.model.weights_file import check_finite


def build_vae(config: Mapping[str, Any], state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> AutoencoderKL:
    """The autoencoder of a diffusers config with exactly these weights, frozen, on the weights' device.

    Raises:
        UserError: when the weights are not the config's, or not of SDXL's kind (4 channels, 1/8 of the side), when the
            config says what is not known here, or the dtype cannot hold the weights.
    """
    check_vae_config(config)
    try:
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(dict(config))
    except Exception as error:  # the library raises whatever its blocks and activations do
        raise UserError(f"the VAE's config describes no model: {shorten(str(error))}") from error
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if (vae.config.latent_channels, factor) != (4, 8):
        raise UserError(f"the VAE makes {vae.config.latent_channels} channels at 1/{factor} of the side, not 4 at 1/8")
    weights = {name: value.to(dtype) for name, value in state.items()}
    check_finite(weights, f"the VAE in {dtype}", "it does not hold them: set precision.vae to fp32 or bf16")
    try:
        vae.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"the VAE's weights do not fit its config: {error}") from error
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_raw_latents(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] (B, 3, H, W) -> the posterior's mean, not scaled, fp32 (B, 4, H/8, W/8)."""
    weight = next(vae.parameters())  # vae.device and vae.dtype walk over all modules, for each image
    return vae.encode(pixels.to(weight.device, weight.dtype)).latent_dist.mode().float()


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents (B, 4, H/8, W/8) -> pixels, fp32 (B, 3, H, W), in [-1, 1] but for the decoder's overshoot."""
    raw_latents = unscale_latents(latents, read_latent_scale(vae.config))
    return vae.decode(raw_latents.to(vae.device, vae.dtype)).sample.float()


def pixels_to_tensor(images: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """Images of a size, uint8 (H, W, 3) -> float32 (B, 3, H, W) in [-1, 1] on the device, to which they go as bytes."""
    on_host = torch.empty((len(images), *images[0].shape), dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.stack(images, out=on_host.numpy())
    on_device = on_host.to(device, non_blocking=True).permute(0, 3, 1, 2)  # (B, 3, H, W), channels last
    values = on_device.to(torch.float32, memory_format=torch.contiguous_format)  # another layout, other bits of latents
    # CUDA divides by a number of the host's as it multiplies by its reciprocal: other last bits than the CPU's
    return values.div_(torch.full((), 127.5, device=device)).sub_(1.0)


def pixels_to_image(pixels: torch.Tensor) -> Image.Image:
    """Pixels (3, H, W), in [-1, 1] but for overshoot, -> an RGB image."""
    return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())
