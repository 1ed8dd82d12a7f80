"""Raw latents, as the VAE makes them, <-> latents, as the UNet sees them: the numbers of a VAE's config, all of them.

SDXL's VAE has a scaling factor alone. What diffusers knows beside it: a shift (Stable Diffusion 3 and Flux), or a mean
and a standard deviation of each channel (Playground 2.5), applied as its pipelines do.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.core.errors import UserError
from trainer.model.component_configs import CONFIG_KEYS

NUMBERS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@dataclass(frozen=True)
class LatentScale:
    """latents = (raw - shift) * scaling, or (raw - mean) * scaling / std by channel."""

    scaling_factor: float
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None


def read_latent_scale(config: Mapping[str, Any]) -> LatentScale:
    """The numbers of a VAE's config, or of a manifest's section ``latents``.

    Raises:
        UserError: where one is missing, is none, or stands beside one that it contradicts.
    """
    scaling, shift = config.get("scaling_factor"), config.get("shift_factor")
    if scaling is None:
        raise UserError("the VAE's config says no scaling_factor (SDXL's is 0.13025): add it")
    for name, value in (("scaling_factor", scaling), ("shift_factor", shift)):
        if value is not None and not is_number(value):
            raise UserError(f"the VAE's {name} must be a finite number, not {value!r}")
    if not scaling > 0:
        raise UserError(f"the VAE's scaling_factor must be above 0, not {scaling!r}")
    mean, std = (read_channels(name, config.get(name)) for name in ("latents_mean", "latents_std"))
    if (mean is None) != (std is None):
        raise UserError("the VAE's config has one of latents_mean and latents_std: both or neither have a meaning")
    if std is not None and not min(std) > 0:
        raise UserError(f"the VAE's latents_std must be above 0, not {list(std)}")
    if mean is not None and shift:
        raise UserError("the VAE's config has a shift_factor beside latents_mean: it is not known which applies")
    return LatentScale(float(scaling), float(shift or 0.0), mean, std)


def read_channels(name: str, value: Any) -> tuple[float, ...] | None:
    """A number for each of the four channels; None where there are none."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 4 or not all(is_number(number) for number in value):
        raise UserError(f"the VAE's {name} must be four finite numbers, one a channel, not {value!r}")
    return tuple(float(number) for number in value)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_vae_config(config: Mapping[str, Any]) -> LatentScale:
    """The numbers of a VAE's config, which must say nothing that is not known here.

    Raises:
        UserError: for another class of autoencoder, or a setting of unknown effect.
    """
    if (kind := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise UserError(f"the VAE is an {kind}, not the AutoencoderKL of SDXL")
    known = CONFIG_KEYS["vae"]
    # a setting that is null or false changes nothing; names with _ are diffusers' own notes
    strange = [name for name, value in config.items() if name not in known and name[:1] != "_" and value]
    if strange:
        settings = ", ".join(f"{name} = {config[name]!r}" for name in strange[:4])
        raise UserError(f"the VAE's config has {settings}: what that does to latents is not known here")
    return read_latent_scale(config)


def describe_numbers(scale: LatentScale) -> dict[str, Any]:
    """The numbers as JSON, as manifests and checkpoints keep them: those beside the first two only where there are any.

    Without a shift it says null, as sets of version 0.2 do.
    """
    numbers: dict[str, Any] = {"scaling_factor": scale.scaling_factor, "shift_factor": scale.shift_factor or None}
    if scale.latents_mean is not None and scale.latents_std is not None:
        numbers |= {"latents_mean": list(scale.latents_mean), "latents_std": list(scale.latents_std)}
    return numbers


def find_other_numbers(before: Mapping[str, Any], now: LatentScale) -> str | None:
    """What differs between recorded numbers and a VAE's, with both values; None where nothing does, or none are."""
    if before.get("scaling_factor") is None:
        return None
    old, new = describe_numbers(read_latent_scale(before)), describe_numbers(now)
    names = [name for name in NUMBERS if old.get(name) != new.get(name)]
    return "; ".join(f"{name} {old.get(name)} there, {new.get(name)} now" for name in names) or None


def scale_latents(raw_latents: Tensor, scale: LatentScale) -> Tensor:
    """Raw latents -> what the UNet sees, (B, 4, H/8, W/8) or (4, H/8, W/8)."""
    center, spread = center_and_spread(scale, raw_latents)
    return (raw_latents - center) * scale.scaling_factor / spread


def unscale_latents(latents: Tensor, scale: LatentScale) -> Tensor:
    """The inverse of ``scale_latents``."""
    center, spread = center_and_spread(scale, latents)
    return latents * spread / scale.scaling_factor + center


def center_and_spread(scale: LatentScale, like: Tensor) -> tuple[Tensor, Tensor] | tuple[float, float]:
    """Mean and standard deviation of each channel, (4, 1, 1), on the device and in the dtype of ``like``.

    Without these the shift of all, and 1.
    """
    if scale.latents_mean is None or scale.latents_std is None:
        return scale.shift_factor, 1.0
    mean, std = (  # filled there: a list that is copied to a GPU is waited for
        torch.stack([like.new_full((1, 1), value) for value in values])
        for values in (scale.latents_mean, scale.latents_std)
    )
    return mean, std
