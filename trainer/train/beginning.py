"""With which checkpoint a run begins: the main process decides, and all processes must see the same."""

import contextlib
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.schema import Config
from trainer.core.distributed import Processes
from trainer.core.errors import UserError
from trainer.core.files import sha256_file
from trainer.core.layout import CHECKPOINTS_FOLDER, find_record
from trainer.model.checkpoint import (
    DamagedCheckpoint,
    check_fit_to_use,
    check_sizes,
    find_checkpoint,
    find_newest,
    list_checkpoints,
    read_train_state,
)
from trainer.train.run import run_path

SEE_SECONDS = 60.0  # for which NFS may show an old listing
AGAIN_SECONDS = 0.5


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run begins with: its own, or at first another run's."""

    folder: Path
    state: dict[str, Any]
    fork: dict[str, Any] | None  # the run that this one branched off: run, step, samples_seen, lineage
    record: str = ""  # SHA-256 of the file that says all this, with the hashes of the others
    damaged: tuple[tuple[Path, str], ...] = ()  # newer ones of this run, which it cannot begin with, and why not

    @property
    def begins_fork(self) -> bool:
        """Whether it is another run's."""
        return self.fork is not None and self.fork["step"] == self.state["step"]

    @property
    def attempt(self) -> int:
        """The attempt of this run that made it; 0 where this run begins as a fork, or where that is not recorded."""
        return 0 if self.begins_fork else self.state.get("attempt", 0)

    @property
    def tracker_run_id(self) -> str | None:
        """The trackers' run to continue; None where this run begins as a fork."""
        return None if self.begins_fork else self.state["tracker_run_id"]


def find_resumed(config: Config, processes: Processes, damaged: Mapping[Path, str] | None = None) -> Resumed | None:
    """The checkpoint that ``checkpoint.resume`` names, else the one that ``checkpoint.fork`` does; None for the base.

    The main process looks, and all begin with what it found: others may see another state of the disk. Of the run's own
    the newest whole one counts that is not known to be ``damaged``; no tensor is read.

    Raises:
        UserError: in all processes, where they name none, and where some process does not see what was found.
    """
    found = processes.decide(lambda: look_for_resumed(config, damaged or {}))
    if found is not None:
        check_seen(found, run_path(config), processes)
    return found


def look_for_resumed(config: Config, damaged: Mapping[Path, str]) -> Resumed | None:
    """See :func:`find_resumed`."""
    choice, path, fork = config.checkpoint.resume, run_path(config), config.checkpoint.fork
    if choice == "never" and find_newest(path) is not None:
        raise UserError(f"{path} has checkpoints and checkpoint.resume is never; choose another run.name")
    if choice == "auto":
        unusable = []
        for own in reversed(list_checkpoints(path / CHECKPOINTS_FOLDER)):
            try:
                if own in damaged:
                    raise DamagedCheckpoint(damaged[own])
                state = read_whole(own)
            except DamagedCheckpoint as error:
                unusable.append((own, str(error)))
                continue
            return Resumed(own, state, state.get("fork"), hash_record(own), tuple(unusable))
        if unusable:
            listed = "\n".join(f"  {reason}" for _, reason in unusable)
            raise UserError(
                f"{path} has no checkpoint that is whole:\n{listed}\nMove them away to begin anew, or choose another "
                "run.name"
            )
    elif choice != "never":
        own = find_checkpoint(choice, path, key="checkpoint.resume")
        state = read_whole(own)
        return Resumed(own, state, state.get("fork"), hash_record(own))
    if fork is None:
        return None
    folder = find_checkpoint(fork, key="checkpoint.fork")
    state = read_whole(folder)
    lineage = {key: value for key, value in state["lineage"].items() if key != "base"}  # the base is this run's too
    samples = state["lineage"]["samples_seen"]
    origin = {"run": state["run"], "step": state["step"], "samples_seen": samples, "lineage": lineage}
    return Resumed(folder, state, origin, hash_record(folder))


def read_whole(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, whose files are all there, in their length."""
    state = read_train_state(checkpoint)
    check_fit_to_use(checkpoint, state)
    check_sizes(checkpoint, state)
    return state


def hash_record(checkpoint: Path) -> str:
    """SHA-256 of the file by which a checkpoint is whole; empty where there is none."""
    file = find_record(checkpoint)
    return sha256_file(file) if file is not None else ""


def check_seen(found: Resumed, run: Path, processes: Processes) -> None:
    """Whether every process sees the checkpoint that the main one found; a network file system may take a while.

    Raises:
        UserError: in all processes, naming those that do not, and what they see instead.
    """
    flaw = None if processes.is_main else wait_until_seen(found, SEE_SECONDS)
    seen = processes.gather((socket.gethostname(), flaw))
    blind = [f"  process {rank} on {host}: {why}" for rank, (host, why) in enumerate(seen) if why is not None]
    if blind:
        lines = "\n".join(blind)
        raise UserError(
            f"the main process, on {seen[0][0]}, begins with {found.folder}, and not every process sees that "
            f"checkpoint:\n{lines}\nAll processes must see the same {run}: let run.output_dir lie on a file system "
            "that their hosts share, or copy the main process's folder to the same place on each host"
        )


def wait_until_seen(found: Resumed, seconds: float) -> str | None:
    """What is wrong with the checkpoint as this process sees it, after so long; None as soon as it is the same."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            same = hash_record(found.folder) == found.record
            flaw = None if same else "it is not there" if not found.folder.exists() else "it is another one"
            if same:
                check_sizes(found.folder, found.state)
        except (OSError, UserError) as error:
            flaw = str(error)
        if flaw is None or time.monotonic() >= deadline:
            return flaw
        time.sleep(AGAIN_SECONDS)
        with contextlib.suppress(OSError):
            list(found.folder.parent.iterdir())  # lets NFS ask its server again
