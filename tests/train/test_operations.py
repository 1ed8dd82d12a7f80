"""What a step launches beside the model: hardly more than the barest loop does."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config.schema import (
    DiffusionConfig,
    GradientDtype,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    WeightMode,
)
from trainer.data.loader import Batch
from trainer.model.base import read_sdxl_config
from trainer.model.diffusion import alphas_cumprod
from trainer.model.latents import LatentScale
from trainer.model.sdxl import COMPONENTS, SDXL, build_empty, set_part, unused_layers
from trainer.train.narrow import NarrowOptimizer
from trainer.train.optim import build_optimizer
from trainer.train.step import Objective, training_step

# SDXL with all of its layers, in narrow widths: what a step adds is seen beside as many operations as a real one's
NARROW: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [32, 32, 32], "attention_head_dim": [1, 1, 1], "cross_attention_dim": 16,
             "projection_class_embeddings_input_dim": 8 + 6 * 8, "addition_time_embed_dim": 8},
    "text_encoder": {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 1, "vocab_size": 100},
    "text_encoder_2": {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 1, "vocab_size": 100,
                       "projection_dim": 8},
}  # fmt: skip
RATES = OptimConfig(unet_lr=1e-5, text_encoder_1_lr=1e-5, text_encoder_2_lr=1e-5)
MICRO_STEPS = 2


class Operations(TorchDispatchMode):
    """A context that counts what is launched; views launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def make_model() -> SDXL:
    config = ModelConfig("", train_text_encoder_1=True, train_text_encoder_2=True)
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, Any] = {}
    for part, component in COMPONENTS.items():
        module = parts[part] = build_empty(part, read_sdxl_config(component) | NARROW[component])
        for name, parameter in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            values = torch.randn(parameter.shape, generator=generator) * 0.05
            setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(values))
        set_part(module, part, config, MemoryConfig("none"))
    sdxl = SDXL(**parts)
    for layer in unused_layers(sdxl.text_encoder_1):
        layer.requires_grad_(False)
    return sdxl


def make_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (3, 77), generator=generator)
    return [
        Batch(
            keys=["key"], raw_latents=torch.randn(1, 4, 8, 8, generator=generator).half(),
            noise=torch.randn(1, 4, 8, 8, generator=generator), timesteps=torch.tensor([500]),
            input_ids_1=ids, input_ids_2=ids, chunk_map=torch.arange(3)[None], time_ids=torch.full((1, 6), 64.0),
        )
        for _ in range(MICRO_STEPS)
    ]  # fmt: skip


class Autocast(torch.nn.Module):
    """A model as Accelerate wraps it."""

    def __init__(self, model: SDXL) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return self.model(*inputs).float()


def bare_step(model: SDXL, narrow: bool) -> Callable[[], object]:
    """Noising, a loss, clipping and fused AdamW: the least that a step can be, by PyTorch alone."""
    wrapped: Any = model.bfloat16() if narrow else Autocast(model)
    batches, inputs = make_batches(), torch.bfloat16 if narrow else torch.float32
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    signal = alphas_cumprod()

    def step() -> None:
        for batch in batches:
            level = signal[batch.timesteps][:, None, None, None]
            noisy = level.sqrt() * (batch.raw_latents.float() * 0.13) + (1 - level).sqrt() * batch.noise
            ids = batch.input_ids_1, batch.input_ids_2, batch.chunk_map
            pred = wrapped(noisy.to(inputs), batch.timesteps, *ids, batch.time_ids)
            (F.mse_loss(pred.float(), batch.noise) / MICRO_STEPS).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(model: SDXL, weights: WeightMode, gradients: GradientDtype) -> Callable[[], object]:
    precision, batches = PrecisionConfig("bf16", weights=weights, gradients=gradients), make_batches()
    narrow = weights != "autocast"
    optimizer: Any = build_optimizer(model, RATES)
    if narrow:
        optimizer = NarrowOptimizer(model, RATES, precision, 0, torch.device("cpu"))
    inputs = torch.bfloat16 if narrow else torch.float32
    objective = Objective(DiffusionConfig(), alphas_cumprod(), LatentScale(0.13), inputs)

    def step() -> None:
        training_step(
            model if narrow else Autocast(model), batches, optimizer, objective, step=0, micro_steps=MICRO_STEPS,
            max_grad_norm=1.0, no_sync=contextlib.nullcontext,
        )  # fmt: skip

    return step


def count(step: Callable[[], object]) -> int:
    step()  # the first makes the optimizer's state
    with Operations() as operations:
        step()
    return operations.count


def test_a_step_launches_hardly_more_than_a_bare_loop() -> None:
    bare = {narrow: count(bare_step(make_model(), narrow)) for narrow in (False, True)}
    assert min(bare.values()) > 10_000
    modes: list[tuple[WeightMode, GradientDtype]] = [("autocast", "fp32"), ("master", "fp32"), ("stochastic", "bf16")]
    for weights, gradients in modes:
        model = make_model()
        ours, least = count(our_step(model, weights, gradients)), bare[weights != "autocast"]
        if weights != "autocast":  # sums lie in one flat tensor: the first gradients are added too, not kept
            trained = sum(parameter.requires_grad for parameter in model.parameters())
            least += trained * (2 if gradients == "bf16" else 1)  # whose norms on the CPU are made one by one
        assert ours <= 1.03 * least, (weights, gradients, ours, least)
