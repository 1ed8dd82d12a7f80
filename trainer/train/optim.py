"""build_optimizer, and lr_factor(step): the learning rate as a pure function of the step."""

import math
from typing import Any, assert_never

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.config.schema import OptimConfig, OptimizerName, ScheduleConfig
from trainer.model.sdxl import COMPONENTS, trained_parameters


def build_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups: each part at its own rate, and apart from norms and biases if these do not decay."""
    groups = []
    parameters = trained_parameters(model)
    for part in COMPONENTS:
        owned = [value for name, value in parameters.items() if name.startswith(f"{part}.")]
        rate = getattr(config, f"{part}_lr")
        split = [(owned, config.weight_decay)]
        if not config.decay_norms_and_biases:
            split = [([p for p in owned if p.ndim > 1], config.weight_decay), ([p for p in owned if p.ndim <= 1], 0.0)]
        groups += [
            {"params": some, "lr": rate, "base_lr": rate, "part": part, "weight_decay": decay}
            for some, decay in split
            if some
        ]
    return groups


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer of all trained parameters."""
    return choose_optimizer(build_groups(model, config), config)


def choose_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """The optimizer of these groups."""
    match config.name:
        case "adamw":
            assert config.betas is not None and config.eps is not None
            # fused: one kernel, no temporary copies, and the update can be gated on the device
            return torch.optim.AdamW(groups, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)
        case "adamw8bit":
            import bitsandbytes

            assert config.betas is not None and config.eps is not None
            return bitsandbytes.optim.AdamW8bit(groups, betas=(config.betas[0], config.betas[1]), eps=config.eps)
        case "adafactor":
            from transformers.optimization import Adafactor

            # the fixed-rate form: the rate is the config's, not a function of the weights or of the step
            return Adafactor(groups, scale_parameter=False, relative_step=False, warmup_init=False)
        case _:
            assert_never(config.name)


def state_bytes(shape: torch.Size, name: OptimizerName) -> int:
    """Bytes of one parameter's state."""
    numel = shape.numel()
    match name:
        case "adamw8bit" if numel >= 4096:  # bitsandbytes: two bytes, and two fp32 scales for each 256
            return 2 * numel + 2 * 4 * (-(-numel // 256))
        case "adamw" | "adamw8bit":
            return 2 * 4 * numel
        case "adafactor" if len(shape) >= 2:  # rows and columns of the last two dimensions
            return 4 * (numel // shape[-1] + numel // shape[-2])
        case "adafactor":
            return 4 * numel
        case _:
            assert_never(name)


def gated_step(optimizer: Optimizer, bad: Tensor) -> None:
    """Step unless ``bad`` (bool scalar on the device) is true.

    Fused AdamW and NarrowOptimizer read the flag on the device, so the host does not wait. adamw8bit and adafactor have
    no such gate: there the host reads the flag first, as torch's GradScaler does for them under loss scaling.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's word for it
        gated: Any = optimizer
        gated.found_inf = bad.float()  # what torch's GradScaler sets
        gated.grad_scale = None
        gated.step()
        del gated.found_inf, gated.grad_scale
    elif not bool(bad):
        optimizer.step()


def lr_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """The share of each part's rate that the update from ``step`` to ``step + 1`` uses.

    Warm-up is min(1, (s + 1) / warmup_steps); the cosine runs over the steps after it, from 1 to ``min_lr_ratio``.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    match config.lr:
        case "constant":
            return 1.0
        case "cosine":
            return cosine(progress, 1.0, config.min_lr_ratio)
        case "cosine_restarts":
            cycle, place = divmod(progress * config.num_cycles, 1.0)
            if progress >= 1.0:
                cycle, place = config.num_cycles - 1, 1.0
            return cosine(place, max(config.cycle_gamma**cycle, config.min_lr_ratio), config.min_lr_ratio)


def cosine(progress: float, high: float, low: float) -> float:
    """Half a cosine from ``high`` at 0 to ``low`` at 1."""
    return low + (high - low) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Set each group's rate to its share."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
