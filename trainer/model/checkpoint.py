"""The format of checkpoints: names, find, read, verify, restore. Nothing in one is a pickle.

A checkpoint is a folder ``step-00001000`` with ``model.safetensors`` (trained parameters, fp32, by classic name),
``optimizer.safetensors`` (``<parameter>.<state>``) and ``train_state.json``, written last. It is written under a
temporary name, forced to the disk, hashed and renamed: a folder with the final name is whole.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.core.errors import UserError
from trainer.core.files import sha256_file, shown_name
from trainer.core.layout import (
    CHECKPOINT_NAME,
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    MODEL_FILE,
    MODEL_INDEX_FILE,
    NEWEST,
    OPTIMIZER_FILE,
    STATE_FILE,
)
from trainer.core.progress import BYTES, Meter
from trainer.model.sdxl import load_trained, put_weights, trained_parameters
from trainer.model.weights_file import LazyFile, check_finite

CHECKPOINT_FORMAT = 1
FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
MAX_LISTED = 8  # checkpoints, or runs, in a message
OLDER = "move this checkpoint away to resume from the one before"
SHARED = "shared."  # prefix of tensors that several parameters' states have in common


def find_newest(run_folder: Path) -> Path | None:
    """The complete checkpoint of a run with the most steps; None if there is none."""
    return max(list_checkpoints(run_folder / CHECKPOINTS_FOLDER), key=step_of, default=None)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, by step; one that was set aside under another name is none."""
    named = (path for path in folder.glob("step-*") if CHECKPOINT_NAME.fullmatch(path.name))
    return sorted((path for path in named if (path / STATE_FILE).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The steps that a checkpoint of ours has made, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def measure_checkpoint(path: Path) -> int:
    """Bytes of a checkpoint that lies there."""
    return sum(file.stat().st_size for file in path.iterdir())


def find_checkpoint(reference: str | Path, run: Path | None = None, key: str = "") -> Path:
    """The complete checkpoint that somebody means.

    A checkpoint's folder or a file in it, a run's folder or its ``checkpoints`` (the newest), or ``latest`` and a step
    (``step-00001000``, ``1000``): in ``run`` where these stand alone, else in the folder before them. ``key`` is the
    config's, for messages.

    Raises:
        UserError: saying what the reference is instead, and which checkpoints there are.
    """
    path = Path(reference)
    alone = len(path.parts) == 1 and not path.exists()
    home = (run if alone else None) or (path.parent.parent if path.parent.name == CHECKPOINTS_FOLDER else path.parent)
    folder = path.parent if path.name in FILES else path
    if (folder / STATE_FILE).is_file():
        return folder
    if not path.exists():
        found = find_newest(home) if path.name in NEWEST else None
        if step := re.fullmatch(r"(?:step-)?(\d+)", path.name):
            found = next(
                (one for one in list_checkpoints(home / CHECKPOINTS_FOLDER) if step_of(one) == int(step[1])), None
            )
    else:
        found = find_newest(path.parent if path.name == CHECKPOINTS_FOLDER else path)
    if found is None:
        raise UserError(
            f"{f'{key}: ' if key else ''}{reference} {describe_path(path)}. {suggest_checkpoints(path, home)}"
        )
    return found


def describe_path(path: Path) -> str:
    """What something is that is no complete checkpoint and no run with one."""
    if not path.exists():
        return "names neither a checkpoint nor a run"
    if path.is_file():
        return "is a file, not a checkpoint"
    if (path / MODEL_INDEX_FILE).is_file():
        return "is a model in diffusers' folders, not a checkpoint"
    if (path / MODEL_FILE).is_file() or re.match(r"step-\d", path.name):
        return f"is not a complete checkpoint: {STATE_FILE} is missing"
    if (path / CONFIG_FILE).is_file() or path.name == CHECKPOINTS_FOLDER or (path / CHECKPOINTS_FOLDER).is_dir():
        return "has no complete checkpoint"
    return "is neither a checkpoint nor a run"


def suggest_checkpoints(path: Path, home: Path) -> str:
    """Which checkpoints there are: of the run that was meant, else which runs beside it have some."""
    for run in (home, path, *path.parents):
        if steps := [step.name for step in list_checkpoints(run / CHECKPOINTS_FOLDER)]:
            left_out = f"{len(steps) - MAX_LISTED} older ones and " if len(steps) > MAX_LISTED else ""
            return f"There are, in {run / 'checkpoints'}: {left_out}{', '.join(steps[-MAX_LISTED:])}"
    for folder in (path, home, home.parent, Path("runs")):
        if runs := sorted({state.parents[2] for state in folder.glob(f"*/checkpoints/step-*/{STATE_FILE}")}):
            return f"Runs with checkpoints are: {', '.join(map(str, runs[:MAX_LISTED]))}"
    return "There is none; a run's lie in its checkpoints/step-XXXXXXXX"


def read_train_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        UserError: when it is no checkpoint, or one of another format.
    """
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint} is not a complete checkpoint: {STATE_FILE} cannot be read ({error})") from error
    if state.get("format_version") != CHECKPOINT_FORMAT:
        raise UserError(
            f"{checkpoint} has format {state.get('format_version')}, this program reads {CHECKPOINT_FORMAT}"
        )
    return state


def verify_checkpoint(checkpoint: Path) -> None:
    """Compare every file with its hash.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    for name, expected in read_train_state(checkpoint)["files"].items():
        file = checkpoint / name
        if not file.is_file() or sha256_file(file) != expected:
            what = f"damaged: its SHA-256 is not the one in {STATE_FILE}" if file.is_file() else "missing"
            raise UserError(f"{file} is {what}. Move {checkpoint} away to resume from the checkpoint before it")


def restore_checkpoint(
    checkpoint: Path,
    model: nn.Module,
    optimizer: Optimizer,
    put: Callable[[nn.Parameter, Tensor], None] = put_weights,
) -> None:
    """Put a checkpoint's weights and optimizer state into place, bit by bit; ``put`` sets a parameter."""
    file = checkpoint / MODEL_FILE
    with Meter(f"read {shown_name(file)}", file.stat().st_size, BYTES) as meter:
        load_trained(model, LazyFile(file, meter), put, str(file), OLDER)
    # a dict of what lies in the mapped file, of which nothing is copied before its turn
    states = dict(read_optimizer_state(checkpoint / OPTIMIZER_FILE))
    floats = {name: value for name, value in states.items() if isinstance(value, Tensor) and value.is_floating_point()}
    check_finite(floats, str(checkpoint / OPTIMIZER_FILE), OLDER)
    parameters = trained_parameters(model)
    moved: dict[int, Tensor] = {}  # what was shared stays shared
    for key, value in states.items():
        name, _, state = key.rpartition(".")
        if (parameter := parameters.get(name)) is not None:
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
        with Meter(f"read {shown_name(file)}", file.stat().st_size, BYTES) as meter:
            for name in names:
                tensor = reader.get_tensor(name)
                yield name, tensor
                meter.update(tensor.nbytes)
    for name, target in rest["shared"].items():
        yield name, common[target]
    yield from rest["numbers"].items()
