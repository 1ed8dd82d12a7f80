"""Save and retain checkpoints: each is written under a temporary name, forced to the disk, hashed and renamed."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.core.errors import UserError
from trainer.core.files import TEMPORARY_PREFIX, sha256_file, sync_file, sync_folder, temporary_path, write_json
from trainer.model.checkpoint import (
    FORMAT_VERSION,
    MODEL_FILE,
    OPTIMIZER_FILE,
    SHARED,
    STATE_FILE,
    checkpoint_name,
    list_checkpoints,
    step_of,
)
from trainer.model.sdxl import trained_parameters


def save_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, train_state: dict[str, Any]) -> Path:
    """Write ``folder/step-XXXXXXXX``, whole or not at all. Call it on one rank only.

    ``train_state`` is JSON with at least ``step``; format_version and the files' hashes are added.

    Raises:
        UserError: when that checkpoint exists; nothing is overwritten.
    """
    final = folder / checkpoint_name(train_state["step"])
    if final.exists():
        raise UserError(f"{final} exists already and is not overwritten; move it away, or choose another run.name")
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    temporary = temporary_path(final)
    temporary.mkdir()
    parameters = trained_parameters(model)
    save_file({name: value.detach().contiguous() for name, value in parameters.items()}, temporary / MODEL_FILE)
    tensors, metadata = collect_optimizer_state(parameters, optimizer)
    save_file(tensors, temporary / OPTIMIZER_FILE, metadata=metadata)
    hashes = {}
    for name in (MODEL_FILE, OPTIMIZER_FILE):
        (temporary / name).chmod(0o644)  # safetensors writes 0600
        sync_file(temporary / name)
        hashes[name] = sha256_file(temporary / name)
    write_json(temporary / STATE_FILE, {"format_version": FORMAT_VERSION, **train_state, "files": hashes})
    sync_folder(temporary)
    temporary.rename(final)
    sync_folder(folder)
    return final


def remove_leftovers(folder: Path) -> None:
    """Delete temporary checkpoints that a killed process left behind."""
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}step-*"):
        shutil.rmtree(leftover)


def collect_optimizer_state(
    parameters: dict[str, nn.Parameter], optimizer: Optimizer
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by ``<parameter>.<state>``; numbers, and names of shared tensors, as JSON in the metadata."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    shared: dict[str, str] = {}
    counted: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        for state, value in sorted(optimizer.state.get(parameter, {}).items()):  # a restored state is in another order
            if isinstance(value, Tensor):
                counted.setdefault(value.data_ptr(), []).append(f"{name}.{state}")
                tensors[f"{name}.{state}"] = value.detach().contiguous()
            elif value is not None:
                numbers[f"{name}.{state}"] = value
    # safetensors refuses tensors that share storage, as the maps of bitsandbytes do
    for number, names in enumerate(names for names in counted.values() if len(names) > 1):
        tensors[f"{SHARED}{number}"] = tensors[names[0]]
        for name in names:
            del tensors[name]
            shared[name] = f"{SHARED}{number}"
    # one entry: safetensors writes several in an order that changes from process to process
    return tensors, {"state": json.dumps({"numbers": numbers, "shared": shared})}


def retain_checkpoints(folder: Path, keep_last: int, keep_every_steps: int | None) -> None:
    """Delete all but the last few checkpoints and those at multiples of ``keep_every_steps``."""
    for path in list_checkpoints(folder)[:-keep_last]:
        if keep_every_steps and step_of(path) % keep_every_steps == 0:
            continue
        doomed = temporary_path(path)  # a folder with its final name is whole, also while it is deleted
        path.rename(doomed)
        shutil.rmtree(doomed)


def scaler_state(scaler: Any) -> dict[str, Any] | None:
    """The loss scaler's numbers as JSON; None without one."""
    if scaler is None:
        return None
    state = scaler.state_dict()
    return {"scale": state["scale"], "growth_tracker": state["_growth_tracker"]}
