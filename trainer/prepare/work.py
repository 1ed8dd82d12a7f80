"""A preparation on its way: its folder, what is encoded already, what is left, and how that is shared out.

What is left is cut into chunks before the work begins, each of which becomes one shard, whoever encodes it. A chunk is
done once its sidecar lies in ``rows``; so the result depends neither on how many processes there are nor on how
often they are killed. ``<shards>.unfinished`` holds all of it until ``set`` becomes, or joins, data.shards.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.core.errors import UserError
from trainer.core.files import sha256_file, write_json
from trainer.core.layout import (
    INPUTS_FILE,
    OTHERS_LOCK_FILE,
    QUARANTINE_FILE,
    SETTINGS_FILE,
    WORK_LOCK_FILE,
    WORK_SUFFIX,
    shard_name,
    shard_number,
)
from trainer.core.locks import hold_lock
from trainer.data.shards import LATENT_FIELDS, ShardFile
from trainer.data.tables import read_table, read_told, write_table
from trainer.prepare.inputs import STAT_FIELDS

# every sample that a tar holds, and the size and time of the image file that it was made from
FRAMES_FIELD = pa.field("several_frames", pa.bool_())  # true, or null where an image has one or it is not known
LATENTS_SCHEMA = pa.schema([*LATENT_FIELDS, *STAT_FIELDS, FRAMES_FIELD])
STAT = tuple(field.name for field in STAT_FIELDS)
UNKNOWN = -1  # a size or time that is not recorded, and a place in no table


@dataclass(frozen=True)
class Work:
    """Where the parts of an unfinished preparation lie."""

    folder: Path

    @property
    def set(self) -> Path:
        """New shards, and at the end what becomes the set."""
        return self.folder / "set"

    @property
    def rows(self) -> Path:
        """A sidecar for each chunk that is done."""
        return self.folder / "rows"

    @property
    def inputs(self) -> Path:
        """All posts, as the sources gave them."""
        return self.folder / INPUTS_FILE

    @property
    def store(self) -> Path:
        """What was encoded before, by this preparation under other posts or by an earlier one."""
        return self.folder / "store.arrow"

    @property
    def todo(self) -> Path:
        return self.folder / "todo.arrow"


@dataclass(frozen=True)
class Todo:
    """What is left to encode: rows of the inputs, and of the store where their latents may still be good."""

    rows: np.ndarray  # int64 (n,), of the inputs
    known: np.ndarray  # int64 (n,), of the store, or UNKNOWN
    first_shard: int
    samples_per_shard: int
    inputs_sha256: str
    store_sha256: str

    def __len__(self) -> int:
        """Chunks."""
        return -(-len(self.rows) // self.samples_per_shard)

    def chunk(self, number: int) -> slice:
        """The part of ``rows`` and ``known`` that becomes one shard."""
        return slice(number * self.samples_per_shard, (number + 1) * self.samples_per_shard)


@dataclass(frozen=True)
class Stock:
    """Encoded samples and the tars they lie in."""

    latents: pa.Table  # LATENTS_SCHEMA; of rows with the same key the last counts, the others lie in a tar unused
    shards: list[ShardFile]


@dataclass(frozen=True)
class Done:
    """What became of one chunk."""

    stock: Stock  # at most one shard; a sample whose image turned out to be the same lies in an older one
    set_aside: list[dict[str, Any]]
    filtered: dict[str, int]


def refuse_others(where: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to go on with what was made otherwise, naming each setting that differs."""
    before, now = flatten(old), flatten(new)
    names = [name for name in now if name != "latents.code_version" and before.get(name) != now[name]]
    if names:
        listed = "; ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in names)
        raise UserError(f"{where} was made with other settings: {listed}. Name another folder, or move it away")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def work_folder(folder: Path) -> Path:
    """Where the set is made: beside its place, so that a rename puts it there."""
    return folder.with_name(folder.name + WORK_SUFFIX)


