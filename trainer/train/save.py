"""Save and retain checkpoints: each is written under a temporary name, forced to the disk, hashed and renamed."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.config.schema import OptimizerName
from trainer.core.console import log
from trainer.core.disk import disk_space
from trainer.core.errors import UserError
from trainer.core.files import TEMPORARY_PREFIX, set_aside, sync_file, sync_folder, temporary_path, write_bytes
from trainer.core.layout import CHECKPOINT_FILE, checkpoint_name, find_record, piece_name
from trainer.model.checkpoint import CHECKPOINT_FORMAT, list_checkpoints, seal, step_of
from trainer.model.restore import SHARED
from trainer.model.sdxl import trained_parameters
from trainer.model.weights_file import write_tensors
from trainer.train.narrow import NarrowOptimizer
from trainer.train.optim import state_bytes

OVERHEAD = 2_000_000  # bytes of headers and checkpoint.json, above what has been seen
PIECE_BYTES = 2**30  # of the parameters in fp32 that share a file, unless one alone is larger
INCOMPLETE = "incomplete"  # behind the name of a folder that was in the way


@dataclass(frozen=True)
class TensorFile:
    """A file of a checkpoint that is to be written."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] | None = None


def write_checkpoint(folder: Path, files: Iterable[TensorFile], train_state: dict[str, Any], size: int) -> Path:
    """Write the files of a checkpoint, which take about ``size`` bytes, and what it says of itself."""
    final = folder / checkpoint_name(train_state["step"])
    make_room(final)
    temporary = temporary_path(final)
    with disk_space(folder, f"checkpoint {final}", size + OVERHEAD):
        try:
            temporary.mkdir()
            sums: dict[str, tuple[str, int]] = {}
            with ThreadPoolExecutor(1) as pool:  # one file goes to the disk while the next is hashed
                syncing = []
                for file in files:
                    sums[file.name] = write_tensors(temporary / file.name, file.tensors, file.metadata)
                    syncing.append(pool.submit(sync_file, temporary / file.name))
                for synced in syncing:
                    synced.result()
            listed = {name: {"sha256": digest, "size": length} for name, (digest, length) in sums.items()}
            first = {"format_version": CHECKPOINT_FORMAT, "name": final.name}
            write_bytes(temporary / CHECKPOINT_FILE, seal({**first, **train_state, "files": listed}))
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(folder)
    return final


def make_room(final: Path) -> None:
    """Remove what a killed process left, and set aside a folder of the checkpoint's name that is not whole.

    Raises:
        UserError: where a whole one lies there: nothing is overwritten.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(final.parent)
    if not os.path.lexists(final):
        return
    if find_record(final) is not None:
        raise UserError(f"{final} exists already and is not overwritten; move it away, or choose another run.name")
    aside = set_aside(final, INCOMPLETE)
    log.warning("warning: %s was no whole checkpoint and is in the way of one: it lies in %s now", final, aside)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary checkpoints that a killed process left."""
    for leftover in find_leftovers(folder):
        shutil.rmtree(leftover)


def divide(parameters: dict[str, nn.Parameter]) -> list[dict[str, nn.Parameter]]:
    """What shares a file: parameters in the model's order, up to PIECE_BYTES in fp32.

    A function of names and shapes alone: the same files, whoever writes them and whatever holds the values.
    """
    pieces: list[dict[str, nn.Parameter]] = [{}]
    size = 0
    for name, parameter in parameters.items():
        own = 4 * parameter.numel()
        if pieces[-1] and size + own > PIECE_BYTES:
            pieces.append({})
            size = 0
        pieces[-1][name] = parameter
        size += own
    return pieces


def list_tensor_files(model: nn.Module, optimizer: Optimizer) -> Iterator[TensorFile]:
    """All of a checkpoint's tensors, a piece after the other; those of a plain optimizer are the very ones it has."""
    for number, parameters in enumerate(divide(trained_parameters(model)), start=1):
        yield TensorFile(piece_name("model", number), read_weights(parameters, optimizer))
        yield TensorFile(piece_name("optimizer", number), *collect_optimizer_state(parameters, optimizer))


def measure_state(model: nn.Module, optimizer: Optimizer) -> int:
    """Bytes of a checkpoint's tensors."""
    parameters = trained_parameters(model)
    states = [value for parameter in parameters.values() for value in optimizer.state.get(parameter, {}).values()]
    held = sum(value.nbytes for value in states if isinstance(value, Tensor))
    return held + sum(4 * parameter.numel() for parameter in parameters.values())


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
        return {name: optimizer.weights.get(value) for name, value in parameters.items()}  # on their device
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
