"""A preparation on its way: its folder, its lock and settings, its chunks, and what became of each.

``<shards>.unfinished`` holds all of it until its folder ``set`` becomes, or joins, data.shards. Pending posts lie in
one table, in order of their keys; each of its batches of ``samples_per_shard`` posts is a chunk, which becomes one
shard, whoever encodes it. A chunk is done once its file lies in ``rows`` and its shard in ``set``: so the result
depends neither on how many processes there are nor on how often they are killed.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from trainer.core.errors import UserError
from trainer.core.files import sync_folder, write_json
from trainer.core.layout import (
    DONE_FOLDER,
    INDEX_FILE,
    INPUTS_FILE,
    MANIFEST_FILE,
    OLD_STORE_FILE,
    OTHERS_LOCK_FILE,
    PENDING_FILE,
    QUARANTINE_FILE,
    QUERIES_FOLDER,
    SET_FOLDER,
    SETTINGS_FILE,
    WORK_LOCK_FILE,
    WORK_SUFFIX,
    shard_number,
)
from trainer.core.locks import hold_lock
from trainer.data.shards import LATENT_FIELDS, ShardFile
from trainer.data.tables import read_facts, read_table, write_batches
from trainer.prepare.inputs import STAT_FIELDS

# every sample that a tar holds, with the size, time and place of the image file that it was made from
LATENTS_SCHEMA = pa.schema([*LATENT_FIELDS, *STAT_FIELDS, pa.field("several_frames", pa.bool_())])  # true, else null
MOVED_LAST = (INDEX_FILE, MANIFEST_FILE)  # of a set's files, in this order


class Work:
    """Where the parts of the preparation of data.shards lie."""

    def __init__(self, shards: Path) -> None:
        self.shards = shards
        self.folder = shards.with_name(shards.name + WORK_SUFFIX)  # beside it, so that a rename puts the set there
        self.set = self.folder / SET_FOLDER
        self.done = self.folder / DONE_FOLDER
        self.settings = self.folder / SETTINGS_FILE
        self.inputs = self.folder / INPUTS_FILE
        self.pending = self.folder / PENDING_FILE
        self.quarantine = self.folder / QUARANTINE_FILE
        self.queries = self.folder / QUERIES_FOLDER


@dataclass(frozen=True)
class DoneChunk:
    """What became of one chunk. Its latents (LATENTS_SCHEMA) stay in its file."""

    path: Path
    shards: list[ShardFile]  # at most one: an image that turned out to be the same lies in an older shard
    set_aside: list[dict[str, Any]]
    filtered: dict[str, int]


def refuse_others(where: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to resume what was made with other settings, naming each that differs."""
    before, now = flatten_settings({section: old.get(section) for section in new}), flatten_settings(new)
    names = [name for name in now | before if name != "latents.code_version" and before.get(name) != now.get(name)]
    if names:
        listed = "; ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in names)
        raise UserError(f"{where} was made with other settings: {listed}. Name another folder, or move it away")


