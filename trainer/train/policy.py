"""memory.policy: auto, chosen once from the memory model, recorded in run.json and checkpoints, and used on resume."""

from collections.abc import Iterator
from typing import Any

from trainer.config.schema import Config, MemoryConfig, MemoryPolicy
from trainer.core.console import log
from trainer.core.disk import format_bytes
from trainer.model.base import Base
from trainer.model.sdxl import outline_sdxl
from trainer.train.launch import RunInputs
from trainer.train.memory import Shape, count_step, estimate

FITS = 0.92  # of a device's memory: the CUDA context, workspaces and holes between segments take the rest
FASTEST_FIRST: tuple[MemoryPolicy, ...] = ("none", "selective", "full")
WHAT_COUNTS = {  # a choice is made for these, and anew where one of them is another
    "device_memory": "the device's memory",
    "processes": "the number of processes",
    "micro_batch_size": "data.micro_batch_size",
}


def choose_policy(inputs: RunInputs, device_memory: int | None) -> dict[str, Any]:
    """What a run records of its policy: the policy, and where it was chosen, for what, and the bytes that each needs.

    Args:
        inputs: of the run, with the checkpoint that it begins with.
        device_memory: bytes of the smallest device of all processes; None on the CPU.
    """
    config = inputs.config
    if config.memory.policy != "auto":
        return {"policy": config.memory.policy}
    processes, micro_batch_size = inputs.accelerator.num_processes, config.data.micro_batch_size
    now = {"device_memory": device_memory, "processes": processes, "micro_batch_size": micro_batch_size}
    resumed = inputs.resumed
    before = resumed.state.get("memory", {}) if resumed is not None and not resumed.begins_fork else {}
    if before.get("chosen_for") == now:
        return dict(before)
    policy: MemoryPolicy = "full"
    needs: dict[str, int] = {}
    if device_memory is not None:
        bucket = max(inputs.data.plan.buckets, key=lambda size: size[0] * size[1])
        policy, needs = find_fitting(config, inputs.base, bucket, FITS * device_memory)
    if other := [
        name for name in WHAT_COUNTS if "chosen_for" in before and before["chosen_for"].get(name) != now[name]
    ]:
        changed = ", ".join(
            f"{WHAT_COUNTS[name]} (was {before['chosen_for'].get(name)}, is {now[name]})" for name in other
        )
        log.info("memory.policy auto: chosen anew for %s: %s, before %s", changed, policy, before["policy"])
    return {"policy": policy, "chosen_for": now, "needs": needs}


def find_fitting(
    config: Config, base: Base, bucket: tuple[int, int], limit: float
) -> tuple[MemoryPolicy, dict[str, int]]:
    """The fastest policy whose step fits the limit in bytes, else full; and what those that were looked at need."""
    shape = Shape(config.data.micro_batch_size, *bucket, chunks=config.captions.max_token_length // 75)
    needs: dict[str, int] = {}
    for policy in FASTEST_FIRST:
        model = outline_sdxl(base, config.model, config.precision, MemoryConfig(policy))
        counted = count_step(model, shape, config.precision)
        needs[policy] = estimate(model, config.optim.name, config.precision, counted.peak).total
        if needs[policy] <= limit:
            return policy, needs
    return "full", needs


def describe_policy(chosen: dict[str, Any]) -> str:
    """A line of the start."""
    policy = chosen["policy"]
    if "chosen_for" not in chosen:
        return f"policy {policy}"
    if policy not in chosen["needs"]:
        return f"policy {policy}, chosen by auto for the CPU"
    memory = chosen["chosen_for"]["device_memory"]
    return (
        f"policy {policy}, chosen by auto: about {format_bytes(chosen['needs'][policy])} of {format_bytes(memory)} "
        "with the largest bucket"
    )


def warn_of_memory(chosen: dict[str, Any], config: Config) -> Iterator[str]:
    """Where by the count not even full recomputation fits."""
    need = chosen.get("needs", {}).get("full")
    if need is None or need <= FITS * chosen["chosen_for"]["device_memory"]:
        return
    has = chosen["chosen_for"]["device_memory"]
    remedies = []
    if config.data.micro_batch_size > 1:
        remedies.append(
            f"lower data.micro_batch_size ({config.data.micro_batch_size}), which changes no step's samples"
        )
    if config.precision.weights == "autocast" and config.precision.compute != "fp32":
        remedies.append("precision.weights=master for weights in 16 bits (a new run)")
    if config.optim.name == "adamw":
        remedies.append("optim.name=adamw8bit or adafactor for a smaller state of the optimizer (a new run)")
    remedies.append("train fewer parts (a new run)")
    yield (
        f"memory.policy auto: none fits. Even full takes about {format_bytes(need)} with the largest bucket, and the "
        f"GPU has {format_bytes(has)}, of which {FITS:.0%} are counted on. What would help: {'; '.join(remedies)}"
    )
