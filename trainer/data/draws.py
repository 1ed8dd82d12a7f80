"""All that is random about a sample, as functions of (seed, pass, key): its caption, its noise, its timestep."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.config.schema import CaptionsConfig, DiffusionConfig
from trainer.core.rng import rng
from trainer.data.captions import compose_caption, draw_caption


def draw_sample_caption(record: Mapping[str, Any], pass_: int, seed: int, rules: CaptionsConfig) -> str:
    """The caption of a sample in one pass."""
    return draw_caption(compose_caption(record, rules), rules, rng("caption", seed, pass_, record["key"]))


def draw_sample_timestep(key: str, pass_: int, seed: int, config: DiffusionConfig) -> int:
    """The timestep of a sample in one pass, uniform over min_timestep .. max_timestep - 1."""
    return int(rng("timestep", seed, pass_, key).integers(config.min_timestep, config.max_timestep))


def draw_sample_noise(shape: tuple[int, int, int], key: str, pass_: int, seed: int, noise_offset: float) -> np.ndarray:
    """The noise of a sample in one pass, fp32 (4, H/8, W/8)."""
    return draw_noise(shape, noise_offset, rng("noise", seed, pass_, key))


def draw_noise(shape: tuple[int, int, int], noise_offset: float, generator: np.random.Generator) -> np.ndarray:
    """Noise of one sample, fp32 (4, H/8, W/8), with one extra normal a channel times ``noise_offset``.

    The pixel noise is drawn first, so that it is the same with and without an offset.
    """
    noise = generator.standard_normal(shape, dtype=np.float32)
    if noise_offset:
        noise += np.float32(noise_offset) * generator.standard_normal((shape[0], 1, 1), dtype=np.float32)
    return noise
