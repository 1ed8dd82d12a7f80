"""What is refused, or noted, of where a run is launched: packages, Accelerate's settings, the number of processes."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

from trainer.config.rules import explain_processes
from trainer.config.schema import Config
from trainer.core.asked import check_asked
from trainer.core.errors import UserError

OTHER_MODES = {  # environment variable -> what it switches on; accelerate launch sets them, from its own config too
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
FOR_CUDA = ("bitsandbytes", "xformers")


def check_installed(config: Config) -> None:
    """Refuse what needs a package that is not here; trackers would be left out by Accelerate without a word.

    Raises:
        UserError: with the command that installs it.
    """
    needed: list[tuple[str, str]] = [(f"logging.trackers: {name}", name) for name in config.logging.trackers]
    needed += [("optim.name: adamw8bit", "bitsandbytes")] if config.optim.name == "adamw8bit" else []
    needed += [("model.attention: xformers", "xformers")] if config.model.attention == "xformers" else []
    stands_for = {"tensorboard": ("tensorboard", "tensorboardX")}
    absent = [
        f"{what} needs a package that is not installed: make setup brings it"
        f"{' where there is an NVIDIA GPU' if package in FOR_CUDA else ''}, and so does pip install --constraint "
        f"constraints.txt {package}"
        for what, package in needed
        if not any(find_spec(name) for name in stands_for.get(package, (package,)))
    ]
    if absent:
        raise UserError("\n".join(absent))


def check_environment() -> None:
    """Refuse ways of sharding a model that are not supported here.

    Raises:
        UserError: naming the environment variable; it may come from Accelerate's own config file.
    """
    for variable, mode in OTHER_MODES.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise UserError(
                f"Accelerate is set to use {mode} ({variable} is {os.environ[variable]}), and here each GPU has a "
                "whole copy of the model. Start with accelerate launch --multi_gpu --num_processes N train.py ..., or "
                "with python train.py ... on one GPU; where accelerate config wrote it, name another file by "
                "--config_file"
            )


def ignored_settings() -> Iterator[str]:
    """Settings of Accelerate's that the config decides instead, as notes."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no"):
        yield (
            f"Accelerate's dynamo backend {backend} is not used (from accelerate config, --dynamo_backend or "
            "ACCELERATE_DYNAMO_BACKEND): model.compile says whether the UNet is compiled"
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("", "1", "auto"):
        yield (
            f"Accelerate's {steps} gradient accumulation steps are not used: the number follows from "
            "data.global_batch_size, data.micro_batch_size and the number of processes"
        )


def check_processes(config: Config, processes: int) -> None:
    """Compare the number of processes with what was asked for and with the batch sizes.

    Raises:
        UserError: when they differ; ``accelerate launch --cpu --num_processes 2`` runs one and says nothing.
    """
    check_asked(processes, config.run.num_processes)
    data = config.data
    if data.global_batch_size % (data.micro_batch_size * processes):
        raise UserError(explain_processes(processes, data.micro_batch_size, data.global_batch_size))
