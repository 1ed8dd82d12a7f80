"""Save and retain checkpoints: each is written under a temporary name, forced to the disk, hashed and renamed."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.config.schema import OptimizerName
from trainer.core.disk import disk_space
from trainer.core.errors import UserError
from trainer.core.files import TEMPORARY_PREFIX, sha256_file, sync_file, sync_folder, temporary_path, write_json
from trainer.core.layout import MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, checkpoint_name
from trainer.model.checkpoint import CHECKPOINT_FORMAT, SHARED, list_checkpoints, step_of
from trainer.model.sdxl import trained_parameters
from trainer.model.weights_file import save_tensors
from trainer.train.narrow import NarrowOptimizer
from trainer.train.optim import state_bytes

OVERHEAD = 2_000_000  # bytes of headers and train_state.json, above what has been seen


def save_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, train_state: dict[str, Any]) -> Path:
    """Write ``folder/step-XXXXXXXX``, whole or not at all. Call it on one rank only.

    ``train_state`` is JSON with at least ``step``; format_version and the files' hashes are added.

    Raises:
        UserError: when that checkpoint exists: nothing is overwritten; or where it does not fit on the disk.
    """
    final = folder / checkpoint_name(train_state["step"])
    if final.exists():
        raise UserError(f"{final} exists already and is not overwritten; move it away, or choose another run.name")
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in find_leftovers(folder):
        shutil.rmtree(leftover)
    parameters = trained_parameters(model)
    weights = read_weights(parameters, optimizer)
    tensors, metadata = collect_optimizer_state(parameters, optimizer)
    size = sum(tensor.nbytes for tensor in (*weights.values(), *tensors.values())) + OVERHEAD
    temporary = temporary_path(final)
    with disk_space(folder, f"checkpoint {final}", size):
        try:
            temporary.mkdir()
            save_tensors(weights, temporary / MODEL_FILE)
            save_tensors(tensors, temporary / OPTIMIZER_FILE, metadata)
            write_train_state(temporary, train_state)
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(folder)
    return final


def write_train_state(folder: Path, train_state: dict[str, Any]) -> None:
    """Force a checkpoint's tensors to the disk, hash them, and write what the checkpoint says of itself."""
    hashes = {}
    for name in (MODEL_FILE, OPTIMIZER_FILE):
        (folder / name).chmod(0o644)  # safetensors writes 0600
        sync_file(folder / name)
        hashes[name] = sha256_file(folder / name)
    write_json(folder / STATE_FILE, {"format_version": CHECKPOINT_FORMAT, **train_state, "files": hashes})
    sync_folder(folder)


def estimate_size(model: nn.Module, optimizer: OptimizerName) -> int:
    """Bytes of a checkpoint of a run that has made none: an optimizer makes its state in its first step."""
    return OVERHEAD + sum(
        4 * value.numel() + state_bytes(value.shape, optimizer) for value in trained_parameters(model).values()
    )


def count_more_checkpoints(
    existing: Sequence[int], coming: Sequence[int], keep_last: int, keep_every: int | None
) -> int:
    """How many more checkpoints than now will lie there at once: an old one goes only when a new one is whole.

    Args:
        existing: steps of the checkpoints that are there.
        coming: steps at which one will be saved, later than those.
    """
    steps = [*existing, *coming]
    before_last = steps[: max(0, len(steps) - 1 - keep_last)]  # all that the last save finds, but for the last few
    milestones = sum(keep_every is not None and step % keep_every == 0 for step in before_last)
    return max(1, milestones + min(len(steps), keep_last + 1) - len(existing))


def find_leftovers(folder: Path) -> list[Path]:
    """Temporary checkpoints that a killed process left: each save begins with their removal."""
    return list(folder.glob(f"{TEMPORARY_PREFIX}step-*"))


def read_weights(parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """fp32 values of trained parameters, whatever holds them."""
    if isinstance(optimizer, NarrowOptimizer):
        return {name: optimizer.weights.get(value) for name, value in parameters.items()}
    return {name: value.detach().contiguous() for name, value in parameters.items()}


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
