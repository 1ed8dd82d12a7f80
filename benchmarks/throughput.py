"""Samples a second of whole optimizer steps with random weights, variant beside variant. Prints one table.

``python benchmarks/throughput.py [--tiny] [--stage 2] [--side 1024] [--micro-batch 4] [--variants NAME ...]``

Each variant is built in a process of its own, which makes its first step on one fixed batch and then some that are
timed; the variants take turns, round after round, and the table has medians and each variant's ratio to ``original``
in the same round; on the CPU seconds are the processor's. Before a variant is timed its first loss must be that of
``original`` within a hundredth: what computes something else is not compared. Memory is the device's peak, on the CPU
the process's.

``original`` are the original's settings: fp32 weights under autocast, everything computed again. ``example`` is a step
as diffusers' SDXL example makes it, written here with diffusers and torch alone. A line is printed, and with --out
written, after each variant, so that a run that is cut off leaves what it has; --budget is the time after which no
variant is begun.

On a GPU two columns more: what the memory model (trainer/train/memory.py) counts for the variant, and the TFLOP/s that
follow from its FLOPs. There a step that makes the host wait for the device fails, where the optimizer needs no such
wait: everything is launched under PyTorch's sync debug mode "error".
"""

import argparse
import contextlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import nn

from trainer.config.schema import (
    DiffusionConfig,
    Dtype,
    GradientDtype,
    MemoryConfig,
    MemoryPolicy,
    ModelConfig,
    OptimConfig,
    OptimizerName,
    PrecisionConfig,
    WeightMode,
)
from trainer.core.distributed import choose_device, describe_device
from trainer.data.loader import Batch
from trainer.model.base import read_sdxl_config
from trainer.model.diffusion import alphas_cumprod
from trainer.model.latents import LatentScale
from trainer.model.sdxl import COMPONENTS, DTYPES, SDXL, build_empty, encode_prompts, set_part, unused_layers
from trainer.train.memory import Shape as CountedShape
from trainer.train.memory import count_step, estimate
from trainer.train.narrow import NarrowOptimizer
from trainer.train.optim import build_optimizer
from trainer.train.step import Objective, training_step

