"""The format of checkpoints: names, find, read, verify. Nothing in one is a pickle.

A checkpoint is a folder ``step-00001000`` with ``model-00001.safetensors`` and so on (trained parameters, fp32, by
classic name), as many ``optimizer-00001.safetensors`` (``<parameter>.<state>``) and ``checkpoint.json``, written last:
what the checkpoint says of itself, the size and SHA-256 of each other file, and a digest of itself. It is written under
a temporary name, forced to the disk and renamed: a folder with the final name is whole.

Version 0.2.0 wrote ``model.safetensors``, ``optimizer.safetensors`` and ``train_state.json``, which has no digest.
"""

import errno
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.core.errors import UserError
from trainer.core.files import sha256_bytes, sha256_file, write_bytes
from trainer.core.layout import (
    CHECKPOINT_FILE,
    CHECKPOINT_NAME,
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    MODEL_FILE,
    MODEL_INDEX_FILE,
    NEWEST,
    OPTIMIZER_FILE,
    PIECE_NAME,
    STATE_FILE,
    checkpoint_name,
    find_record,
    piece_name,
)
from trainer.model.run_records import is_base, is_config, is_run_name

CHECKPOINT_FORMAT, OLD_FORMAT = 2, 1
OLD_FILES = (MODEL_FILE, OPTIMIZER_FILE)
MAX_LISTED = 8  # checkpoints, or runs, in a message
DIGEST = re.compile(rb',\n  "digest": "([0-9a-f]{64})"\n}\n\Z')  # of all bytes before it
REMEDY_DAMAGED = "move this checkpoint away to resume from the one before"


class DamagedCheckpoint(UserError):
    """What is missing of a checkpoint, or damaged."""


@dataclass(frozen=True)
class FileSum:
    """What a file of a checkpoint must be."""

    sha256: str
    size: int | None  # bytes; version 0.2.0 recorded none


def find_newest(run_folder: Path) -> Path | None:
    """The complete checkpoint of a run with the most steps; None if there is none."""
    return max(list_checkpoints(run_folder / CHECKPOINTS_FOLDER), key=step_of, default=None)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, by step; one that was set aside under another name is none."""
    named = (path for path in folder.glob("step-*") if CHECKPOINT_NAME.fullmatch(path.name))
    return sorted((path for path in named if find_record(path) is not None), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The steps that a checkpoint of ours has made, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def list_incomplete(folder: Path) -> list[Path]:
    """Folders that are called like checkpoints and have nothing by which they are whole."""
    named = (path for path in folder.glob("step-*") if CHECKPOINT_NAME.fullmatch(path.name))
    return sorted(path for path in named if find_record(path) is None)


def measure_checkpoint(path: Path) -> int:
    """Bytes of a checkpoint that lies there."""
    return sum(file.stat().st_size for file in path.iterdir())


def is_checkpoint_file(name: str) -> bool:
    """Whether a file of that name lies in checkpoints."""
    return name in (CHECKPOINT_FILE, STATE_FILE, *OLD_FILES) or PIECE_NAME.fullmatch(name) is not None


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
    folder = path.parent if is_checkpoint_file(path.name) else path
    if find_record(folder) is not None:
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
    if (path / MODEL_FILE).is_file() or (path / piece_name("model", 1)).is_file() or CHECKPOINT_NAME.match(path.name):
        return f"is not a complete checkpoint: {CHECKPOINT_FILE} is missing"
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
        found = {path.parents[1] for path in folder.glob(f"*/{CHECKPOINTS_FOLDER}/step-*") if find_record(path)}
        if runs := sorted(found):
            return f"Runs with checkpoints are: {', '.join(map(str, runs[:MAX_LISTED]))}"
    return "There is none; a run's lie in its checkpoints/step-XXXXXXXX"


def seal(content: dict[str, Any]) -> bytes:
    """checkpoint.json: readable JSON whose last entry is the SHA-256 of all bytes before it."""
    begin = json.dumps(content, indent=2, ensure_ascii=False).removesuffix("\n}").encode()
    return begin + f',\n  "digest": "{sha256_bytes(begin)}"\n}}\n'.encode()


def seal_again(checkpoint: Path) -> None:
    """Write the digest of a checkpoint's record anew, after somebody has changed a text in it by hand.

    Raises:
        UserError: where it is no JSON any more, or has no digest: a checkpoint of version 0.2.0 needs none.
    """
    file = checkpoint / CHECKPOINT_FILE
    try:
        content = json.loads(file.read_bytes())
        del content["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be sealed: {error!r}") from error
    write_bytes(file, seal(content))
    read_train_state(checkpoint)


def read_train_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; it agrees with its digest and with the folder's name.

    Raises:
        DamagedCheckpoint: when it is not whole, or something in it was changed.
        UserError: when it cannot be read, or has another format.
    """
    file = find_record(checkpoint)
    if file is None:
        raise DamagedCheckpoint(f"{checkpoint} is not a complete checkpoint: {CHECKPOINT_FILE} is missing")
    try:
        content = file.read_bytes()
    except OSError as error:
        kind = DamagedCheckpoint if error.errno == errno.EIO else UserError
        raise kind(f"{checkpoint} is not a complete checkpoint: {file.name} cannot be read ({error})") from error
    state = unseal(file, content)
    known = CHECKPOINT_FORMAT if file.name == CHECKPOINT_FILE else OLD_FORMAT
    if state.get("format_version") != known:
        raise UserError(
            f"{checkpoint} has format {state.get('format_version')}, this program reads {CHECKPOINT_FORMAT} and "
            f"{OLD_FORMAT}, that of version 0.2.0"
        )
    named = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    step, name = state.get("step"), state.get("name")
    fits = isinstance(step, int) and (known == OLD_FORMAT or name == checkpoint_name(step))
    if not fits or (named and step != int(named[1])):
        says = f"step {step}" + (f", named {name}" if name else "")
        raise DamagedCheckpoint(f"{file} is damaged, or another checkpoint's: it says {says}; {REMEDY_DAMAGED}")
    check_listed(file, state)
    return state


