"""Tar shards of raw latents and the Arrow index beside them, as they are written.

Shards are plain tars that any webdataset tool reads, ``<key>.npy`` then ``<key>.json`` (the index row). Training
never walks them: the index tells where each ``.npy`` payload lies.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.core.files import sha256_file, sha256_json, sync_file, write_file, write_json
from trainer.core.layout import INDEX_FILE, MANIFEST_FILE, shard_name
from trainer.data.post import POST_FIELDS
from trainer.data.tables import take_rows

FORMAT_VERSION = 1
WHERE_COLUMNS = ("shard", "offset", "length")  # where a sample lies, not what it is
CHUNK_ROWS = 65536  # rows of one record batch of the index

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
# what the post says may change without encoding anything again
SCHEMA = pa.schema([LATENT_FIELDS[0], POST_FIELDS[0], *LATENT_FIELDS[1:], *POST_FIELDS[1:]])


@dataclass(frozen=True)
class ShardFile:
    """One complete tar, as the manifest lists it."""

    name: str
    samples: int
    size: int  # bytes
    sha256: str


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
        """Header, payload, padding; returns the payload's offset."""
        self._file.write(member_header(name, len(payload)))
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


def member_header(name: str, size: int) -> bytes:
    """The tar header of a member, in one block or more, where its name is long: mtime 0, no owner."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT)


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

    write_file(folder / INDEX_FILE, write_arrow)
    manifest = {
        "format_version": FORMAT_VERSION,
        "latents": latents,
        **more,
        "fingerprint": fingerprint_rows(ordered, latents),
        "index_sha256": sha256_file(folder / INDEX_FILE),
        "shards": [vars(shard) for shard in sorted(shards, key=lambda shard: shard.name)],
    }
    write_json(folder / MANIFEST_FILE, manifest)
    return manifest


def fingerprint_rows(ordered: pa.Table, latents: dict[str, Any]) -> str:
    """What the samples are, however they are spread over shards: SHA-256 over what made them and each row's JSON."""
    digest = hashlib.sha256(sha256_json(latents).encode())
    what = ordered.drop_columns(list(WHERE_COLUMNS))
    for start in range(0, len(what), 4096):
        for row in what.slice(start, 4096).to_pylist():
            digest.update(json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
