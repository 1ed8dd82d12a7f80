"""Tar shards of raw latents, the Arrow index beside them, and the reading of exactly one sample's bytes.

Shards are plain tars that any webdataset tool reads, ``<key>.npy`` then ``<key>.json`` (the index row). Training
never walks them: the index tells where each ``.npy`` payload lies.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.payload import read_payload_into
from trainer.data.tables import take_rows
from trainer.errors import UserError
from trainer.files import sha256_file, sha256_json, sync_file, write_file, write_json

FORMAT_VERSION = 1
INDEX_NAME = "index.arrow"
MANIFEST_NAME = "manifest.json"
QUARANTINE_NAME = "quarantine.jsonl"
NOTES_NAME = "notes.jsonl"
LATENTS_NAME = "latents.arrow"  # every sample that lies in a tar, in the index or not
WHERE_COLUMNS = ("shard", "offset", "length")  # where a sample lies, not what it is
CHUNK_ROWS = 65536  # rows of one record batch of the index
MAX_OPEN_SHARDS = 256  # descriptors a reader keeps, well below the usual limit of 1024

Row = dict[str, Any]

# what a sample's latents are, where they lie and from which image they come: known once they are encoded
LATENT_FIELDS = [
    *(pa.field(name, pa.string(), nullable=False) for name in ("key", "shard")),
    *(pa.field(name, pa.int64(), nullable=False) for name in ("offset", "length")),
    pa.field("crc32", pa.uint32(), nullable=False),  # of the .npy payload; does not fit a signed int32
    pa.field("content_hash", pa.string(), nullable=False),  # SHA-256 of the image file
    *(
        pa.field(name, pa.int32(), nullable=False)
        for name in ("bucket_width", "bucket_height", "original_width", "original_height", "crop_left", "crop_top")
    ),
]
# what the post says: it may change without encoding anything again
POST_FIELDS = [
    pa.field("source", pa.string(), nullable=False),
    *(pa.field(name, pa.string()) for name in ("caption", "rating")),
    *(pa.field(name, pa.int32()) for name in ("score", "year")),
    *(pa.field(f"tags_{name}", pa.string()) for name in ("general", "character", "copyright", "artist", "meta")),
    pa.field("extra", pa.string()),  # JSON
]
SCHEMA = pa.schema([LATENT_FIELDS[0], POST_FIELDS[0], *LATENT_FIELDS[1:], *POST_FIELDS[1:]])


@dataclass(frozen=True)
class ShardFile:
    """One complete tar, as the manifest lists it."""

    name: str
    samples: int
    size: int  # bytes
    sha256: str


def shard_name(number: int) -> str:
    """The name of a set's shard, counted from 0."""
    return f"shard-{number:05d}.tar"


def shard_number(name: str) -> int:
    """The inverse of ``shard_name``."""
    return int(name.removeprefix("shard-").removesuffix(".tar"))


