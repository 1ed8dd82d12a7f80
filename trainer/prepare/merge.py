"""What the sources say and what is encoded -> the set: index, lists and manifest, put in their place.

The index is always the join of both: a post that changed its tags has them in the index at once, one that is gone, or
filtered now, is left out, and its latents stay in their tar, known to latents.arrow, should it come back.
"""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.config.schema import FiltersConfig
from trainer.core.errors import UserError
from trainer.core.files import sha256_file, sync_folder, write_text
from trainer.core.layout import (
    INDEX_FILE,
    LATENTS_FILE,
    MANIFEST_FILE,
    NOTES_FILE,
    OTHERS_LOCK_FILE,
    QUARANTINE_FILE,
    SETTINGS_FILE,
    WORK_LOCK_FILE,
)
from trainer.data.index import Index
from trainer.data.shards import CHUNK_ROWS, LATENT_FIELDS, SCHEMA, ShardFile, write_index
from trainer.data.tables import read_table, take_rows, write_table
from trainer.prepare.empty_captions import note_empty_captions
from trainer.prepare.inputs import Inputs
from trainer.prepare.remarks import tell_remarks
from trainer.prepare.work import (
    LATENTS_SCHEMA,
    STAT,
    UNKNOWN,
    Done,
    Stock,
    Todo,
    Work,
    add_frames,
    drop_frames,
    find_last,
    join_stock,
    read_stock,
)

MAX_REASONS = 5  # that a message shows with an example each
MAX_DETAIL = 300  # characters of such an example
LAST = (INDEX_FILE, MANIFEST_FILE)  # of a set's files, those that are put in place last, in this order


def read_complete(index: Index) -> Stock:
    """What a complete set has encoded: by its latents.arrow, or in an older set by its index, images' files unknown.

    Raises:
        UserError: when latents.arrow is not the one that the manifest names.
    """
    shards = [ShardFile(**shard) for shard in index.manifest["shards"]]
    path, named = index.folder / LATENTS_FILE, index.manifest.get("latents_sha256")
    if named is None:  # a set of version 0.1
        columns = [index.table[name] for name in (field.name for field in LATENT_FIELDS)]
        unknown = pa.array(np.full(len(index), UNKNOWN))
        places = pa.array([""] * len(index))
        return Stock(pa.table([*columns, unknown, unknown, places, pa.nulls(len(index), pa.bool_())],
                              schema=LATENTS_SCHEMA), shards)  # fmt: skip
    if not path.is_file() or sha256_file(path) != named:
        raise UserError(f"{path} is missing or damaged: restore it from a copy, or move {index.folder} away")
    return Stock(add_frames(read_table(path)), shards)


def merge_set(
    work: Work, todo: Todo, done: list[Done], inputs: Inputs, latents: dict[str, Any], filters: FiltersConfig
) -> dict[str, Any]:
    """Write everything but the shards into ``work.set``, the manifest last; returns it.

    Args:
        latents: what made them, the manifest's section.

    Raises:
        UserError: when no sample is left.
    """
    stock = join_stock([read_stock(work.store), *(each.stock for each in done)])
    rows, places, filtered = choose_samples(read_table(work.inputs), stock, todo, done, filters.min_side)
    filtered = Counter(inputs.filtered) + sum((Counter(each.filtered) for each in done), filtered)
    first = find_first_of_bytes(
        stock.latents["content_hash"].take(pa.array(places)), has_words(read_table(work.inputs), rows)
    )
    doubles = np.flatnonzero(first != np.arange(len(first)))
    notes = note_duplicates(read_table(work.inputs), rows, first, doubles)
    if filters.drop_duplicates:
        filtered["drop_duplicates"] = len(doubles)
        rows, places = np.delete(rows, doubles), np.delete(places, doubles)
    table = join_columns(read_table(work.inputs), stock.latents, rows, places)
    notes = note_sizes(table) + note_empty_captions(table) + note_frames(table) + notes
    set_aside = inputs.set_aside + [line for each in done for line in each.set_aside]
    filtered = Counter({name: count for name, count in filtered.items() if count})
    if not len(table):
        refuse_empty(work, inputs, set_aside, filtered)
    write_jsonl(work.set / QUARANTINE_FILE, set_aside)
    write_jsonl(work.set / NOTES_FILE, notes + inputs.remarks.examples)
    write_table(work.set / LATENTS_FILE, drop_frames(stock.latents))
    counts = {
        "inputs": inputs.total,
        "samples": len(table),
        "set_aside": count_by(set_aside, "reason"),
        "filtered": dict(filtered.most_common()),
        "notes": count_by(notes, "note"),
        **({"by_source": inputs.remarks.counts} if inputs.remarks.counts else {}),
    }
    return write_index(
        work.set, table.select(SCHEMA.names), stock.shards, latents, counts=counts,
        inputs={"total": inputs.total, "sha256": inputs.sha256},
        latents_sha256=sha256_file(work.set / LATENTS_FILE),
    )  # fmt: skip


