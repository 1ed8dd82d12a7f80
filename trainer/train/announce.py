"""What a run says for people: at its start what is about to happen, with warnings; at its end what has happened."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trainer.config.run_names import name_run
from trainer.config.schema import PrecisionConfig
from trainer.core.commands import command
from trainer.core.console import NextStep, Result, format_duration
from trainer.core.disk import format_bytes, free_bytes
from trainer.core.distributed import uses_cpu
from trainer.core.layout import CHECKPOINTS_FOLDER, RUN_PAGE_FILE
from trainer.core.progress import format_count
from trainer.data.plan import Plan
from trainer.data.subset import describe_subset
from trainer.model.checkpoint import find_newest, list_checkpoints, measure_checkpoint, step_of
from trainer.model.sdxl import trained_parameters
from trainer.train.launch import RunInputs
from trainer.train.policy import describe_policy, warn_of_memory
from trainer.train.run import run_path
from trainer.train.save import count_more_checkpoints, estimate_size, find_leftovers
from trainer.train.stops import STOPPED

MAX_NAMED = 4  # buckets


def describe_start(inputs: RunInputs, sdxl: nn.Module) -> str:
    """The steps that this attempt is to make, in some lines."""
    config, plan, first, last, resumed = inputs.config, inputs.data.plan, inputs.first, inputs.last, inputs.resumed
    data, processes = config.data, inputs.accelerator.num_processes
    parameters = trained_parameters(sdxl)
    parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in parameters))
    size = expect_size(inputs, sdxl)
    keep = config.checkpoint
    milestones = f" and those at multiples of {keep.keep_every_steps:,}" if keep.keep_every_steps else ""
    begins = "a new run"
    if resumed is not None:
        own = resumed.folder.parent.parent.resolve() == run_path(config).resolve()
        begins = f"{'resumed from' if own else 'begins with'} {resumed.folder}"
    whole = f", {describe_subset(inputs.facts['subset'])}" if inputs.data.index.chosen is not None else ""
    rows = {
        "folder": f"{run_path(config)}, {begins}",
        "data": f"{format_count(inputs.facts['images'], 'image')} in {format_count(len(plan.buckets), 'bucket')}, "
        f"{data.shards}{whole}",
        "steps": f"{first:,} to {last:,}, epochs {plan.epochs_until(first):.2f} to {plan.epochs_until(last):.2f}",
        "batch": f"{format_count(data.global_batch_size, 'sample')} a step = "
        f"{processes} process{'es' if processes > 1 else ''} x {data.micro_batch_size} in a micro-batch x "
        f"{inputs.data.per_step // processes} accumulated",
        "trained": f"{sum(value.numel() for value in parameters.values()):,} parameters of {parts}, "
        f"{describe_weights(config.precision)}, on {inputs.accelerator.device.type}",
        "memory": describe_policy(inputs.facts["memory"]),
        "checkpoints": f"every {format_count(keep.every_steps, 'step')} and at the end, the last {keep.keep_last}"
        f"{milestones} kept, about {format_bytes(size)} each",
        "page": f"{run_path(config) / RUN_PAGE_FILE}, rewritten as the run goes on",
    }
    lines = [f"{config.run.name}, stage {config.run.stage}"] + [f"  {name:<12}{text}" for name, text in rows.items()]
    return "\n".join(lines)


def expect_size(inputs: RunInputs, sdxl: nn.Module) -> int:
    """Bytes of a checkpoint."""
    if inputs.resumed is not None:
        return measure_checkpoint(inputs.resumed.folder)
    return estimate_size(sdxl, inputs.config.optim.name)


def describe_weights(precision: PrecisionConfig) -> str:
    """The arithmetic of a training, in some words."""
    compute = precision.compute
    match precision.weights:
        case "autocast":
            return f"{compute} over fp32 weights"
        case "master":
            return f"{compute} weights with fp32 masters, gradients summed in {precision.gradients}"
        case "stochastic":
            return f"{compute} weights rounded stochastically, gradients summed in {precision.gradients}"


def find_warnings(inputs: RunInputs, sdxl: nn.Module) -> list[str]:
    """What somebody should know before the first step, and could still change."""
    data, size = inputs.config.data, expect_size(inputs, sdxl)
    of_weights = warn_of_weights(inputs.facts["weights"])
    of_data = warn_of_data(inputs.data.plan, inputs.facts["images"], data.global_batch_size, inputs.last)
    gpus = 0 if uses_cpu() else torch.cuda.device_count()
    of_gpus = warn_of_gpus(inputs.accelerator.num_processes, gpus, inputs.config.run.num_processes)
    of_cpu = warn_of_cpu(inputs.config.precision.compute, uses_cpu())
    of_memory = warn_of_memory(inputs.facts["memory"], inputs.config)
    return [*of_data, *of_weights, *of_gpus, *of_cpu, *of_memory, *warn_of_disk(inputs, size)]


def warn_of_gpus(processes: int, gpus: int, asked: int | None) -> Iterator[str]:
    """GPUs of this machine that nothing asks for."""
    if processes == 1 < gpus and asked is None:
        yield (
            f"{gpus} GPUs are here, and one process uses one of them: accelerate launch --num_processes {gpus} uses "
            "all (run.num_processes=1 says that one is meant)"
        )


def warn_of_cpu(compute: str, on_cpu: bool) -> Iterator[str]:
    """Arithmetic that was meant for a GPU."""
    if on_cpu and compute == "bf16":
        seen = "no GPU is seen" if not torch.cuda.is_available() else "ACCELERATE_USE_CPU is set"
        yield (
            f"{seen}: this run computes bf16 on the CPU, which most emulate, slower than fp32 (precision.compute=fp32 "
            "precision.frozen=fp32)"
        )


def warn_of_data(plan: Plan, images: int, batch: int, last: int) -> Iterator[str]:
    """What the data are too few for."""
    if images < batch:
        few = "1 image is" if images == 1 else f"{images} images are"
        yield f"{few} fewer than data.global_batch_size {batch}: a step sees some of them more than once"
    repeating = plan.repeating_buckets()
    if repeating:
        named = ", ".join(f"{width}x{height}" for width, height in repeating[:MAX_NAMED])
        more = f" and {len(repeating) - MAX_NAMED} more" if len(repeating) > MAX_NAMED else ""
        verb = "holds" if len(repeating) == 1 else "hold"
        yield (
            f"{len(repeating)} of {format_count(len(plan.buckets), 'bucket')} {verb} fewer images than "
            f"data.bucket_batch_size {plan.unit_size}, so that an image repeats within a unit: {named}{more} "
            "(scripts/inspect_shards.py shows all)"
        )
    if (epochs := plan.epochs_until(last)) < 1:
        yield f"the run ends at {epochs:.2f} of its first epoch: some images may never be seen"


def warn_of_weights(record: dict[str, Any] | None) -> Iterator[str]:
    """Rules of weights that change nothing, as a misspelt tag or column makes them."""
    for number, rule in enumerate(record["rules"] if record else ()):
        if not rule["images"]:
            yield f"data.weights.{number} holds for no image: is its tag or column spelt as the index has it?"


def warn_of_disk(inputs: RunInputs, size: int) -> Iterator[str]:
    """Whether the checkpoints to come fit; ``size`` is that of one, in bytes."""
    keep, folder = inputs.config.checkpoint, run_path(inputs.config) / CHECKPOINTS_FOLDER
    existing = [step_of(path) for path in list_checkpoints(folder)]
    steps = range(inputs.first + 1, inputs.last + 1)
    coming = [step for step in steps if step % keep.every_steps == 0 or step == inputs.last]
    more = count_more_checkpoints(existing, coming, keep.keep_last, keep.keep_every_steps)
    free = free_bytes(folder) + sum(measure_checkpoint(path) for path in find_leftovers(folder))
    if more * size > free:
        yield (
            f"{more} more checkpoints will lie in {folder} at once (an old one goes only when a new one is whole), "
            f"{format_bytes(more * size)}, and {format_bytes(free)} are free, which is enough for {free // size}: "
            "make room, or lower checkpoint.keep_last"
        )


def describe_end(inputs: RunInputs, made: int, seconds: float, skipped: int, reason: str | None) -> str:
    """What has been made, and why not more."""
    plan, last = inputs.data.plan, inputs.last
    state = "all" if made == last else f"stopped at step {made:,} by {reason}; the same command resumes there"
    withheld = f", {skipped:,} of all skipped by loss scaling" if skipped else ""
    return (
        f"{inputs.config.run.name}: {format_count(made - inputs.first, 'step')} in {format_duration(seconds)}, "
        f"{made:,} of {last:,} made ({state}), {plan.epochs_until(made):.2f} epochs{withheld}"
    )


def make_result(inputs: RunInputs, said: str, made: int, reason: str | None = None) -> Result:
    """What training ends with: the last checkpoint, and the command that makes a model of it."""
    path = run_path(inputs.config)
    newest, code = find_newest(path), 0 if made >= inputs.last else STOPPED
    facts = {
        "run": inputs.config.run.name,
        "folder": str(path),
        "first_step": inputs.first,
        "step": made,
        "last_step": inputs.last,
        "finished": made >= inputs.last,
        "stopped_by": None if made >= inputs.last else reason,
        "images": inputs.facts["images"],
    }
    if newest is None:
        return Result(said, facts=facts, code=code)
    size = format_bytes(measure_checkpoint(newest))
    exporting = NextStep("export it", command("scripts/export.py", name_run(path)))
    return Result(f"{said}\n  last checkpoint: {newest}, {size}", [newest], facts, [exporting], code)