SCALE = 0.13025  # SDXL's VAE
TOLERANCE = 0.01  # of the first loss
SMALL: dict[str, dict[str, Any]] = {  # widths of --tiny, of the same architecture
    "unet": {"block_out_channels": [64, 128, 128], "transformer_layers_per_block": [1, 1, 2],
             "attention_head_dim": [2, 2, 4], "cross_attention_dim": 160,
             "projection_class_embeddings_input_dim": 1632},
    "text_encoder": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
    "text_encoder_2": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
                       "projection_dim": 96},
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What a step is made with."""

    weights: WeightMode = "autocast"
    gradients: GradientDtype = "fp32"
    policy: MemoryPolicy = "full"
    optimizer: OptimizerName = "adamw"
    compute: Dtype = "bf16"
    channels_last: bool = False
    compile: bool = False
    example: bool = False


ORIGINAL = Variant()
VARIANTS = {
    "original": ORIGINAL,
    "example": Variant(example=True),
    "selective": Variant(policy="selective"),
    "none": Variant(policy="none"),
    "master": Variant(weights="master"),
    "master, selective": Variant(weights="master", policy="selective"),
    "master, none": Variant(weights="master", policy="none"),
    "stochastic, selective": Variant(weights="stochastic", policy="selective"),
    "stochastic, selective, bf16 gradients": Variant("stochastic", "bf16", "selective"),
    "stochastic, selective, adafactor": Variant("stochastic", policy="selective", optimizer="adafactor"),
    "for 24 GB, full": Variant("stochastic", "bf16", "full", "adafactor"),  # docs/training.md
    "for 24 GB, selective": Variant("stochastic", "bf16", "selective", "adafactor"),
    "selective, channels last": Variant(policy="selective", channels_last=True),  # flat weights are contiguous
    "master, selective, compiled": Variant("master", policy="selective", compile=True),
    "original in fp16": Variant(compute="fp16"),
    "master, selective in fp16": Variant("master", policy="selective", compute="fp16"),
}  # the order in which a GPU is asked: what is expected to gain most comes early


@dataclass(frozen=True)
class Shape:
    """Of the fixed batches."""

    tiny: bool
    stage: int
    side: int  # pixels
    samples: int  # in a micro-batch
    micro_steps: int
    chunks: int = 3


# --- the model and the batch


def make_part(part: str, tiny: bool, device: torch.device) -> nn.Module:
    """One part with random weights, drawn on the device, that keep activations of ordinary size."""
    component = COMPONENTS[part]
    module = build_empty(part, read_sdxl_config(component) | (SMALL[component] if tiny else {}))
    positions = dict(module.named_buffers())
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(len(part))
    for name, parameter in list(module.named_parameters()):
        values = torch.zeros(parameter.shape, device=device)
        if parameter.ndim > 1 and generator is not None:
            values.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
        elif not name.endswith("bias"):
            values.fill_(1)
        owner = module.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(values))
    for name, buffer in positions.items():
        module.get_submodule(name.rpartition(".")[0]).register_buffer(
            name.rpartition(".")[2], buffer.to(device), persistent=False
        )
    return module


def make_model(shape: Shape, variant: Variant, device: torch.device) -> SDXL:
    """The model as a run builds it, without files."""
    encoders = shape.stage == 1
    config = ModelConfig("", train_text_encoder_1=encoders, train_text_encoder_2=encoders, compile=variant.compile)
    parts: dict[str, Any] = {}
    for part in COMPONENTS:
        parts[part] = make_part(part, shape.tiny, device)
        if not getattr(config, f"train_{part}"):
            parts[part].to(DTYPES[variant.compute])
        set_part(parts[part], part, config, MemoryConfig(variant.policy))
    sdxl = SDXL(**parts)
    for layer in unused_layers(sdxl.text_encoder_1):
        layer.requires_grad_(False)
    if variant.channels_last:
        sdxl.unet.to(memory_format=torch.channels_last)
    if variant.compile:
        sdxl.unet.compile_repeated_blocks(dynamic=True)
    return sdxl


def make_batches(shape: Shape, vocabulary: int, device: torch.device) -> list[Batch]:
    """The same batches for every variant, drawn on the CPU."""
    generator = torch.Generator().manual_seed(1)
    size, count, chunks = shape.side // 8, shape.samples, shape.chunks
    batches = []
    for number in range(shape.micro_steps):
        ids = torch.randint(1, vocabulary - 2, (count * chunks, 77), generator=generator)
        ids[:, 0], ids[:, -1] = vocabulary - 2, vocabulary - 1
        timesteps = torch.randint(0, 1000, (count,), generator=generator)
        batches.append(Batch(
            keys=[f"{number}-{place}" for place in range(count)],
            raw_latents=(torch.randn(count, 4, size, size, generator=generator) / SCALE).half(),
            noise=torch.randn(count, 4, size, size, generator=generator), timesteps=timesteps,
            input_ids_1=ids, input_ids_2=ids, chunk_map=torch.arange(count * chunks).view(count, chunks),
            time_ids=torch.tensor([[float(shape.side)] * 2 + [0.0, 0.0] + [float(shape.side)] * 2] * count),
        ))  # fmt: skip
    return [batch.to(device) for batch in batches]


def count_tokens(sdxl: Any) -> int:
    return sdxl.text_encoder_1.get_input_embeddings().num_embeddings


# --- one step, ours and theirs


class Autocast(nn.Module):
    """A model as Accelerate wraps it."""

    def __init__(self, model: nn.Module, compute: torch.dtype) -> None:
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self, noisy_latents: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        with torch.autocast(noisy_latents.device.type, self.compute):
            return self.model(noisy_latents, *others).float()


def our_step(sdxl: SDXL, shape: Shape, variant: Variant, device: torch.device) -> Callable[[int], float]:
    """A function that makes step n and gives its loss."""
    optim = OptimConfig(name=variant.optimizer, unet_lr=7.5e-6, text_encoder_1_lr=3.75e-6, text_encoder_2_lr=3.75e-6)
    if variant.optimizer == "adafactor":
        optim = replace(optim, betas=None, eps=None, weight_decay=0.0)
    precision = precision_of(variant)
    narrow = variant.weights != "autocast"
    compute = DTYPES[variant.compute]
    optimizer: Any = NarrowOptimizer(sdxl, optim, precision, 0, device) if narrow else build_optimizer(sdxl, optim)
    batches = make_batches(shape, count_tokens(sdxl), device)
    objective = Objective(
        DiffusionConfig(), alphas_cumprod().to(device), LatentScale(SCALE), compute if narrow else torch.float32
    )
    scaler = torch.amp.GradScaler(device.type) if variant.compute == "fp16" else None
    model = sdxl if narrow else Autocast(sdxl, compute)
    waits_never = device.type == "cuda" and variant.optimizer == "adamw" and not variant.compile

    def step(number: int) -> float:
        # the first step makes the optimizer's state, libraries' handles and kernels
        with no_waiting() if waits_never and number else contextlib.nullcontext():
            pending = training_step(
                model, batches, optimizer, objective, step=number, micro_steps=shape.micro_steps, max_grad_norm=1.0,
                no_sync=contextlib.nullcontext, scaler=scaler,
            )  # fmt: skip
        return float(pending.wait().loss)

    return step


def precision_of(variant: Variant) -> PrecisionConfig:
    return PrecisionConfig(
        variant.compute, weights=variant.weights, gradients=variant.gradients, frozen=variant.compute
    )  # fmt: skip


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the GPU is an error in here."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def their_step(sdxl: SDXL, shape: Shape, variant: Variant, device: torch.device) -> Callable[[int], float]:
    """As in diffusers' train_text_to_image_sdxl.py: autocast, recomputation, AdamW, clipping."""
    compute = DTYPES[variant.compute]
    parameters = [parameter for parameter in sdxl.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=7.5e-6)
    scheduler: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    batches = make_batches(shape, count_tokens(sdxl), device)

    def step(number: int) -> float:
        total = 0.0
        for batch in batches:
            latents = batch.raw_latents.float() * SCALE
            noisy = scheduler.add_noise(latents, batch.noise, batch.timesteps)
            with torch.autocast(device.type, compute):
                embeds, pooled = encode_prompts(
                    sdxl.text_encoder_1, sdxl.text_encoder_2, batch.input_ids_1, batch.input_ids_2, batch.chunk_map
                )
                conditions = {"text_embeds": pooled, "time_ids": batch.time_ids}
                predicted = sdxl.unet(noisy, batch.timesteps, embeds, added_cond_kwargs=conditions).sample
            loss = nn.functional.mse_loss(predicted.float(), batch.noise) / len(batches)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


