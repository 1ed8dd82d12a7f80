"""Which of PyTorch's kernels a run computes with: settings of the whole process, made in one place."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.config.schema import PrecisionConfig

HOPPER = 9  # the major number of its compute capability
CUDNN_FIRST = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def set_kernels(precision: PrecisionConfig, on_cpu: bool) -> None:
    """Deterministic kernels, or on a GPU the fastest of cuDNN's convolutions for each shape; and TF32."""
    deterministic = precision.deterministic or on_cpu
    if deterministic:
        # on the CPU always: with several threads some of its kernels add in any order too
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic  # shapes repeat: buckets are few, and each is timed once
    torch.backends.cuda.matmul.allow_tf32 = precision.tf32
    torch.backends.cudnn.allow_tf32 = precision.tf32


def choose_attention(device: torch.device, precision: PrecisionConfig) -> tuple[str, ...] | None:
    """In which order SDPA tries its kernels on this device, see ``attention_order``."""
    return attention_order(device_capability(device), precision.deterministic)


def attention_order(capability: tuple[int, int] | None, deterministic: bool) -> tuple[str, ...] | None:
    """In which order SDPA tries its kernels on a GPU of that compute capability; None: as PyTorch does, flash first.

    On Hopper, and there alone, cuDNN's are the faster ones for shapes of training, by 1.7 to 2.3 times (six GPUs of
    five generations: https://github.com/huggingface/transformers/pull/48163); their backward pass is not deterministic.
    """
    if capability is None or capability[0] != HOPPER or deterministic:
        return None
    return CUDNN_FIRST


def device_capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU of NVIDIA's; None of anything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


@contextmanager
def prefer_attention(order: tuple[str, ...] | None) -> Iterator[None]:
    """Inside, SDPA tries kernels in this order; what one cannot do the next one does."""
    if order is None:
        yield
        return
    with sdpa_kernel([getattr(SDPBackend, name) for name in order], set_priority=True):
        yield


def record_kernels(order: tuple[str, ...] | None) -> dict[str, Any]:
    """What is set, for an attempt's record."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "attention": list(order) if order else "as PyTorch orders",
    }
