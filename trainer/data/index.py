"""A set of shards opened: the Arrow index, and the reading of exactly one sample's bytes to where they are wanted."""

import io
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.core.errors import UserError, shorten
from trainer.core.files import sha256_file
from trainer.core.layout import INDEX_FILE, MANIFEST_FILE
from trainer.data.index_checks import find_columns_problem, find_rows_problem
from trainer.data.manifest import read_manifest
from trainer.data.shards import Row
from trainer.data.sites import TAG_CATEGORIES
from trainer.data.tables import read_table

# of the index, from which captions are composed
CAPTION_FIELDS = (*(f"tags_{category}" for category in TAG_CATEGORIES), "rating", "score", "year")
MAX_OPEN_SHARDS = 256  # descriptors a reader keeps, well below the usual limit of 1024
FP16_EXPONENT = np.uint16(0x7C00)
NOT_OURS = "this is not what build_shards.py writes, and the set's own sums agree with it: build the set again"


class BadSample(UserError):
    """One sample cannot be read, or is not what the index says; the others may be sound."""


@dataclass(frozen=True)
class Index:
    """An opened set of shards, or a subset of it. Threads share it; it pickles to its folder, manifest and choice."""

    folder: Path
    manifest: dict[str, Any]
    chosen: np.ndarray | None = field(default=None, compare=False)  # bool, of each row of the set; None: all

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, (self.folder, self.manifest, self.chosen)

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def table(self) -> pa.Table:
        """The rows, sorted by key: all of the set memory-mapped, those of a subset in memory."""
        table = read_table(self.folder / INDEX_FILE)
        return table if self.chosen is None else table.filter(pa.array(self.chosen))

    @cached_property
    def _columns(self) -> dict[str, pa.ChunkedArray]:
        return dict(zip(self.table.column_names, self.table.columns, strict=True))

    @cached_property
    def _open_shard(self) -> Callable[[str], io.FileIO]:
        """A shard by name, the latest ones kept open. One that drops out closes when the last reader is done."""
        folder = self.folder  # not self: a cycle would keep all open
        return lru_cache(maxsize=MAX_OPEN_SHARDS)(lambda name: io.FileIO(folder / name, opener=open_at_once))

    @cached_property
    def bucket_sizes(self) -> np.ndarray:
        """(n, 2) int32, (width, height) of each row's bucket."""
        return np.stack([self.table[f"bucket_{side}"].to_numpy() for side in ("width", "height")], axis=1)

    @property
    def fingerprint(self) -> str:
        """Names the samples and what made them, whatever the sharding."""
        return self.manifest["fingerprint"]

    def row(self, number: int) -> Row:
        """One row as a dict of plain Python values, the only one that is materialised."""
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        # value by value: slicing a table and listing its one row takes four times as long
        return {name: column[int(number)].as_py() for name, column in self._columns.items()}


def open_at_once(path: str, flags: int) -> int:
    """Open a file; of a pipe the opening would wait for ever, so that reading it is what fails."""
    return os.open(path, flags | os.O_NONBLOCK)


def count_fields(table: pa.Table, columns: Iterable[str] = (), beside: bool = False) -> dict[str, int]:
    """How many samples have a finished caption (``caption``), and how many of the others each field that makes one.

    What a finished caption stands beside is no part of it: no rule touches that sample. ``columns`` are those of
    ``extra``, or of the index, that rules ask for, ``extra.NAME``, where they hold a number. Where a post's own caption
    stands ``beside`` what is composed, it is one more such field (``text``), and no caption is finished.
    """
    finished = pc.is_valid(table["caption"])
    composed = pc.or_(finished, True) if beside else pc.invert(finished)
    counts = {"caption": 0, "text": count_true(finished)} if beside else {"caption": count_true(finished)}
    for name in CAPTION_FIELDS:
        column = table[name]
        there = pc.greater(pc.binary_length(column), 0) if pa.types.is_string(column.type) else pc.is_valid(column)
        counts[name] = count_true(pc.and_kleene(composed, there))
    for name in columns:
        number = re.escape(json.dumps(name, ensure_ascii=False)) + r":\s*-?[0-9]"  # parsing a million would take long
        own = name in table.column_names
        there = pc.is_valid(table[name]) if own else pc.match_substring_regex(table["extra"], number)
        counts[f"extra.{name}"] = count_true(pc.and_kleene(composed, there))
    return counts


def count_true(values: pa.ChunkedArray) -> int:
    """How many are true, and neither false nor null."""
    return pc.sum(values).as_py() or 0


def open_index(folder: str | Path) -> Index:
    """Open a set of shards after checking that manifest, index and shards belong together.

    Shards are checked by size here and sample by sample when read: hashing them all would read 166 GB.

    Raises:
        UserError: when a part is missing, of another format, or not the one the manifest lists.
    """
    folder = Path(folder)
    index = Index(folder, read_manifest(folder))
    shards = index.manifest["shards"]
    problem = find_index_problem(index) or find_rows_problem(index.table, shards)
    if problem := problem or next((each for shard in shards if (each := find_file_problem(folder, shard))), None):
        raise UserError(
            f"{folder}: {problem}; start scripts/build_shards.py again if it was interrupted, else restore the folder, "
            "or move it away"
        )
    return index