def refuse_empty(work: Work, inputs: Inputs, set_aside: list[dict[str, Any]], filtered: Counter[str]) -> None:
    """Say where all inputs went; the quarantine is written all the same.

    Raises:
        UserError: always.
    """
    removed = tell({f"removed by {name}": count for name, count in filtered.items()})
    told = ", ".join(filter(None, [tell(count_by(set_aside, "reason")), removed]))
    lines = [f"no sample is left of {inputs.total} inputs: {told}"]
    if set_aside:
        path = work.folder / QUARANTINE_FILE
        write_jsonl(path, set_aside)
        lines += [*show_examples(set_aside), f"  {path} names each"]
    lines += [f"  noted in {line}" for line in tell_remarks(inputs.remarks.counts)]
    raise UserError("\n".join(lines))


def show_examples(set_aside: list[dict[str, Any]]) -> list[str]:
    """The commonest reasons, each with the first input that it concerns."""
    first: dict[str, dict[str, Any]] = {}
    for line in set_aside:
        first.setdefault(line["reason"], line)
    shown = [first[reason] for reason in list(count_by(set_aside, "reason"))[:MAX_REASONS]]
    return [f"  {line['reason']}, such as {line['origin']}: {shorten(line['detail'])}" for line in shown]


def shorten(text: str) -> str:
    """A detail on one line of a message."""
    flat = " ".join(text.split())
    return flat if len(flat) <= MAX_DETAIL else flat[:MAX_DETAIL] + " ..."


def choose_samples(
    inputs: pa.Table, stock: Stock, todo: Todo, done: list[Done], min_side: int | None
) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
    """Posts and their latents, sorted by key: rows of both tables, int64 (n,) each; and how many of those that were
    encoded before the images' sides removed.
    """
    places = find_last(inputs["key"], stock)
    # what had to be looked at again counts only as it was found this time
    fresh = pa.chunked_array([chunk for each in done for chunk in each.stock.latents["key"].chunks], pa.string())
    accepted = places != UNKNOWN
    looked_at = inputs["key"].take(pa.array(todo.rows))
    accepted[todo.rows] &= pc.is_in(looked_at, fresh.combine_chunks()).to_numpy()
    small = np.zeros(len(places), dtype=bool)
    if min_side is not None and len(stock.latents):
        sides = [stock.latents[f"original_{side}"].to_numpy()[np.maximum(places, 0)] for side in ("width", "height")]
        small = accepted & (np.minimum(*sides) < min_side)
    rows = np.flatnonzero(accepted & ~small)
    rows = rows[pc.sort_indices(inputs["key"].take(pa.array(rows))).to_numpy()]
    return rows, places[rows], Counter({"min_side": int(small.sum())})


