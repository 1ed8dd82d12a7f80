"""Every byte of a set of shards against its manifest and its index. Reads each shard once; writes nothing.

Payloads are found by the index and not by walking the tar, so that a damaged header or payload is told of its own
sample and hides no other. What lies between two payloads, the end of one sample and the head of the next, is read
as a small tar of its own.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from trainer.core.errors import UserError
from trainer.core.files import sha256_file
from trainer.core.layout import INDEX_FILE, LATENTS_FILE, MANIFEST_FILE
from trainer.data.index import Index, read_manifest
from trainer.data.shards import LATENT_FIELDS, SCHEMA, Row, fingerprint_rows

BLOCK_BYTES = 1 << 20  # what is read at once where nothing but the hash is wanted

Advance = Callable[[int], object]  # told of every so many bytes that are done with
Finding = tuple[str, str]  # a sample's key, and what is wrong with it


@dataclass(frozen=True)
class Verified:
    """What was checked and found whole, for people."""

    folder: Path
    samples: int
    shards: int
    size: int  # bytes of all shards

    def __str__(self) -> str:
        return f"{self.samples} samples in {self.shards} shards, {self.size} bytes, all as written: {self.folder}"


def verify_shards(folder: Path, progress: bool = True) -> Verified:
    """Check shards, samples, index and fingerprint.

    Raises:
        UserError: with all problems, one a line, each naming its shard and, where there is one, its sample.
    """
    manifest = read_manifest(folder)
    size = sum(shard["size"] for shard in manifest["shards"])
    problems: list[str] = []
    with tqdm(total=size, unit="B", unit_scale=True, desc="verify", disable=not progress) as meter:
        for problem in find_problems(Index(folder, manifest), meter.update):
            problems.append(problem)
            meter.set_postfix_str(f"{len(problems)} problem(s)")
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(
            f"{len(problems)} problem(s) in {folder}:\n{listed}\n"
            "restore what is named from a copy, or move the folder away and run scripts/build_shards.py"
        )
    return Verified(folder, len(Index(folder, manifest)), len(manifest["shards"]), size)


def find_problems(index: Index, advance: Advance) -> Iterator[str]:
    """All that is wrong, shard by shard, then of the whole."""
    folder, manifest = index.folder, index.manifest
    table, problem = open_table(index)
    if problem:
        yield problem
    # where the index is not the manifest's, a post's fields that differ from its tar's are told of their samples too
    whole = list(check_whole(table, manifest)) if table else []
    strict, rows = bool(problem or whole), table
    if table:
        dead, problem = find_dead(index, table)
        if problem:
            yield problem
        rows = pa.concat_tables([table, dead], promote_options="permissive") if len(dead) else table
    places = order_by_place(rows) if rows else {}
    for shard in manifest["shards"]:
        yield from check_shard(folder, shard, take_rows(rows, places.get(shard["name"], [])), advance, strict)
    names = {shard["name"] for shard in manifest["shards"]}
    for name in sorted(places.keys() - names):
        yield f"{INDEX_FILE} names shard {name}, {MANIFEST_FILE} does not list it"
    for name in sorted({path.name for path in folder.glob("*.tar")} - names):
        yield f"{name} is not of this set: {MANIFEST_FILE} does not list it"
    yield from whole


def open_table(index: Index) -> tuple[pa.Table | None, str | None]:
    """The index's rows, None where they cannot be trusted to be read, and what is wrong with the file."""
    path = index.folder / INDEX_FILE
    if not path.is_file():
        return None, f"{INDEX_FILE} is missing: samples cannot be checked, only whole shards"
    changed = sha256_file(path) != index.manifest["index_sha256"]
    problem = f"{INDEX_FILE} is not the one that {MANIFEST_FILE} names (its SHA-256 differs)" if changed else None
    try:
        index.table.validate(full=True)  # a damaged offset would otherwise read outside the file
    except (pa.ArrowException, OSError) as error:
        return None, f"{problem or INDEX_FILE}; it cannot be read ({error}): only whole shards are checked"
    if not index.table.schema.equals(SCHEMA):
        return None, f"{problem or INDEX_FILE}; it has other columns than this program's: only whole shards are checked"
    return index.table, problem


