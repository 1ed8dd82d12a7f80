"""Inputs of the tiny model's forward, of any size."""

import torch


def inputs_of(samples: int, side: int, chunks: int = 2, vocabulary: int = 300) -> dict[str, torch.Tensor]:
    """A micro-batch at a size in pixels; each of its chunks is another one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (samples * chunks, 77), generator=generator)
    return {
        "noisy_latents": torch.randn(samples, 4, side // 8, side // 8, generator=generator),
        "timesteps": torch.randint(0, 1000, (samples,), generator=generator),
        "input_ids_1": ids,
        "input_ids_2": ids,
        "chunk_map": torch.arange(samples * chunks).reshape(samples, chunks),
        "time_ids": torch.tensor([[float(side), side, 0, 0, side, side]] * samples),
    }