def find_index_problem(index: Index) -> str | None:
    """Why index.arrow is not the manifest's, or no index, if so."""
    if problem := find_hash_problem(index.folder / INDEX_FILE, index.manifest["index_sha256"]):
        return problem
    try:
        return find_columns_problem(index.table.schema)
    except (pa.ArrowException, OSError) as error:
        return f"{INDEX_FILE} is no Arrow file: {shorten(str(error), 120)}"


def find_hash_problem(path: Path, sha256: str) -> str | None:
    """Why a file is not the one whose SHA-256 the manifest has, if so."""
    if not path.is_file():
        return f"{path.name} is missing"
    if sha256_file(path) != sha256:
        return f"{path.name} is not the one that {MANIFEST_FILE} names (its SHA-256 differs)"
    return None


def find_file_problem(folder: Path, shard: dict[str, Any]) -> str | None:
    """Why a shard's file is not the one that the manifest lists, as far as its size tells."""
    path = folder / shard["name"]
    if not path.is_file():
        return f"shard {shard['name']} is missing"
    if path.stat().st_size != shard["size"]:
        return f"shard {shard['name']} has {path.stat().st_size} bytes, {MANIFEST_FILE} says {shard['size']}"
    return None


def read_raw_latents(index: Index, row: int) -> np.ndarray:
    """One sample's raw latents, fp16 (4, H/8, W/8); see ``read_latents_into``."""
    record = index.row(row)
    raw_latents = np.empty(latents_shape(record), dtype=np.float16)
    read_latents_into(raw_latents, index, record)
    return raw_latents


def latents_shape(record: Row) -> tuple[int, int, int]:
    """(4, H/8, W/8) of a sample's latents."""
    return 4, record["bucket_height"] // 8, record["bucket_width"] // 8


def read_latents_into(raw_latents: np.ndarray, index: Index, record: Row) -> None:
    """Fill a contiguous fp16 (4, H/8, W/8) array from a sample's ``.npy``, which must be of that shape.

    Nothing but its bytes is read, and they are not copied again.

    Raises:
        BadSample: naming shard and key, when the bytes are not those that were written, or no finite latents.
    """
    where = f"shard {index.folder}/{record['shard']}, key {record['key']}"
    written = npy_header(raw_latents.shape)
    header = bytearray(len(written))
    try:
        shard = index._open_shard(record["shard"])  # held while it is read: the cache may drop it, or keep another's
        read = os.preadv(shard.fileno(), [header, raw_latents.data], record["offset"])
        found = zlib.crc32(raw_latents.data, zlib.crc32(header))
        if (read, header, found) != (record["length"], written, record["crc32"]):
            # damaged, or of another shape or layout: read again as whatever it says it is
            payload = os.pread(shard.fileno(), record["length"], record["offset"])
            if len(payload) != record["length"]:
                raise BadSample(f"{where}: the shard ends before its bytes do; restore this shard from a copy")
            if zlib.crc32(payload) != record["crc32"]:
                raise BadSample(f"{where}: the bytes are damaged (CRC-32 differs); restore this shard from a copy")
            raw_latents[...] = parse_npy(payload, raw_latents.shape)
    except OSError as error:
        raise BadSample(f"{where}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadSample(f"{where}: {error}; {NOT_OURS}") from error
    # all bits of the exponent are those of infinity and NaN: faster than isfinite, which has no loop for fp16
    if (raw_latents.view(np.uint16) & FP16_EXPONENT == FP16_EXPONENT).any():
        raise BadSample(f"{where}: the latents hold NaN or infinity; {NOT_OURS}")


def parse_npy(payload: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The fp16 array of a ``.npy`` file in whatever version and layout, which must be of this shape.

    Its header is read alone: what it declares is compared before memory is asked for, and no pickle is ever loaded.

    Raises:
        ValueError: saying what it is instead.
    """
    buffer = io.BytesIO(payload)
    try:
        version = np.lib.format.read_magic(buffer)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        declared, fortran, dtype = reader(buffer)
    except Exception as error:  # NumPy parses it as Python, and lets through whatever that raises
        raise ValueError(f"is no .npy file ({shorten(str(error), 80)})") from error
    if dtype != np.float16 or declared != shape:
        kind = "Python objects" if dtype.hasobject else str(dtype)
        raise ValueError(f"holds {kind} {shorten(str(declared), 60)}, the index says float16 {shape}")
    if (rest := len(payload) - buffer.tell()) != (needed := 2 * math.prod(shape)):
        raise ValueError(f"has {rest} bytes of numbers, not {needed}")
    flat = np.frombuffer(payload, dtype=np.float16, offset=buffer.tell())
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


@lru_cache(maxsize=256)  # one a bucket
def npy_header(shape: tuple[int, ...]) -> bytes:
    """What NumPy writes before the numbers of fp16 latents."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return buffer.getvalue()
