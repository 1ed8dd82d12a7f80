"""Noise schedule, noise, target, weighting and the loss of each sample. Noising and loss are computed in fp32.

DDPM with SDXL's scaled-linear schedule. Recipe, section 6.
"""

import torch
from torch import Tensor

from trainer.config.schema import NUM_TIMESTEPS, DiffusionConfig


def alphas_cumprod(zero_terminal_snr: bool = False) -> Tensor:
    """Cumulative alphas, fp32 (1000,), computed in fp32 as diffusers does: 0.99915 first, 0.0046601 last.

    ``zero_terminal_snr`` shifts and scales their roots so that the last is 0 and the first stays
    (Lin et al. 2023, arXiv 2305.08891, algorithm 1).
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TIMESTEPS, dtype=torch.float32) ** 2
    cumulative = torch.cumprod(1.0 - betas, dim=0)
    if not zero_terminal_snr:
        return cumulative
    roots = cumulative.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return ((roots - last) * (first / (first - last))) ** 2


def signal_to_noise(cumulative: Tensor) -> Tensor:
    """SNR of each timestep, alpha / (1 - alpha), fp32 (1000,)."""
    return cumulative / (1.0 - cumulative)


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, cumulative: Tensor) -> Tensor:
    """z_t = sqrt(a_t) z + sqrt(1 - a_t) noise, all fp32 (B, 4, H/8, W/8); timesteps (B,)."""
    alpha = cumulative[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt() * latents + (1.0 - alpha).sqrt() * noise


def make_target(
    latents: Tensor, noise: Tensor, timesteps: Tensor, cumulative: Tensor, config: DiffusionConfig
) -> Tensor:
    """What the model is to predict, fp32 (B, 4, H/8, W/8): the noise, or the velocity (arXiv 2202.00512)."""
    match config.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            alpha = cumulative[timesteps].view(-1, 1, 1, 1)
            return alpha.sqrt() * noise - (1.0 - alpha).sqrt() * latents


def loss_weights(timesteps: Tensor, cumulative: Tensor, config: DiffusionConfig) -> Tensor | None:
    """Min-SNR weights, fp32 (B,), or None without ``min_snr_gamma`` (Hang et al. 2023, arXiv 2303.09556)."""
    if config.min_snr_gamma is None:
        return None
    snr = signal_to_noise(cumulative)[timesteps]
    clipped = snr.clamp(max=config.min_snr_gamma)
    return clipped / snr if config.prediction_type == "epsilon" else clipped / (snr + 1.0)


def sample_losses(model_pred: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """Mean squared error of each sample over C, H, W, weighted; fp32 (B,)."""
    losses = (model_pred.float() - target).square().mean(dim=(1, 2, 3))
    return losses if weights is None else losses * weights