def check_fit_to_use(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Refuse a record that cannot be continued or exported, whatever its digest says.

    Raises:
        DamagedCheckpoint: naming the entry.
    """
    if what := find_wrong_entry(state):
        raise DamagedCheckpoint(f"{checkpoint} is damaged: {what} is not what a run writes there; {REMEDY_DAMAGED}")


def find_wrong_entry(state: Mapping[str, Any]) -> str | None:
    """What of a record is not of its kind: others' have right digests too. The run's name becomes a file's."""
    base, config, lineage = (state.get(name) for name in ("base", "config", "lineage"))
    if not is_run_name(state.get("run")):
        return "run"
    if not is_config(config):
        return "config"
    if not is_base(base):
        return "base"
    if not isinstance(lineage, dict) or not isinstance(lineage.get("base"), dict):
        return "lineage"
    if not isinstance(lineage["base"].get("reference"), str) or not isinstance(lineage.get("written_at"), str):
        return "lineage"
    if not isinstance(state.get("vae_sha256"), str):
        return "vae_sha256"
    return None


def unseal(file: Path, content: bytes) -> dict[str, Any]:
    """The JSON object in a record's bytes, which agree with their digest if the record has one."""
    digest = DIGEST.search(content)
    try:
        state = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(
            f"{file.parent} is not a complete checkpoint: {file.name} cannot be read ({error})"
        ) from error
    sealed = digest is not None and sha256_bytes(content[: digest.start()]) == digest[1].decode()
    if not isinstance(state, dict) or (file.name == CHECKPOINT_FILE and not sealed):
        raise DamagedCheckpoint(f"{file} is damaged: it is not what its digest says; {REMEDY_DAMAGED}")
    return state


def check_listed(file: Path, state: dict[str, Any]) -> None:
    """Refuse a list of files that is not that of a checkpoint: files that it does not name are never looked at."""
    names = set(state["files"]) if isinstance(state.get("files"), dict) else set()
    if state["format_version"] == OLD_FORMAT:
        expected = set(OLD_FILES)
    else:
        numbers = range(1, max(1, len(names) // 2) + 1)
        expected = {piece_name("model", number) for number in numbers}
        expected |= {piece_name("optimizer", number) for number in numbers}
    if names != expected:
        missing, strange = sorted(expected - names), sorted(names - expected)
        says = [f"without {name}" for name in missing[:1]] + [f"with {name}" for name in strange[:1]]
        raise DamagedCheckpoint(f"{file} is damaged: it lists the files {' and '.join(says)}; {REMEDY_DAMAGED}")
    for name, entry in state["files"].items():
        said = {"sha256": entry, "size": 0} if state["format_version"] == OLD_FORMAT else entry
        shape = {key: type(value) for key, value in said.items()} if isinstance(said, dict) else None
        if shape != {"sha256": str, "size": int}:
            raise DamagedCheckpoint(f"{file} is damaged: it says no hash and size of {name}; {REMEDY_DAMAGED}")


def list_sums(state: dict[str, Any]) -> dict[str, FileSum]:
    """File -> what it must be, of all files of tensors."""
    if state["format_version"] == OLD_FORMAT:
        return {name: FileSum(digest, None) for name, digest in state["files"].items()}
    return {name: FileSum(**entry) for name, entry in state["files"].items()}


def list_pieces(checkpoint: Path, state: dict[str, Any], kind: str) -> Iterator[Path]:
    """The files of the ``model``, or of the ``optimizer``."""
    yield from (checkpoint / name for name in sorted(state["files"]) if name.startswith(kind))


def check_sizes(checkpoint: Path, state: dict[str, Any]) -> None:
    """Whether all files are there, as long as they must be; nothing is read of them.

    Raises:
        DamagedCheckpoint: naming the file that is missing or cut off.
    """
    for name, expected in list_sums(state).items():
        file = checkpoint / name
        size = file.stat().st_size if file.is_file() else None
        if size is None or expected.size not in (None, size):
            what = "missing" if size is None else f"damaged: it has {size:,} bytes, not {expected.size:,}"
            raise DamagedCheckpoint(f"{file} is {what}; {REMEDY_DAMAGED}")


def verify_checkpoint(checkpoint: Path) -> None:
    """Compare every file with its hash.

    Raises:
        DamagedCheckpoint: naming the file that is missing or damaged.
    """
    state = read_train_state(checkpoint)
    check_sizes(checkpoint, state)
    for name, expected in list_sums(state).items():
        try:
            found = sha256_file(checkpoint / name)
        except OSError as error:  # a sector that cannot be read
            raise DamagedCheckpoint(f"{checkpoint / name} cannot be read ({error}); {REMEDY_DAMAGED}") from error
        if found != expected.sha256:
            record = CHECKPOINT_FILE if expected.size is not None else STATE_FILE
            raise DamagedCheckpoint(
                f"{checkpoint / name} is damaged: its SHA-256 is not the one in {record}; {REMEDY_DAMAGED}"
            )
