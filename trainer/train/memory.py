"""What a training step holds in a GPU's memory, counted in seconds on the meta device, where tensors have no data.

Weights, gradients and the optimizer's state follow from the parameters. What forward and backward hold beside them is
counted by running them: every storage that an operation makes, until it is freed, whoever keeps it (autograd, a
checkpoint, or a variable).
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from trainer.config.schema import OptimizerName, PrecisionConfig
from trainer.data.tokens import CHUNK_LENGTH
from trainer.model.sdxl import (
    DTYPES,
    SDXL,
    trained_parameters,
)
from trainer.train.optim import state_bytes

# What torch.autocast does on CUDA to the functions of this model: https://docs.pytorch.org/docs/stable/amp.html
PRODUCTS = (F.linear, F.conv2d, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm, Tensor.matmul, Tensor.__matmul__)
IN_FP32 = (F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax)
aten = torch.ops.aten


@dataclass(frozen=True)
class Shape:
    """The size of a micro-batch: samples of one bucket, in pixels, and chunks of tokens of each."""

    samples: int
    width: int
    height: int
    chunks: int


@dataclass(frozen=True)
class StepCount:
    """What one micro-batch takes beside weights, gradients and state."""

    saved: int  # bytes between forward and backward
    peak: int  # bytes at most, at any time of forward and backward
    flops: int  # of both, with what is computed again


@dataclass(frozen=True)
class Estimate:
    """Bytes that a process holds at most, and of what."""

    weights: int
    gradients: int
    state: int  # the optimizer's
    activations: int  # the peak of forward and backward

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.state + self.activations


def estimate(model: nn.Module, optimizer: OptimizerName, precision: PrecisionConfig, activations: int) -> Estimate:
    """The parts, by a model of any device."""
    trained = trained_parameters(model).values()
    gradient = 2 if precision.weights != "autocast" and precision.gradients == "bf16" else 4
    return Estimate(
        weights=sum(value.nbytes for value in model.parameters() if not value.requires_grad)
        + trained_weight_bytes(precision) * sum(value.numel() for value in trained),
        gradients=gradient * sum(value.numel() for value in trained),
        state=sum(state_bytes(value.shape, optimizer) for value in trained),
        activations=activations,
    )


def trained_weight_bytes(precision: PrecisionConfig) -> int:
    """Of each trained weight, with what brings back its fp32 value (train/weights.py)."""
    match precision.weights:
        case "autocast":
            return 4
        case "master":
            return 2 + (4 if precision.compute == "fp16" else 2)
        case "stochastic":
            return 2


def count_step(model: SDXL, shape: Shape, precision: PrecisionConfig) -> StepCount:
    """Forward and backward of a micro-batch with a model on the meta device, as they are on CUDA.

    All samples have other chunks, which is the most that the text encoders can get. Gradients are there already, as in
    every micro-batch of a step but the first.
    """
    inputs, compute = make_inputs(shape, torch.device("meta")), DTYPES[precision.compute]
    if precision.weights == "autocast":
        return run_counted(model, inputs, CudaFunctions(compute))
    inputs["noisy_latents"] = inputs["noisy_latents"].to(compute)
    return run_counted(model, inputs, CudaFunctions(torch.float32))  # nothing is cast


def run_counted(model: SDXL, inputs: dict[str, Tensor], functions: TorchFunctionMode) -> StepCount:
    """Forward and backward under ``functions``, counted; gradients are added up in place."""
    for value in trained_parameters(model).values():
        value.grad = torch.zeros_like(value)
    grads = [value.grad for value in model.parameters() if value.grad is not None]
    with functions, Counting([*model.parameters(), *model.buffers(), *grads, *inputs.values()]) as counting:
        loss = model(**inputs).float().square().mean()
        saved = counting.live
        # what torch.autograd.backward calls, which would leave the mode for the time of its work
        Variable._execution_engine.run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    return StepCount(saved, counting.peak, counting.flops)


def make_inputs(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """A micro-batch of zeros, each of its chunks another one."""
    many = shape.samples * shape.chunks
    ids = torch.zeros(many, CHUNK_LENGTH, dtype=torch.int64, device=device)
    return {
        "noisy_latents": torch.zeros(shape.samples, 4, shape.height // 8, shape.width // 8, device=device),
        "timesteps": torch.zeros(shape.samples, dtype=torch.int64, device=device),
        "input_ids_1": ids,
        "input_ids_2": ids.clone(),
        "chunk_map": torch.arange(many, device=device).reshape(shape.samples, shape.chunks),
        "time_ids": torch.zeros(shape.samples, 6, device=device),
    }


class Counting(TorchDispatchMode):
    """The bytes of all storages that operations have made and nobody has freed, and the FLOPs of the operations."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage())
        if count_flops := flop_registry.get(func._overloadpacket):
            self.flops += count_flops(*args, **kwargs, out_val=made)
        return made

    def note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage from now until it is freed."""
        address, size = storage._cdata, storage.nbytes()
        if address in self.seen:
            return
        self.seen.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.free, address, size).atexit = False

    def free(self, address: int, size: int) -> None:
        self.seen.discard(address)
        self.live -= size


class CudaFunctions(TorchFunctionMode):
    """Functions of this model as autocast to ``compute`` and CUDA's choice of attention make them, on any device.

    The meta device has no autocast, and there attention falls apart into products that no GPU computes.
    """

    in_fp32: tuple[Callable[..., Any], ...] = IN_FP32

    def __init__(self, compute: torch.dtype):
        super().__init__()
        self.compute = compute

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        attends = func is F.scaled_dot_product_attention
        if self.compute != torch.float32 and (attends or func in PRODUCTS or func in self.in_fp32):
            dtype = torch.float32 if func in self.in_fp32 else self.compute
            args, kwargs = tree_map(lambda value: cast_floating(value, dtype), (args, kwargs))
        return self.attend(*args, **kwargs) if attends else func(*args, **kwargs)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Flash attention where it is possible, that is in 16 bits and without a mask, else the efficient one."""
        assert not enable_gqa and dropout_p == 0.0
        if attn_mask is None and query.dtype != torch.float32:
            flash: Tensor = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]
            return flash
        bias = attn_mask
        if bias is not None:  # a mask of booleans becomes numbers
            bias = torch.zeros_like(bias, dtype=query.dtype) if bias.dtype == torch.bool else bias
            bias = bias.expand(*query.shape[:-1], key.shape[-2])
        attend = aten._scaled_dot_product_efficient_attention
        efficient: Tensor = attend(query, key, value, bias, True, 0.0, is_causal, scale=scale)[0]
        return efficient


def cast_floating(value: Any, dtype: torch.dtype) -> Any:
    """A floating tensor in another format, as autocast has it."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
