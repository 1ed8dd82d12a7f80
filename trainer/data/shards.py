"""Tar shards of raw latents and the Arrow index beside them, as they are written.

Shards are plain tars that any webdataset tool reads, ``<key>.npy`` then ``<key>.json`` (the index row). Training
never walks them: the index tells where each ``.npy`` payload lies.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.core.files import sha256_file, sha256_json, sync_file, write_json
from trainer.core.layout import INDEX_FILE, MANIFEST_FILE, shard_name
from trainer.data.manifest import SET_FORMAT, seal_manifest
from trainer.data.post import POST_FIELDS
from trainer.data.tables import ArrowStream, cut_batches, stream_table, write_batches

INDEX_ROWS = 65536  # rows of one record batch of the index

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
        self._digest = hashlib.sha256()

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
        self._write(member_header(name, len(payload)))
        offset = self._file.tell()
        self._write(payload + bytes(-len(payload) % tarfile.BLOCKSIZE))
        return offset

    def _write(self, content: bytes) -> None:
        """Hashed as it is written, so that the device does not wait for that at the end of a shard."""
        self._file.write(content)
        self._digest.update(content)

    def finish(self) -> ShardFile:
        """End the tar, force it to the disk and give it its name."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
        self._file.close()
        sync_file(self._temporary)
        self._temporary.replace(self._path)
        sync_file(self._path.parent)
        return ShardFile(self.name, len(self.rows), self._path.stat().st_size, self._digest.hexdigest())


def member_header(name: str, size: int) -> bytes:
    """The tar header of a member, in one block or more, where its name is long: mtime 0, no owner."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT)


def write_index(
    folder: Path,
    rows: pa.Table | pa.RecordBatchReader,
    shards: Iterable[ShardFile],
    latents: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """Write index.arrow and then manifest.json, which makes the set complete; returns the manifest.

    Args:
        rows: of SCHEMA's columns, in order of the keys, no more than one batch of which is in memory at a time.
        latents: what made them.
        more: the manifest's other sections (inputs, counts).
    """
    path = folder / INDEX_FILE
    write_batches(path, SCHEMA, cut_batches(pa.RecordBatchReader.from_stream(rows), SCHEMA, INDEX_ROWS))
    said = {
        "format_version": SET_FORMAT,
        "latents": latents,
        **more,
        "fingerprint": fingerprint_rows(stream_table(path), latents),
        "index_sha256": sha256_file(path),
        "shards": [vars(shard) for shard in sorted(shards, key=lambda shard: shard.name)],
    }
    manifest = seal_manifest(said)
    write_json(folder / MANIFEST_FILE, manifest)
    return manifest


def fingerprint_rows(rows: pa.Table | ArrowStream, latents: dict[str, Any]) -> str:
    """What the samples are, however they are spread over shards: SHA-256 over what made them and each row's JSON.

    Args:
        rows: in order of the keys.
    """
    digest = hashlib.sha256(sha256_json(latents).encode())
    for batch in pa.RecordBatchReader.from_stream(rows):
        what = batch.drop_columns(["shard", "offset", "length"])
        for start in range(0, len(what), 4096):
            for row in what.slice(start, 4096).to_pylist():
                line = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
                digest.update(line.encode() + b"\n")
    return digest.hexdigest()