def flatten_settings(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten_settings(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


@contextmanager
def hold_work(work: Work) -> Iterator[None]:
    """Have the work folder for one preparation alone."""
    make_folders(work)
    busy = f"another process is preparing {work.shards}: wait for it, or stop it"
    with hold_lock(work.folder / WORK_LOCK_FILE, busy):
        with hold_lock(work.folder / OTHERS_LOCK_FILE, busy):  # their main process may be dead
            shutil.rmtree(work.queries, ignore_errors=True)  # of a run that was killed
        try:
            yield
        finally:
            if holds_nothing(work):
                shutil.rmtree(work.folder)


def make_folders(work: Work) -> None:
    for each in (work.set, work.done):
        each.mkdir(parents=True, exist_ok=True)


def holds_nothing(work: Work) -> bool:
    """Whether there is no work to resume, and nothing to read."""
    empty = not work.set.exists() or not any(work.set.iterdir())
    return empty and not work.pending.exists() and not work.quarantine.exists()


def bind_settings(work: Work, settings: dict[str, Any]) -> None:
    """Write what the work folder is for; refuse one that was begun with other settings."""
    if work.settings.exists() and not holds_nothing(work):
        refuse_others(f"the unfinished {work.folder}", json.loads(work.settings.read_text(encoding="utf-8")), settings)
    write_json(work.settings, settings)


def read_pending(work: Work) -> dict[int, pa.RecordBatch]:
    """The pending posts, chunk by chunk, by the numbers of their shards; memory-mapped."""
    return dict(enumerate(read_table(work.pending).to_batches(), read_facts(work.pending)["first_shard"]))


def write_done(chunk: DoneChunk, latents: pa.Table) -> None:
    """Make a chunk count; its shard lies in its place already."""
    shards = [vars(shard) for shard in chunk.shards]
    facts = {"shards": shards, "set_aside": chunk.set_aside, "filtered": chunk.filtered}
    write_batches(chunk.path, LATENTS_SCHEMA, latents.to_batches(), facts)


def read_done(work: Work) -> dict[int, DoneChunk]:
    """The chunks that are done, of this plan and of earlier ones, by the numbers of their shards, in this order.

    What version 0.2.0 had encoded before its plan comes first, as number -1.
    """
    paths = {shard_number(path.name): path for path in work.done.glob("shard-*.arrow")}
    old_store = work.folder / OLD_STORE_FILE
    folders = (work.set, work.shards)  # the set's own shards lie in the latter, where one is joined
    whole = {(path.name, path.stat().st_size) for folder in folders for path in folder.glob("shard-*.tar")}
    done = {}
    for number, path in [(-1, old_store)] * old_store.exists() + sorted(paths.items()):
        facts = read_facts(path)
        shards = [ShardFile(**each) for each in facts["shards"] if (each["name"], each["size"]) in whole]
        if number == -1 or len(shards) == len(facts["shards"]):
            done[number] = DoneChunk(path, shards, facts.get("set_aside", []), facts.get("filtered", {}))
    return done


def remove_unfinished(work: Work, done: dict[int, DoneChunk]) -> None:
    """Delete what a killed process was writing, and what lost its shard."""
    counted = {chunk.path for chunk in done.values()}
    counted |= {work.set / shard.name for chunk in done.values() for shard in chunk.shards}
    for path in (*work.set.iterdir(), *work.done.iterdir()):
        if path not in counted:
            path.unlink()


def place_set(work: Work) -> None:
    """Make ``work.set`` data.shards, or join it to the set that is there.

    Started again after an interruption it ends the same: a set that joins another loses file after file to its place.

    Raises:
        UserError: when another set lies there than the one that this work is for.
    """
    manifest = work.shards / MANIFEST_FILE
    joins = json.loads(work.settings.read_text(encoding="utf-8"))["joins"]
    there = json.loads(manifest.read_text(encoding="utf-8"))["fingerprint"] if manifest.exists() else None
    if joins != there:
        raise UserError(
            f"{work.shards} is not the set any more that {work.folder} was made for: move one of them away, and start "
            "again"
        )
    for path in work.folder.iterdir():  # what led to the set is of no use from here on
        if path.is_dir() and path != work.set:
            shutil.rmtree(path)
        elif not path.is_dir() and path.name not in (WORK_LOCK_FILE, OTHERS_LOCK_FILE, SETTINGS_FILE):
            path.unlink()
    if not work.shards.exists() or not any(work.shards.iterdir()):
        work.set.replace(work.shards)
    else:
        names = [path.name for path in work.set.iterdir() if path.name not in MOVED_LAST]
        for name in (*names, *MOVED_LAST):
            if (work.set / name).exists():
                (work.set / name).replace(work.shards / name)
        sync_folder(work.shards)
    sync_folder(work.shards.parent)