class ShardWriter:
    """Writes one shard under a temporary name; ``finish`` puts it in its place. Samples alone decide its bytes."""

    def __init__(self, folder: Path, number: int) -> None:
        self.name = shard_name(number)
        self.rows: list[Row] = []
        self._path = folder / self.name
        self._temporary = folder / f".tmp-{self.name}"  # a fixed name: what a killed run left is written over
        self._file = self._temporary.open("wb")

    def add(self, row: Mapping[str, Any], raw_latents: np.ndarray) -> Row:
        """Append one sample; ``row`` has the index's columns but for shard, offset, length and crc32. The full row."""
        assert raw_latents.dtype == np.float16 and np.isfinite(raw_latents).all()  # (4, H/8, W/8)
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.ascontiguousarray(raw_latents), allow_pickle=False)
        payload = buffer.getvalue()
        offset = self._write_member(f"{row['key']}.npy", payload)
        where = {"shard": self.name, "offset": offset, "length": len(payload), "crc32": zlib.crc32(payload)}
        full: Row = {name: where.get(name, row.get(name)) for name in SCHEMA.names}
        self._write_member(f"{row['key']}.json", json.dumps(full, ensure_ascii=False).encode())
        self.rows.append(full)
        return full

    def _write_member(self, name: str, payload: bytes) -> int:
        """Header, payload, padding; returns the payload's offset. TarInfo's own defaults are mtime 0 and no owner."""
        info = tarfile.TarInfo(name)
        info.size = len(payload)
        self._file.write(info.tobuf(tarfile.PAX_FORMAT))
        offset = self._file.tell()
        self._file.write(payload + bytes(-len(payload) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> ShardFile:
        """End the tar, force it to the disk and give it its name."""
        self._file.write(bytes(2 * tarfile.BLOCKSIZE))
        self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
        self._file.close()
        sync_file(self._temporary)
        self._temporary.replace(self._path)
        sync_file(self._path.parent)
        return ShardFile(self.name, len(self.rows), self._path.stat().st_size, sha256_file(self._path))


def rows_to_table(rows: Sequence[Row]) -> pa.Table:
    """Index rows as an Arrow table of the contract's columns."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def write_index(
    folder: Path, table: pa.Table, shards: Sequence[ShardFile], latents: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """Write index.arrow, sorted by key, and then manifest.json, which makes the set complete; returns the manifest.

    ``latents`` says what made them; ``more`` are the manifest's other sections (inputs, counts).
    """
    order = pc.sort_indices(table, sort_keys=[("key", "ascending")])
    # in batches: one array of strings holds 2 GiB at most
    starts = range(0, len(order), CHUNK_ROWS)
    batches = [take_rows(table, order.slice(start, CHUNK_ROWS).to_numpy()) for start in starts]
    ordered = pa.concat_tables([table.slice(0, 0), *batches])

    def write_arrow(path: Path) -> None:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for batch in batches:
                writer.write_table(batch.combine_chunks(), max_chunksize=CHUNK_ROWS)

    write_file(folder / INDEX_NAME, write_arrow)
    manifest = {
        "format_version": FORMAT_VERSION,
        "latents": latents,
        **more,
        "fingerprint": fingerprint_rows(ordered, latents),
        "index_sha256": sha256_file(folder / INDEX_NAME),
        "shards": [vars(shard) for shard in sorted(shards, key=lambda shard: shard.name)],
    }
    write_json(folder / MANIFEST_NAME, manifest)
    return manifest


def fingerprint_rows(ordered: pa.Table, latents: dict[str, Any]) -> str:
    """What the samples are, however they are spread over shards: SHA-256 over what made them and each row's JSON."""
    digest = hashlib.sha256(sha256_json(latents).encode())
    what = ordered.drop_columns(list(WHERE_COLUMNS))
    for start in range(0, len(what), 4096):
        for row in what.slice(start, 4096).to_pylist():
            digest.update(json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True)
class Index:
    """An opened set of shards. Threads share it; it pickles to its folder and manifest."""

    folder: Path
    manifest: dict[str, Any]

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, (self.folder, self.manifest)

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def table(self) -> pa.Table:
        """All rows, memory-mapped, sorted by key."""
        return pa.ipc.open_file(pa.memory_map(str(self.folder / INDEX_NAME))).read_all()

    @cached_property
    def _columns(self) -> dict[str, pa.ChunkedArray]:
        return dict(zip(self.table.column_names, self.table.columns, strict=True))

    @cached_property
    def _open_shard(self) -> Callable[[str], io.FileIO]:
        """A shard by name, the latest ones kept open. One that drops out closes when the last reader is done."""
        folder = self.folder  # not self: a cycle would keep all open
        return lru_cache(maxsize=MAX_OPEN_SHARDS)(lambda name: io.FileIO(folder / name))

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


def open_index(folder: str | Path) -> Index:
    """Open a set of shards after checking that manifest, index and shards belong together.

    Shards are checked by size here and sample by sample when read: hashing them all would read 166 GB.

    Raises:
        UserError: when a part is missing, of another format, or not the one the manifest lists.
    """
    folder = Path(folder)
    index = Index(folder, read_manifest(folder))
    problem = find_index_problem(index) or next(find_shard_problems(index), None)
    if problem:
        raise UserError(
            f"{folder}: {problem}; start scripts/build_shards.py again if it was interrupted, else restore the folder, "
            "or move it away"
        )
    return index


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete set of shards."""
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: make the shards first, with scripts/build_shards.py") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format_version {version}, this program reads {FORMAT_VERSION}")
    return manifest


def find_index_problem(index: Index) -> str | None:
    """Why index.arrow is not the manifest's, if so."""
    path = index.folder / INDEX_NAME
    if not path.is_file():
        return f"{INDEX_NAME} is missing"
    if sha256_file(path) != index.manifest["index_sha256"]:
        return f"{INDEX_NAME} is not the one that {MANIFEST_NAME} names (its SHA-256 differs)"
    if not index.table.schema.equals(SCHEMA):
        return f"{INDEX_NAME} has other columns than this program's"
    return None


def find_shard_problems(index: Index) -> Iterator[str]:
    """What is wrong with the shard files, as far as their names and sizes tell."""
    listed = {shard["name"]: shard["size"] for shard in index.manifest["shards"]}
    for name, size in listed.items():
        path = index.folder / name
        if not path.is_file():
            yield f"shard {name} is missing"
        elif path.stat().st_size != size:
            yield f"shard {name} has {path.stat().st_size} bytes, {MANIFEST_NAME} says {size}"
    for name in sorted(set(pc.unique(index.table["shard"]).to_pylist()) - set(listed)):
        yield f"{INDEX_NAME} names shard {name}, {MANIFEST_NAME} does not list it"


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
    """Read one sample's raw latents into an array of their shape: its bytes and nothing else are read.

    Raises:
        UserError: naming shard and key, when the bytes are not those that were written.
    """
    where = f"shard {index.folder}/{record['shard']}, key {record['key']}"
    place = {name: record[name] for name in ("offset", "length", "crc32")}
    try:
        file = index._open_shard(record["shard"])
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from error
    read_payload_into(raw_latents, file, **place, where=where)
