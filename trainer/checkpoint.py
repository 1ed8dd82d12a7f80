"""Save, find, verify, restore and retain checkpoints. Nothing in one is a pickle.

A checkpoint is a folder ``step-00001000`` with ``model.safetensors`` (trained parameters, fp32, by classic name),
``optimizer.safetensors`` (``<parameter>.<state>``) and ``train_state.json``, written last. It is written under a
temporary name, forced to the disk, hashed and renamed: a folder with the final name is whole.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.errors import UserError
from trainer.files import TEMPORARY_PREFIX, sha256_file, sync_file, sync_folder, temporary_path, write_json
from trainer.models.sdxl import load_trained, trained_parameters

FORMAT_VERSION = 1
MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "train_state.json"
SHARED = "shared."  # prefix of tensors that several parameters' states have in common


def checkpoint_name(step: int) -> str:
    """The folder of a checkpoint that has made ``step`` optimizer steps."""
    return f"step-{step:08d}"


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


def find_newest(run_folder: Path) -> Path | None:
    """The complete checkpoint of a run with the most steps; None if there is none."""
    return max(list_checkpoints(run_folder / "checkpoints"), key=step_of, default=None)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, by step; one that was set aside under another name is none."""
    named = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
    return sorted((path for path in named if (path / STATE_FILE).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The steps that a checkpoint of ours has made, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def read_train_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        UserError: when it is no checkpoint, or one of another format.
    """
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint} is not a complete checkpoint: {STATE_FILE} cannot be read ({error})") from error
    if state.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{checkpoint} has format {state.get('format_version')}, this program reads {FORMAT_VERSION}")
    return state


def verify_checkpoint(checkpoint: Path) -> None:
    """Compare every file with its hash.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    for name, expected in read_train_state(checkpoint)["files"].items():
        file = checkpoint / name
        if not file.is_file():
            raise UserError(f"{file} is missing. Move {checkpoint} away to resume from the checkpoint before it")
        if sha256_file(file) != expected:
            raise UserError(
                f"{file} is damaged: its SHA-256 is not the one in {STATE_FILE}. Move {checkpoint} away to resume "
                "from the checkpoint before it"
            )


def restore_checkpoint(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Put a checkpoint's weights and optimizer state into place, bit by bit."""
    load_trained(model, load_file(checkpoint / MODEL_FILE))
    states: dict[str, dict[str, Any]] = {}
    for key, value in read_optimizer_state(checkpoint / OPTIMIZER_FILE):
        name, _, state = key.rpartition(".")
        states.setdefault(name, {})[state] = value
    moved: dict[int, Tensor] = {}  # what was shared stays shared
    for name, parameter in trained_parameters(model).items():
        for state, value in states.get(name, {}).items():
            if isinstance(value, Tensor):
                value = moved.setdefault(id(value), value.to(parameter.device, copy=True))
            optimizer.state[parameter][state] = value


def read_optimizer_state(file: Path) -> Iterator[tuple[str, Tensor | float]]:
    """(``<parameter>.<state>``, value) of all states; shared tensors are the same object each time."""
    with safe_open(file, framework="pt") as reader:
        rest = json.loads(reader.metadata()["state"])
        names = [name for name in reader.keys() if not name.startswith(SHARED)]  # noqa: SIM118  # not a mapping
        shared = {name: None for name in reader.keys() if name.startswith(SHARED)}  # noqa: SIM118
        common = {name: reader.get_tensor(name) for name in shared}
        for name in names:
            yield name, reader.get_tensor(name)
    for name, target in rest["shared"].items():
        yield name, common[target]
    yield from rest["numbers"].items()


def retain_checkpoints(folder: Path, keep_last: int, keep_every_steps: int | None) -> None:
    """Delete all but the last few checkpoints and those at multiples of ``keep_every_steps``."""
    for path in list_checkpoints(folder)[:-keep_last]:
        if keep_every_steps and step_of(path) % keep_every_steps == 0:
            continue
        doomed = temporary_path(path)  # a folder with its final name is whole, also while it is deleted
        path.rename(doomed)
        shutil.rmtree(doomed)


# What may change between the run that wrote a checkpoint and the one that resumes it: nothing of the samples,
# the model or the optimizer depends on these (attention and compile: the same batches, not the same bits).
CHANGEABLE_SECTIONS = {"memory", "checkpoint", "logging", "sampling", "publish"}
CHANGEABLE_KEYS = {
    "data.micro_batch_size",
    "data.num_workers",
    "data.prefetch_factor",
    "model.attention",
    "model.compile",
    "run.num_processes",
}
LENGTH_KEYS = {"schedule.epochs", "schedule.max_steps"}  # under a constant rate only


def fixed_values(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of all that must stay the same across a resume."""
    flat = {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}
    constant = flat["schedule.lr"] == "constant"
    return {
        key: value
        for key, value in flat.items()
        if key.partition(".")[0] not in CHANGEABLE_SECTIONS
        and key not in CHANGEABLE_KEYS
        and not (constant and key in LENGTH_KEYS)
    }


def check_resumable(checkpoint: Path, train_state: dict[str, Any], written: dict[str, Any], digest: str) -> None:
    """Refuse to resume under another config.

    ``written`` is the config as the user wrote it; ``digest`` is the SHA-256 of its resolved fixed values, which
    tells a changed environment variable without storing it.

    Raises:
        UserError: naming every changed key with both values.
    """
    before, now = fixed_values(train_state["config"]), fixed_values(written)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        lines = "\n".join(f"  {key}: {before.get(key)!r} in the checkpoint, {now.get(key)!r} now" for key in changed)
        raise UserError(
            f"{checkpoint} was made with another config, and going on would not continue that run:\n{lines}\n"
            "Put these back, or choose another run.name"
        )
    if train_state["config_digest"] != digest:
        raise UserError(f"{checkpoint}: an environment variable in the config has another value than in that run")


def scaler_state(scaler: Any) -> dict[str, Any] | None:
    """The loss scaler's numbers as JSON; None without one."""
    if scaler is None:
        return None
    state = scaler.state_dict()
    return {"scale": state["scale"], "growth_tracker": state["_growth_tracker"]}


def restore_scaler(scaler: Any, state: dict[str, Any] | None) -> None:
    """Put the loss scaler's numbers back."""
    if scaler is not None and state is not None:
        scaler.load_state_dict(
            {**scaler.state_dict(), "scale": state["scale"], "_growth_tracker": state["growth_tracker"]}
        )
