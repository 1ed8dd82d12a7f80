"""One optimizer step: a deterministic function of the model and the step's batches.

A non-finite loss or gradient never reaches the weights: all ranks agree on a flag on the device, which gates the
update there. The host launches a step without waiting for the device, loss scaling or not; the step's numbers come to
it in one copy, for which it waits when the next step is launched. Of the optimizers only fused AdamW takes the flag on
the device: before the update of the others the host reads it, see ``gated_step``.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.config.schema import DiffusionConfig
from trainer.core.distributed import send_to_host
from trainer.data.loader import Batch
from trainer.model.diffusion import add_noise, loss_weights, make_target, sample_losses
from trainer.model.latents import LatentScale, scale_latents
from trainer.train.narrow import NarrowOptimizer
from trainer.train.optim import gated_step


@dataclass(frozen=True)
class Objective:
    """What is trained towards; all that a loss needs beside model and batch."""

    diffusion: DiffusionConfig
    cumulative: Tensor  # fp32 (1000,), on the device
    scale: LatentScale  # of the VAE
    inputs: torch.dtype = torch.float32  # of the noisy latents as the model gets them; without autocast its weights'


@dataclass(frozen=True)
class StepResult:
    """The numbers of a step, on the host."""

    step: int  # completed steps before it
    loss: Tensor  # mean over the global batch, fp32 ()
    grad_norm: Tensor  # before clipping, over all trained parts, fp32 ()
    bad: bool  # the update was withheld
    losses: Tensor  # of this rank's samples, fp32 (samples,)
    keys: list[str]  # of this rank's samples
    loss_scale: float | None  # after the step
    skipped: bool  # loss scaling skipped the update
    launched: float  # seconds, when the host was done with it; it then waits for the step before, which keeps the pace


@dataclass(frozen=True)
class PendingStep:
    """A step that the device may still be at; its numbers are on their way to the host."""

    step: int
    keys: list[str]
    launched: float
    numbers: Tensor  # fp32, on the host: loss, norm, bad, under loss scaling its scales, losses of the samples
    arrived: torch.cuda.Event | None  # None where nothing has to be waited for

    def wait(self) -> StepResult:
        """Wait for the device to have made this step, and for no later one."""
        if self.arrived is not None:
            self.arrived.synchronize()
        head, losses = self.numbers.tensor_split([len(self.numbers) - len(self.keys)])
        loss, grad_norm, bad, *scales = head.unbind()
        before, after = (float(scale) for scale in scales) if scales else (None, None)
        skipped = before is not None and after is not None and after < before
        return StepResult(
            step=self.step, loss=loss, grad_norm=grad_norm, bad=bool(bad), losses=losses,
            keys=self.keys, loss_scale=after, skipped=skipped, launched=self.launched,
        )  # fmt: skip


def batch_losses(model: nn.Module, batch: Batch, objective: Objective) -> Tensor:
    """The loss of each sample of a micro-batch, fp32 (B,)."""
    latents = scale_latents(batch.raw_latents.float(), objective.scale)  # (B, 4, H/8, W/8)
    noisy_latents = add_noise(latents, batch.noise, batch.timesteps, objective.cumulative)
    model_pred = model(
        noisy_latents.to(objective.inputs),
        batch.timesteps,
        batch.input_ids_1,
        batch.input_ids_2,
        batch.chunk_map,
        batch.time_ids,
    )
    target = make_target(latents, batch.noise, batch.timesteps, objective.cumulative, objective.diffusion)
    weights = loss_weights(batch.timesteps, objective.cumulative, objective.diffusion)
    return sample_losses(model_pred, target, weights)


def training_step(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizer: Optimizer,
    objective: Objective,
    *,
    step: int,
    micro_steps: int,
    max_grad_norm: float | None,
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]],
    all_mean: Callable[[Tensor], Tensor] | None = None,
    scaler: Any = None,
    arrive: Callable[[str], object] = lambda doing: None,
    before_update: Callable[[], None] = lambda: None,
) -> PendingStep:
    """Accumulate the gradients of ``micro_steps`` batches, clip them together unless the norm is None, and update.

    ``no_sync`` keeps DDP from reducing gradients before the last micro-step; ``all_mean`` averages over the ranks, and
    is None for one alone. Among several, gradients are cleared in place: they are views of DDP's buckets, and gradients
    made anew would lie beside the buckets until the last micro-step, 13.5 GB in stage 1.
    ``arrive`` is told where this rank is: the last backward waits for all others.
    ``before_update`` is what the update has to wait for: a save that copies the weights.
    """
    keys: list[str] = []
    losses: list[Tensor] = []
    device = objective.cumulative.device
    for micro_step, batch in zip(range(micro_steps), batches, strict=False):
        with contextlib.nullcontext() if micro_step == micro_steps - 1 else no_sync():
            sample_loss = batch_losses(model, batch.to(device), objective)
            loss = sample_loss.mean() / micro_steps
            arrive(f"backward {micro_step + 1} of {micro_steps} of a step")
            (scaler.scale(loss) if scaler else loss).backward()
        keys += batch.keys
        losses.append(sample_loss.detach())
    assert len(losses) == micro_steps, "the loader ended before the run"
    own = torch.cat(losses)
    loss = all_mean(own.mean()) if all_mean else own.mean()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    narrow = optimizer if isinstance(optimizer, NarrowOptimizer) else None
    if narrow:
        narrow.begin(step, all_mean)
    if scaler:
        scaler.unscale_(optimizer)
    limit = math.inf if max_grad_norm is None else max_grad_norm
    grad_norm = narrow.clip(limit) if narrow else torch.nn.utils.clip_grad_norm_(parameters, limit)
    before_update()
    bad, *scales = update(optimizer, scaler, loss, grad_norm)
    optimizer.zero_grad(set_to_none=all_mean is None)
    head = torch.stack([value.float() for value in (loss, grad_norm, bad, *scales)])
    numbers, arrived = send_to_host(torch.cat([head, own]))
    return PendingStep(step, keys, time.perf_counter(), numbers, arrived)


def update(optimizer: Optimizer, scaler: Any, loss: Tensor, grad_norm: Tensor) -> tuple[Tensor, ...]:
    """Update the weights if all is finite; bad, and under loss scaling the scale before and after."""
    if scaler is None:
        bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        gated_step(optimizer, bad)
        return (bad,)
    # fp16: overflows of gradients are the scaler's to skip, and a non-finite loss makes every gradient non-finite;
    # whether it skipped shows in the scale, because fused AdamW reads the scaler's flag on the device
    one = torch.ones_like(loss)
    before = scaler.scale(one)  # where get_scale() would wait for the device
    scaler.step(optimizer)
    scaler.update()
    return ~torch.isfinite(loss), before, scaler.scale(one)


def settle_gradient_buckets(model: nn.Module, batch: Batch, objective: Objective, optimizer: Optimizer) -> None:
    """One forward and backward of zero loss through DDP.

    DDP rebuilds its gradient buckets after the first backward, so that with three or more processes the first step
    after a resume would sum in another order than the same step of a run that went on.
    """
    (batch_losses(model, batch.to(objective.cumulative.device), objective).sum() * 0.0).backward()
    optimizer.zero_grad(set_to_none=False)