def order_by_place(table: pa.Table) -> dict[str, np.ndarray]:
    """Shard name -> its rows of the index in the order of their offsets."""
    encoded = table["shard"].combine_chunks().dictionary_encode()
    codes, offsets = encoded.indices.to_numpy(), table["offset"].to_numpy()
    order = np.lexsort((offsets, codes))
    starts = np.searchsorted(codes[order], np.arange(len(encoded.dictionary) + 1))
    names = encoded.dictionary.to_pylist()
    return {name: order[starts[i] : starts[i + 1]] for i, name in enumerate(names)}


def find_dead(index: Index, table: pa.Table) -> tuple[pa.Table, str | None]:
    """Samples that lie in a tar and not in the index, such as a filtered post's; and what is wrong with their list."""
    path, named = index.folder / LATENTS_FILE, index.manifest.get("latents_sha256")
    none = SCHEMA.empty_table()
    if named is None:
        return none, None
    if not path.is_file():
        return none, f"{LATENTS_FILE} is missing"
    if sha256_file(path) != named:
        return none, f"{LATENTS_FILE} is not the one that {MANIFEST_FILE} names (its SHA-256 differs)"
    with pa.memory_map(str(path)) as file:
        known = pa.ipc.open_file(file).read_all()
    dead = known.join(table.select(["shard", "offset"]), ["shard", "offset"], join_type="left anti")
    return dead.select([field.name for field in LATENT_FIELDS]), None


def take_rows(table: pa.Table | None, numbers: Any) -> Iterator[Row] | None:
    """Rows of the index, one at a time; None where there is no index."""
    return None if table is None else (table.slice(int(number), 1).to_pylist()[0] for number in numbers)


def check_shard(
    folder: Path, shard: dict[str, Any], rows: Iterator[Row] | None, advance: Advance, strict: bool
) -> Iterator[str]:
    """One shard's size, hash and samples; ``rows`` in the order in which they must lie.

    ``strict`` tells of posts whose fields are others than when they were encoded; where the index is the manifest's,
    that only means that they were prepared again.
    """
    path, name = folder / shard["name"], f"shard {shard['name']}"
    if not path.is_file():
        advance(shard["size"])
        yield f"{name} is missing"
        return
    size = path.stat().st_size
    if size != shard["size"]:
        yield f"{name} has {size} bytes, {MANIFEST_FILE} says {shard['size']}"
    samples = 0
    with path.open("rb") as file:
        reader = Reader(file, advance)
        try:
            previous: Row | None = None
            for row in rows or ():
                samples += 1
                yield from (f"{name}, key {key}: {what}" for key, what in check_sample(reader, previous, row, strict))
                # of a sample that could not be read the end is not looked for either
                previous = row if reader.position == row["offset"] + row["length"] else None
            rest = reader.read_rest(keep=previous is not None)
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror or error}"
            return
    if previous is not None:
        yield from (f"{name}, key {key}: {what}" for key, what in check_gap(rest, previous, None, strict))
    if reader.digest.hexdigest() != shard["sha256"]:
        yield f"{name} is not as it was written (its SHA-256 differs)"
    if rows is not None and samples != shard["samples"]:
        yield f"{name} has {samples} samples in {INDEX_FILE}, {MANIFEST_FILE} says {shard['samples']}"


class Reader:
    """A file read from front to back, hashed and counted on the way."""

    def __init__(self, file: BinaryIO, advance: Advance) -> None:
        self.file = file
        self.advance = advance
        self.digest = hashlib.sha256()
        self.position = 0

    def read(self, size: int) -> bytes:
        """The next bytes, fewer at the end of the file."""
        data = self.file.read(size)
        self.digest.update(data)
        self.position += len(data)
        self.advance(len(data))
        return data

    def read_rest(self, keep: bool) -> bytes:
        """All that is left; returned only if it is to be kept, since without an index that is the whole shard."""
        parts = []
        while data := self.read(BLOCK_BYTES):
            parts += [data] if keep else []
        return b"".join(parts)


def check_sample(reader: Reader, previous: Row | None, row: Row, strict: bool) -> Iterator[Finding]:
    """One sample's header and latents, and the JSON of the sample before it, which lies in front of them."""
    if row["offset"] < reader.position or row["length"] < 0:
        yield row["key"], f"{INDEX_FILE} places it at byte {row['offset']}, inside another sample"
        return
    gap = reader.read(row["offset"] - reader.position)
    payload = reader.read(row["length"])
    if reader.position < row["offset"] + row["length"]:
        yield row["key"], f"{row['key']}.npy lies beyond the end of the file"
        return
    yield from check_gap(gap, previous, row, strict)
    if zlib.crc32(payload) != row["crc32"]:
        yield row["key"], f"the bytes of {row['key']}.npy are damaged (CRC-32 differs)"
    else:
        yield from check_latents(payload, row)


