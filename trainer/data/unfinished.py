"""A preparation that is not complete yet: its folder, and what counts in it when it is taken up again.

A shard counts once its rows lie beside it in a sidecar, with how many inputs were seen by then. What lies behind the
last such shard is made again. ``set`` becomes data.shards by a rename.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from trainer.data.shards import Row, ShardFile, ShardWriter, rows_to_table
from trainer.errors import UserError
from trainer.files import write_json


@dataclass
class Progress:
    """What happened since the last complete shard, or, in a shard's sidecar, up to it."""

    seen: int = 0  # inputs, counted from the very first
    rejected: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Work:
    """The folder of an unfinished preparation: ``set`` becomes data.shards, ``rows`` holds each shard's sidecar."""

    folder: Path
    shards: list[ShardFile] = field(default_factory=list)
    tables: list[pa.Table] = field(default_factory=list)
    done: Progress = field(default_factory=Progress)

    @property
    def set(self) -> Path:
        return self.folder / "set"

    @property
    def rows(self) -> Path:
        return self.folder / "rows"


def refuse_others(where: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to go on with what was made otherwise, naming each setting that differs."""
    before, now = flatten(old), flatten(new)
    names = [name for name in now if name != "latents.code_version" and before.get(name) != now[name]]
    if names:
        listed = "; ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in names)
        raise UserError(
            f"{where} was made with other settings or posts: {listed}. Name another folder, or move it away"
        )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def work_folder(folder: Path) -> Path:
    """Where the set is made: beside its place, so that a rename puts it there."""
    return folder.with_name(folder.name + ".unfinished")


@contextmanager
def open_work(folder: Path, settings: dict[str, Any]) -> Iterator[Work]:
    """The work folder, new or taken up again, for this process alone."""
    work = Work(work_folder(folder))
    for each in (work.folder, work.set, work.rows):
        each.mkdir(parents=True, exist_ok=True)
    with (work.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is preparing {folder}: wait for it, or stop it") from error
        written = work.folder / "settings.json"
        if written.exists():
            refuse_others(f"the unfinished {work.folder}", json.loads(written.read_text(encoding="utf-8")), settings)
        write_json(written, settings)
        take_up(work)
        yield work


def take_up(work: Work) -> None:
    """Read the sidecars of the complete shards, in order, and remove what was written behind the last of them."""
    while (sidecar := work.rows / f"shard-{len(work.shards):05d}.json").exists():
        told = json.loads(sidecar.read_text(encoding="utf-8"))
        shard = ShardFile(**told["shard"])
        if not (work.set / shard.name).is_file() or (work.set / shard.name).stat().st_size != shard.size:
            break
        add_shard(work, shard, told["rows"], Progress(**told["progress"]))
    names = {shard.name for shard in work.shards}
    for path in work.set.iterdir():
        if path.name not in names:
            path.unlink()


def add_shard(work: Work, shard: ShardFile, rows: list[Row], since: Progress) -> None:
    """Count a complete shard, with what happened on the way to it."""
    work.shards.append(shard)
    work.tables.append(rows_to_table(rows))
    add_progress(work, since)


def add_progress(work: Work, since: Progress) -> None:
    """Join what happened since the last shard to what happened before."""
    work.done.seen = since.seen
    work.done.rejected += since.rejected
    work.done.notes += since.notes


def commit(work: Work, writer: ShardWriter, since: Progress) -> None:
    """Complete a shard: the tar first, then the sidecar that makes it count."""
    shard = writer.finish()
    told = {"shard": vars(shard), "progress": vars(since), "rows": writer.rows}
    write_json(work.rows / f"{Path(shard.name).stem}.json", told)
    add_shard(work, shard, writer.rows, since)