# --- measuring


def measure(shape: Shape, name: str, steps: int) -> dict[str, Any]:
    """In a process of its own: the first loss, seconds of each later step, and the peak of memory."""
    variant, device = VARIANTS[name], choose_device()
    sdxl = make_model(shape, variant, device)
    # on the CPU seconds of the processor, over all threads, which other programs disturb less
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    step = (their_step if variant.example else our_step)(sdxl, shape, variant, device)
    loss = step(0)
    seconds = []
    for number in range(1, steps + 1):
        synchronize(device)
        began = clock()
        step(number)
        synchronize(device)
        seconds.append(clock() - began)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"name": name, "loss": loss, "seconds": seconds, "peak": peak, "device": describe_device(device)}


def count(shape: Shape, name: str) -> dict[str, float]:
    """What the memory model says of a variant: bytes at most, and FLOPs of a step."""
    variant = VARIANTS[name]
    if variant.example:
        return {}
    sdxl = make_model(shape, replace(variant, compile=False), torch.device("meta"))
    if variant.weights != "autocast":
        nn.Module.to(sdxl, DTYPES[variant.compute])
    counted = count_step(
        sdxl, CountedShape(shape.samples, shape.side, shape.side, shape.chunks), precision_of(variant)
    )  # fmt: skip
    needs = estimate(sdxl, variant.optimizer, precision_of(variant), counted.peak)
    return {"counted": needs.total, "flops": counted.flops * shape.micro_steps}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ask(words: list[str], name: str, limit: float, meanwhile: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """A variant's measurement, or what went wrong with it; beside it, what ``meanwhile`` finds out here."""
    command = [sys.executable, __file__, *words, "--one", name]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin would count as work
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as asked:
        found = meanwhile()
        try:
            answer, errors = asked.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            asked.kill()
            return {"name": name, "failed": f"no answer within {limit:.0f} s"}
    if asked.returncode:
        return {"name": name, "failed": (errors.strip().splitlines() or ["no word"])[-1][:120]}
    return json.loads(answer.splitlines()[-1]) | found


def list_rows(found: dict[str, list[dict[str, Any]]], shape: Shape) -> Iterator[str]:
    """The table; a ratio is the median of the rounds' ratios."""
    yield "| variant | samples/s | ratio to original | peak GB | counted GB | TFLOP/s | first loss |"
    yield "|---|---|---|---|---|---|---|"
    reference = found.get("original", [])
    samples = shape.samples * shape.micro_steps
    for name, rounds in found.items():
        if failed := [each["failed"] for each in rounds if "failed" in each]:
            yield f"| {name} | {failed[0]} | | | | | |"
            continue
        medians = [statistics.median(each["seconds"]) for each in rounds]
        others = [statistics.median(each["seconds"]) for each in reference if "failed" not in each]
        ratios = [other / own for own, other in zip(medians, others, strict=False)]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
        loss, expected = rounds[0]["loss"], (reference or rounds)[0].get("loss", rounds[0]["loss"])
        same = abs(loss - expected) <= TOLERANCE * expected
        peak = max(each["peak"] for each in rounds) / 1e9
        counted = f"{rounds[0]['counted'] / 1e9:.1f}" if "counted" in rounds[0] else ""
        rate = f"{rounds[0]['flops'] / statistics.median(medians) / 1e12:.0f}" if "flops" in rounds[0] else ""
        speed = f"{samples / statistics.median(medians):.3f} | {ratio}" if same else "not compared: another loss |"
        yield f"| {name} | {speed} | {peak:.1f} | {counted} | {rate} | {loss:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small widths, to try the script")
    parser.add_argument("--stage", type=int, choices=[1, 2], default=2, help="1 trains the text encoders too")
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--micro-steps", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="that are timed, of each variant in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one variant in one round")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds, after which no variant is begun")
    parser.add_argument("--out", type=Path, help="the table, written after each variant")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = Shape(arguments.tiny, arguments.stage, arguments.side, arguments.micro_batch, arguments.micro_steps)
    if arguments.one:
        print(json.dumps(measure(shape, arguments.one, arguments.steps)))
        return
    words = sys.argv[1:]
    if "--variants" in words:
        place = words.index("--variants")
        words = words[:place] + words[place + 1 + len(arguments.variants) :]
    found: dict[str, list[dict[str, Any]]] = {}
    began = time.monotonic()
    counts = choose_device().type == "cuda"  # on a CPU counting would disturb what is timed
    for turn in range(arguments.rounds):
        for name in arguments.variants:
            if time.monotonic() - began > arguments.budget:
                print(f"round {turn}: no time left for {name}", file=sys.stderr)
                continue
            meanwhile = partial(count, shape, name) if counts and turn == 0 else dict[str, float]
            answer = ask(words, name, arguments.limit, meanwhile)
            found.setdefault(name, []).append(answer)
            print(json.dumps({"round": turn, **answer}), file=sys.stderr, flush=True)
            if arguments.out:
                arguments.out.write_text("\n".join(list_rows(found, shape)) + "\n")
    print("\n".join(list_rows(found, shape)))


if __name__ == "__main__":
    main()
