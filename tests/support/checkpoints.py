"""Checkpoints that tests read and change: names of a tiny one's files, and its record sealed anew."""

import json
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trainer.core.files import sha256_file
from trainer.core.layout import CHECKPOINT_FILE, find_record, piece_name
from trainer.model.checkpoint import read_train_state, seal
from trainer.train.save import list_tensor_files, measure_state, write_checkpoint

MODEL, OPTIMIZER = piece_name("model", 1), piece_name("optimizer", 1)  # a tiny model's tensors lie in one file each


def change_record(checkpoint: Path, *without: str, **changes: Any) -> None:
    """Let a checkpoint say something else of itself, or less, with a right digest where it has one."""
    file = find_record(checkpoint)
    assert file is not None
    content = json.loads(file.read_text()) | changes
    for key in ("digest", *without):
        content.pop(key, None)
    file.write_bytes(seal(content) if file.name == CHECKPOINT_FILE else json.dumps(content).encode())


def describe_file(path: Path) -> dict[str, Any]:
    """What a record says of a file."""
    return {"sha256": sha256_file(path), "size": path.stat().st_size}


def accept_file(path: Path) -> None:
    """Let the record say of a changed file of tensors that it is as it must be."""
    change_record(path.parent, files=read_train_state(path.parent)["files"] | {path.name: describe_file(path)})


def flip_bit(path: Path, place: int, bit: int = 0) -> None:
    """Damage a file; a negative place counts from its end."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def save_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, train_state: dict[str, Any]) -> Path:
    """Write ``folder/step-XXXXXXXX``, as a run does."""
    size = measure_state(model, optimizer)
    return write_checkpoint(folder, list_tensor_files(model, optimizer), train_state, size)