@contextmanager
def hold_work(work: Work, folder: Path) -> Iterator[None]:
    """Have the work folder of data.shards ``folder`` for one preparation alone."""
    make_folders(work)
    busy = f"another process is preparing {folder}: wait for it, or stop it"
    with hold_lock(work.folder / WORK_LOCK_FILE, busy):
        with hold_lock(work.folder / OTHERS_LOCK_FILE, busy):  # their main process may be dead
            pass
        try:
            yield
        finally:
            if holds_nothing(work):
                shutil.rmtree(work.folder)


@contextmanager
def share_work(work: Work) -> Iterator[None]:
    """Be one of the other processes of a preparation: while there is one, no new preparation begins."""
    with hold_lock(work.folder / OTHERS_LOCK_FILE, f"another process is preparing in {work.folder}", shared=True):
        yield


def holds_nothing(work: Work) -> bool:
    """Whether there is no work to go on with, and nothing to read."""
    empty = not work.set.exists() or not any(work.set.iterdir())
    return empty and not work.todo.exists() and not (work.folder / QUARANTINE_FILE).exists()


def make_folders(work: Work) -> None:
    for each in (work.set, work.rows):
        each.mkdir(parents=True, exist_ok=True)


def check_settings(work: Work, settings: dict[str, Any]) -> None:
    """Note what the work folder is for; refuse one that was begun with other settings."""
    written = work.folder / SETTINGS_FILE
    if written.exists() and not holds_nothing(work):
        refuse_others(f"the unfinished {work.folder}", json.loads(written.read_text(encoding="utf-8")), settings)
    write_json(written, settings)


def plan_todo(work: Work, inputs: pa.Table, old: Stock, sha256: str, size: int) -> Todo:
    """Decide what is left: posts without latents, and those whose image file may have changed.

    The same posts as when the work was begun go on with the same chunks. Others are planned anew, and what is
    encoded by then counts.

    Args:
        old: what a complete set has.
        sha256: of the inputs.
        size: samples of a shard.
    """
    begun = read_todo(work) if work.todo.exists() else None
    if begun and (begun.inputs_sha256, begun.store_sha256) == (sha256, sha256_file(work.store)):
        remove_strangers(work, begun)
        return begun
    stock = join_stock([old, read_stock(work.store), *(each.stock for each in read_done(work, begun))])
    write_stock(work.store, stock)
    places = find_last(inputs["key"], stock)
    rows = np.flatnonzero(~is_same_file(inputs, stock.latents, places))
    first = max((shard_number(shard.name) for shard in stock.shards), default=-1) + 1
    todo = Todo(rows, places[rows], first, size, sha256, sha256_file(work.store))
    for sidecar in work.rows.iterdir():  # what they say is in the store now, which the todo of before does not know
        sidecar.unlink()
    write_todo(work, todo)
    remove_strangers(work, todo)
    return todo


def is_same_file(inputs: pa.Table, store: pa.Table, places: np.ndarray) -> np.ndarray:
    """Whether each post's image is in the store, made from a file of the same place, size and time: bool (n,)."""
    same = places != UNKNOWN
    if len(store):
        then = store.select(STAT).take(pa.array(np.maximum(places, 0)))
        for name in STAT:
            same &= pc.equal(inputs[name], then[name]).to_numpy()
    return same


def join_stock(parts: Sequence[Stock]) -> Stock:
    """All that is encoded, each sample once: what a later part says of it counts."""
    table = pa.concat_tables([part.latents for part in parts])
    samples = table.select(["shard", "offset"]).append_column("place", pa.array(np.arange(len(table))))
    places = samples.group_by(["shard", "offset"]).aggregate([("place", "max")])["place_max"].to_numpy()
    shards = {shard.name: shard for part in parts for shard in part.shards}
    return Stock(table.take(pa.array(np.sort(places))), sorted(shards.values(), key=lambda shard: shard.name))


