"""An SDXL between tiny and full size, whose weights show in a process's memory; and work with it in such a process."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from support.checkpoints import save_checkpoint
from support.private_memory import watch_memory
from support.tiny_model import TINY, random_parts, write_folder
from trainer.config.schema import MemoryConfig, ModelConfig, OptimConfig, PrecisionConfig
from trainer.model.base import find_base
from trainer.model.restore import restore_checkpoint
from trainer.model.sdxl import SDXL, build_empty, build_sdxl
from trainer.train.load import load_model
from trainer.train.narrow import NarrowOptimizer
from trainer.train.optim import build_optimizer
from trainer.train.weights import FlatGradients, lay_out

UNET = TINY["unet"] | {"block_out_channels": [32, 128, 256, 512], "attention_head_dim": [2, 4, 8, 8]}
RATES = OptimConfig(name="adafactor", unet_lr=1e-3, betas=None, eps=None)  # which has hardly any state
FP32 = PrecisionConfig("fp32", frozen="fp32")


def write_base(folder: Path) -> int:
    """A diffusers folder in fp16; the UNet's parameters."""
    write_folder(folder, random_parts(0), torch.float16)
    (folder / "unet" / "config.json").write_text(json.dumps(UNET))
    generator = torch.Generator().manual_seed(0)
    shapes = {name: value.shape for name, value in build_empty("unet", UNET).named_parameters()}
    state = {name: torch.empty(shape).uniform_(-0.1, 0.1, generator=generator) for name, shape in shapes.items()}
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value.half() for name, value in state.items()}, file, {"format": "pt"})
    return sum(shape.numel() for shape in shapes.values())


def load_fp32(base: str) -> SDXL:
    return build_sdxl(find_base(base), ModelConfig(""), FP32, MemoryConfig("none"))


def start(base: str, weights: str) -> int:
    """Bytes that loading the model for a run takes beside its weights and, where they are flat, gradients."""
    narrow = weights != "autocast"
    precision = PrecisionConfig("bf16", weights, "bf16" if narrow else "fp32", frozen="bf16")  # type: ignore[arg-type]
    config = SimpleNamespace(model=ModelConfig(""), precision=precision, optim=RATES, run=SimpleNamespace(seed=1))
    inputs: Any = SimpleNamespace(
        config=config, accelerator=Accelerator(cpu=True), resumed=None, base=find_base(base),
        facts={"memory": {"policy": "none"}},
    )  # fmt: skip
    with watch_memory() as peak:
        _, sdxl, optimizer = load_model(inputs)
    held = sum(value.nbytes for value in sdxl.parameters())
    if isinstance(optimizer, NarrowOptimizer):
        behind = optimizer.weights.behind
        held += optimizer.gradients.flat.nbytes + (0 if behind is None else behind.nbytes)
    return peak.bytes - held


def write_checkpoint(base: str, folder: str) -> Path:
    model = load_fp32(base)
    return save_checkpoint(Path(folder), model, build_optimizer(model, RATES), {"step": 1})


def restore(base: str, folder: str) -> int:
    """Bytes that restoring the checkpoint in ``folder`` takes."""
    model = load_fp32(base)
    optimizer = build_optimizer(model, RATES)
    with watch_memory() as peak:
        restore_checkpoint(Path(folder), model, optimizer)
    return peak.bytes


def take_norms() -> int:
    """Bytes that the norms of 2,048 gradients in bf16, of 65,536 elements each, take."""
    parameters = {str(number): nn.Parameter(torch.zeros(2**16, dtype=torch.bfloat16)) for number in range(2048)}
    gradients = FlatGradients(list(lay_out(parameters).values()), "bf16", torch.device("cpu"))
    with watch_memory() as peak:
        gradients.norms()
    return peak.bytes