def check_gap(gap: bytes, previous: Row | None, following: Row | None, strict: bool) -> Iterator[Finding]:
    """What lies between two payloads: the padding and JSON of ``previous``, the header of ``following``."""
    nearest = previous or following
    assert nearest is not None
    if previous is not None:
        gap = gap[-previous["length"] % tarfile.BLOCKSIZE :]
    try:
        # the following payload is not there, but the reader looks one member ahead only when it is asked to
        with tarfile.open(fileobj=io.BytesIO(gap + bytes(2 * tarfile.BLOCKSIZE)), mode="r:") as tar:
            if previous is not None:
                yield from check_json(tar, previous, strict)
            if following is not None:
                yield from check_header(tar.next(), len(gap), following)
            elif (extra := tar.next()) is not None:
                yield nearest["key"], f"{extra.name} follows it in the tar, which is not in {INDEX_FILE}"
    # damaged headers make the library raise whatever comes to hand
    except Exception as error:
        where = "behind" if previous is not None else "in front of"
        yield nearest["key"], f"the tar is damaged {where} {nearest['key']}.npy: {type(error).__name__}: {error}"


def check_json(tar: tarfile.TarFile, row: Row, strict: bool) -> Iterator[Finding]:
    """The sample's ``.json`` member, which is its row of the index, as far as it concerns its latents or else whole."""
    member, name = tar.next(), f"{row['key']}.json"
    if member is None or member.name != name:
        yield row["key"], f"the tar holds {member.name if member else 'no readable member'} where {name} belongs"
        return
    file = tar.extractfile(member)
    told = json.loads(file.read()) if file else None
    compared = row if strict and row["source"] is not None else [field.name for field in LATENT_FIELDS]
    if not isinstance(told, dict) or any(told.get(field) != row[field] for field in compared):
        fields = [field for field in compared if not isinstance(told, dict) or told.get(field) != row[field]]
        yield row["key"], f"{name} and {INDEX_FILE} differ in {', '.join(fields) or 'their fields'}"


def check_header(member: tarfile.TarInfo | None, place: int, row: Row) -> Iterator[Finding]:
    """The header of the sample's ``.npy`` member; ``place`` is where the index has its payload begin."""
    name = f"{row['key']}.npy"
    if member is None or member.name != name:
        yield row["key"], f"the tar holds {member.name if member else 'no readable member'} where {name} belongs"
    elif (member.offset_data, member.size) != (place, row["length"]):
        yield row["key"], f"{name} does not lie where {INDEX_FILE} has it: {member.size} bytes, not {row['length']}"


def check_latents(payload: bytes, row: Row) -> Iterator[Finding]:
    """Whole bytes must also be the bucket's latents, fp16 (4, H/8, W/8) and finite."""
    expected = (4, row["bucket_height"] // 8, row["bucket_width"] // 8)
    try:
        latents = np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
    except ValueError as error:
        yield row["key"], f"{row['key']}.npy is not an array: {error}"
        return
    if latents.dtype != np.float16 or latents.shape != expected:
        yield row["key"], f"{row['key']}.npy holds {latents.dtype} {latents.shape}, the index says float16 {expected}"
    elif not np.isfinite(latents).all():
        yield row["key"], f"{row['key']}.npy holds NaN or infinity"


def check_whole(table: pa.Table, manifest: dict[str, Any]) -> Iterator[str]:
    """The index's order, and what the manifest says of all rows together."""
    keys = table["key"]
    if len(keys) > 1 and not pc.all(pc.less(keys[:-1], keys[1:])).as_py():
        yield f"the rows of {INDEX_FILE} are not sorted by key, or a key occurs twice"
    counted = manifest.get("counts", {}).get("samples", len(table))
    if counted != len(table):
        yield f"{INDEX_FILE} has {len(table)} rows, {MANIFEST_FILE} counts {counted} samples"
    if fingerprint_rows(table, manifest["latents"]) != manifest["fingerprint"]:
        yield f"the fingerprint of {MANIFEST_FILE} is not that of these rows and settings"