def join_columns(inputs: pa.Table, latents: pa.Table, rows: np.ndarray, places: np.ndarray) -> pa.Table:
    """The index's columns, and those that notes are made of, of some posts and their latents."""
    names = [name for name in inputs.schema.names if name not in ("image", *STAT)]
    encoded = LATENTS_SCHEMA.names[1:]
    batches = []
    for start in range(0, max(len(rows), 1), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        posts, made = take_rows(inputs.select(names), rows[part]), take_rows(latents.select(encoded), places[part])
        for name in encoded:
            posts = posts.append_column(LATENTS_SCHEMA.field(name), made[name])
        batches.append(posts)
    return pa.concat_tables(batches)


def find_first_of_bytes(content_hashes: pa.ChunkedArray, worded: np.ndarray) -> np.ndarray:
    """For each sample the one of those whose image has the same bytes that counts: int64 (n,).

    That is the first by key of those that have a caption or tags (``worded``, bool (n,)), else the first of all.
    """
    codes = content_hashes.combine_chunks().dictionary_encode().indices.to_numpy()
    order = np.lexsort((~worded, codes))  # stable: by key among equals
    _, first, inverse = np.unique(codes[order], return_index=True, return_inverse=True)
    found = np.empty(len(codes), dtype=np.int64)
    found[order] = order[first[inverse]]
    return found


def has_words(inputs: pa.Table, rows: np.ndarray) -> np.ndarray:
    """Whether each of some posts has a caption or tags: bool (n,)."""
    names = ["caption", *(name for name in inputs.schema.names if name.startswith("tags_"))]
    texts = take_rows(inputs.select(names), rows)
    worded = np.zeros(len(rows), dtype=bool)
    for name in names:
        worded |= pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(texts[name])), 0).fill_null(False).to_numpy()
    return worded


def note_duplicates(inputs: pa.Table, rows: np.ndarray, first: np.ndarray, doubles: np.ndarray) -> list[dict[str, Any]]:
    """A note for each image that another one equals, byte by byte; ``rows`` are all samples' in order of their keys."""
    lines = take_rows(inputs.select(["key", "origin"]), rows[doubles]).to_pylist()
    others = take_rows(inputs.select(["key"]), rows[first[doubles]])["key"].to_pylist()
    return [{**line, "note": "duplicate", "of": other} for line, other in zip(lines, others, strict=True)]


def note_sizes(table: pa.Table) -> list[dict[str, Any]]:
    """A note where the post states another size than the file has."""
    differs = pc.or_kleene(
        pc.not_equal(table["stated_width"], table["original_width"]),
        pc.not_equal(table["stated_height"], table["original_height"]),
    )
    names = ["key", "origin", "stated_width", "stated_height", "original_width", "original_height"]
    return [
        {
            "key": row["key"],
            "origin": row["origin"],
            "note": "stated_size",
            "stated": [row["stated_width"], row["stated_height"]],
            "file": [row["original_width"], row["original_height"]],
        }
        for row in table.select(names).filter(pc.fill_null(differs, False)).to_pylist()
    ]


def note_frames(table: pa.Table) -> list[dict[str, Any]]:
    """A note where an image has several frames or pages, of which the first was taken."""
    several = table.select(["key", "origin"]).filter(pc.fill_null(table["several_frames"], False))
    return [{**row, "note": "several_frames"} for row in several.to_pylist()]


def place_set(work: Work, folder: Path) -> None:
    """Make ``work.set`` data.shards, or join it to the set that is there.

    Started again after an interruption it ends the same: a set that joins another loses file after file to its place.

    Raises:
        UserError: when another set lies there than the one that this work is for.
    """
    settings, manifest = work.folder / SETTINGS_FILE, folder / MANIFEST_FILE
    joins = json.loads(settings.read_text(encoding="utf-8"))["joins"]
    there = json.loads(manifest.read_text(encoding="utf-8"))["fingerprint"] if manifest.exists() else None
    if joins != there:
        raise UserError(
            f"{folder} is not the set any more that {work.folder} was made for: move one of them away, and start again"
        )
    for path in work.folder.iterdir():  # what led to the set is of no use from here on
        if path.is_dir() and path != work.set:
            shutil.rmtree(path)
        elif not path.is_dir() and path.name not in (WORK_LOCK_FILE, OTHERS_LOCK_FILE, SETTINGS_FILE):
            path.unlink()
    if not folder.exists() or not any(folder.iterdir()):
        work.set.replace(folder)
    else:
        names = [path.name for path in work.set.iterdir() if path.name not in LAST]
        for name in (*names, *LAST):
            if (work.set / name).exists():
                (work.set / name).replace(folder / name)
        sync_folder(folder)
    sync_folder(folder.parent)


def write_jsonl(path: Path, lines: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def count_by(lines: list[dict[str, Any]], name: str) -> dict[str, int]:
    """How often each value of a field occurs, the most frequent first."""
    return dict(Counter(line[name] for line in lines).most_common())


def tell(counts: dict[str, int]) -> str:
    """Counts in one line."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())