def find_last(keys: pa.ChunkedArray, stock: Stock) -> np.ndarray:
    """The row of the latents that counts for each key, or UNKNOWN: int64 (n,)."""
    reversed_keys = stock.latents["key"].combine_chunks()[::-1]
    places = pc.index_in(keys, reversed_keys)
    return pc.fill_null(pc.subtract(len(reversed_keys) - 1, places), UNKNOWN).to_numpy().astype(np.int64)


def remove_strangers(work: Work, todo: Todo) -> None:
    """Delete what a killed process was writing: shards that nothing counts."""
    counted = [read_stock(work.store), *(done.stock for done in read_done(work, todo))]
    names = {shard.name for stock in counted for shard in stock.shards}
    for path in work.set.iterdir():
        if path.name not in names:
            path.unlink()


def write_stock(path: Path, stock: Stock, **more: Any) -> None:
    """Samples and shards in one file, whole or not at all; ``more`` are the other facts of a chunk."""
    write_table(path, stock.latents, {"shards": [vars(shard) for shard in stock.shards], **more})


def read_stock(path: Path) -> Stock:
    """The inverse of ``write_stock``; empty where there is no file."""
    if not path.exists():
        return Stock(LATENTS_SCHEMA.empty_table(), [])
    table = read_table(path)
    shards = [ShardFile(**shard) for shard in read_told(table)["shards"]]
    return Stock(add_frames(table.replace_schema_metadata()), shards)


def add_frames(latents: pa.Table) -> pa.Table:
    """Latents with FRAMES_FIELD, which tables of version 0.2 and those without such an image lack."""
    if FRAMES_FIELD.name in latents.schema.names:
        return latents
    return latents.append_column(FRAMES_FIELD, pa.nulls(len(latents), pa.bool_()))


def drop_frames(latents: pa.Table) -> pa.Table:
    """The inverse, so that a set that has no such image is the same bytes as before there was this field."""
    return latents if pc.any(latents[FRAMES_FIELD.name]).as_py() else latents.drop_columns([FRAMES_FIELD.name])


TODO_FACTS = ("first_shard", "samples_per_shard", "inputs_sha256", "store_sha256")


def write_todo(work: Work, todo: Todo) -> None:
    table = pa.table({"row": pa.array(todo.rows, pa.int64()), "known": pa.array(todo.known, pa.int64())})
    write_table(work.todo, table, {name: getattr(todo, name) for name in TODO_FACTS})


def read_todo(work: Work) -> Todo:
    table = read_table(work.todo)
    return Todo(table["row"].to_numpy(), table["known"].to_numpy(), **read_told(table))


def sidecar_path(work: Work, todo: Todo, chunk: int) -> Path:
    """What makes a chunk count."""
    return work.rows / f"{Path(shard_name(todo.first_shard + chunk)).stem}.arrow"


def write_done(work: Work, todo: Todo, chunk: int, done: Done) -> None:
    """Make a chunk count; its shard lies in its place already."""
    path = sidecar_path(work, todo, chunk)
    write_stock(path, done.stock, set_aside=done.set_aside, filtered=done.filtered, todo=identify(todo))


def identify(todo: Todo) -> list[str]:
    """What a sidecar says of the todo that its chunk is of."""
    return [todo.inputs_sha256, todo.store_sha256]


def is_done(work: Work, todo: Todo, chunk: int) -> bool:
    """Whether a chunk's sidecar lies there, of this very todo, and its shard with the size that it had."""
    path = sidecar_path(work, todo, chunk)
    return (
        path.exists()
        and read_told(read_table(path))["todo"] == identify(todo)
        and all(
            (work.set / shard.name).is_file() and (work.set / shard.name).stat().st_size == shard.size
            for shard in read_stock(path).shards
        )
    )


def read_done(work: Work, todo: Todo | None) -> list[Done]:
    """What became of all chunks that are done, in their order."""
    done = []
    for chunk in range(len(todo) if todo else 0):
        assert todo is not None
        if is_done(work, todo, chunk):
            path = sidecar_path(work, todo, chunk)
            told = read_told(read_table(path))
            done.append(Done(read_stock(path), told["set_aside"], told["filtered"]))
    return done
