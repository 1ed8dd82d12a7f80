"""Which images of a set are trained on: ``data.subset``, a file of keys, and ``data.subset_rules``.

An index of a subset has its rows alone, so that plan, weights and counts are those of a set that holds no others; the
shards are read where they lie.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.config.schema import CaptionsConfig, DataConfig
from trainer.core.errors import UserError, shorten
from trainer.core.files import read_listed, write_text
from trainer.core.progress import format_count, waiting
from trainer.data.conditions import find_images_of
from trainer.data.index import Index, open_index
from trainer.data.percentiles import quality_by_percentile

EXAMPLES = 4  # keys that a message names
WHOLE_SET = {"sha256": "all of it"}  # what is recorded where no subset is chosen, as in every set of older versions


def open_chosen(data: DataConfig, captions: CaptionsConfig) -> Index:
    """A config's set of shards, opened: the images that it chooses.

    Raises:
        UserError: as ``open_index`` and ``choose_images``.
    """
    return choose_images(open_index(data.shards), data, captions)


def choose_images(index: Index, data: DataConfig, captions: CaptionsConfig) -> Index:
    """The index of the images that a config chooses of a whole set.

    Raises:
        UserError: where none is left, a key is not in the set, or a rule asks for a tag whose scores are not known.
    """
    if data.subset is None and not data.subset_rules:
        return index
    with waiting("choose the images"):
        chosen = find_listed(index.table, data.subset)
        holds = find_rule_images(index.table, data, captions)
        chosen &= join_rules(data, holds, len(index))
    if not chosen.any():
        raise UserError(f"data.subset: of the {format_count(len(index), 'image')} of {index.folder} none is chosen")
    return index if chosen.all() else dataclasses.replace(index, chosen=chosen)


def find_rule_images(table: pa.Table, data: DataConfig, captions: CaptionsConfig) -> list[np.ndarray]:
    """The images of which each rule holds, bool (n,) each."""
    by_score = [rule.tag for rule in captions.quality] if quality_by_percentile(captions) else []
    for number, rule in enumerate(data.subset_rules):
        if rule.tag is not None and rule.tag.replace("_", " ") in by_score:
            raise UserError(
                f"data.subset_rules.{number}.tag: which scores are {rule.tag} is found by percentile of the images "
                "that are trained on, and so not before they are chosen: ask for column: score, or set data.subset to "
                "a file of scripts/choose_subset.py, which takes the percentiles of the whole set"
            )
    return [find_images_of(table, rule, captions) for rule in data.subset_rules]


def join_rules(data: DataConfig, holds: list[np.ndarray], images: int) -> np.ndarray:
    """The images that rules choose together, bool (n,)."""
    some = [here for rule, here in zip(data.subset_rules, holds, strict=True) if not rule.exclude]
    chosen = np.logical_or.reduce(some) if some else np.ones(images, dtype=bool)
    for rule, here in zip(data.subset_rules, holds, strict=True):
        if rule.exclude:
            chosen = chosen & ~here
    return chosen


def find_listed(table: pa.Table, file: str | None) -> np.ndarray:
    """The images whose keys a file lists, bool (n,); all without one.

    Raises:
        UserError: where it cannot be read, or lists a key that is not in the set.
    """
    if file is None:
        return np.ones(len(table), dtype=bool)
    keys = read_keys(Path(file).expanduser())
    strange = keys.filter(pc.invert(pc.is_in(keys, value_set=table["key"].combine_chunks())))
    if len(strange):
        names = ", ".join(shorten(key.as_py(), 40) for key in strange[:EXAMPLES])
        raise UserError(
            f"data.subset: {file}: {len(strange):,} of {format_count(len(keys), 'key')} not in the set, such as "
            f"{names}; choose from this set again (scripts/choose_subset.py), or take them out of the file"
        )
    return pc.is_in(table["key"], value_set=keys).to_numpy()


def read_keys(path: Path) -> pa.Array:
    """The keys of a file, one a line.

    Raises:
        UserError: where it cannot be read, or is empty.
    """
    try:
        keys = read_listed(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.subset: {path} cannot be read: {error}") from error
    if not keys:
        raise UserError(f"data.subset: {path} lists no key")
    return pa.array(keys, pa.string())


def check_keys_path(path: Path, shards: Path) -> None:
    """Refuse to write over anything but a list of keys of the same set.

    Raises:
        UserError: naming the path.
    """
    if path.exists() or path.is_symlink():
        try:
            find_listed(open_index(shards).table, str(path))
        except UserError as error:
            raise UserError(f"{path} is there and lists no keys of {shards}: have them written elsewhere") from error


def write_subset(path: Path, index: Index) -> None:
    """Write the keys of an index, one a line.

    Raises:
        UserError: where nothing can be written.
    """
    try:
        write_text(path, "".join(f"{key}\n" for key in index.table["key"].to_pylist()))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def record_subset(index: Index) -> dict[str, Any]:
    """What is recorded of a subset, and must be the same on resume: a hash of its keys."""
    if index.chosen is None:
        return {"images": len(index), "of": len(index)} | WHOLE_SET
    digest = hashlib.sha256()
    for batch in index.table.select(["key"]).to_batches():
        digest.update("".join(f"{key}\n" for key in batch.column(0).to_pylist()).encode())
    return {"images": len(index), "of": len(index.chosen), "sha256": digest.hexdigest()}


def describe_subset(record: dict[str, Any]) -> str:
    """A recorded subset in a line."""
    return f"subset: {record['images']:,} of the {format_count(record['of'], 'image')} of the set"
