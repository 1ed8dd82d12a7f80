"""Every byte of a set of shards against its manifest. Reads each shard once, a damaged one twice; writes nothing.

A shard whose SHA-256 is the manifest's holds the bytes that were written: finite fp16 latents of each sample's bucket,
at the places that the index has. Neither is checked again, since index and latents.arrow are proven by their own
SHA-256. Where a shard's hash differs, CRC-32, headers and JSON tell which of its samples are damaged.
"""

import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from trainer.core.console import Result
from trainer.core.disk import format_bytes
from trainer.core.errors import UserError, shorten
from trainer.core.files import READ_BYTES
from trainer.core.layout import INDEX_FILE, LATENTS_FILE, MANIFEST_FILE
from trainer.core.progress import BYTES, Meter, format_count
from trainer.data.fields import parse_json
from trainer.data.index import Index, find_file_problem, find_hash_problem, find_index_problem
from trainer.data.index_checks import find_columns_problem, find_rows_problem
from trainer.data.manifest import read_manifest
from trainer.data.shards import LATENT_FIELDS, Row, fingerprint_rows, member_header
from trainer.data.tables import read_table

Advance = Callable[[int], object]  # called with the number of bytes that are done


def verify_shards(folder: Path) -> Result:
    """Check shards, samples, index and fingerprint; what was found whole, in words.

    Raises:
        UserError: with all problems, one a line, each naming its shard and, where there is one, its sample.
    """
    manifest = read_manifest(folder)
    index = Index(folder, manifest)
    size = sum(shard["size"] for shard in manifest["shards"])
    problems: list[str] = []
    with Meter("verify", size, BYTES) as meter:
        for problem in find_damages(index, meter.update):
            problems.append(problem)
            meter.update(0, format_count(len(problems), "problem"))
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(
            f"{format_count(len(problems), 'problem')} in {folder}:\n{listed}\n"
            "restore what is named from a copy, or move the folder away and run scripts/build_shards.py"
        )
    what = f"{format_count(len(index), 'sample')} in {format_count(len(manifest['shards']), 'shard')}"
    said = f"{what}, {format_bytes(size)}, all as written: {folder}"
    return Result(said, [folder], {"samples": len(index), "shards": len(manifest["shards"]), "bytes": size})


def find_damages(index: Index, advance: Advance) -> Iterator[str]:
    """All that is wrong: with the lists of samples, shard by shard, with the folder, and with the index's rows."""
    shards = index.manifest["shards"]
    named = index.manifest.get("latents_sha256")  # older sets have no latents.arrow
    of_index = find_index_problem(index) or find_rows_problem(index.table, shards)
    of_latents = find_latents_problem(index.folder, shards, named) if named else None
    # the index lacks samples that are filtered now, or whose posts are gone
    samples_file = LATENTS_FILE if named and not of_latents else None if of_index else INDEX_FILE
    whole_only = "" if samples_file else ": samples cannot be checked, only whole shards"
    yield from (problem + whole_only for problem in (of_index, of_latents) if problem)
    samples = read_table(index.folder / samples_file) if samples_file else None
    for shard in shards:
        yield from check_shard(index.folder, shard, samples, advance)
    if samples_file and samples is not None:
        yield from check_counts(samples, samples_file, index.manifest)
    names = {shard["name"] for shard in shards}
    for name in sorted({path.name for path in index.folder.glob("*.tar")} - names):
        yield f"{name} is not of this set: {MANIFEST_FILE} does not list it"
    if not of_index:
        yield from check_rows(index.table, index.manifest)


def find_latents_problem(folder: Path, shards: list[dict[str, Any]], sha256: str) -> str | None:
    """Why latents.arrow is not the manifest's, or no list of samples, if so."""
    if problem := find_hash_problem(folder / LATENTS_FILE, sha256):
        return problem
    try:
        table = read_table(folder / LATENTS_FILE)
    except (pa.ArrowException, OSError) as error:
        return f"{LATENTS_FILE} is no Arrow file: {shorten(str(error), 120)}"
    columns = pa.schema(LATENT_FIELDS)
    there = pa.schema([field for field in table.schema if field.name in columns.names])
    problem = find_columns_problem(there, columns, LATENTS_FILE)
    return problem or find_rows_problem(table, shards, LATENTS_FILE)


def check_shard(folder: Path, shard: dict[str, Any], samples: pa.Table | None, advance: Advance) -> Iterator[str]:
    """One shard's size and hash, and of one that is damaged its samples, where there is a list of them."""
    path, name = folder / shard["name"], f"shard {shard['name']}"
    if problem := find_file_problem(folder, shard):
        yield problem
    if not path.is_file():
        advance(shard["size"])
        return
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while data := file.read(READ_BYTES):
                digest.update(data)
                advance(len(data))
            if digest.hexdigest() == shard["sha256"]:
                return
            if samples is not None:
                rows = samples.filter(pc.equal(samples["shard"], shard["name"])).sort_by("offset").to_pylist()
                for key, what in find_damaged_samples(file, rows, shard["size"]):
                    yield f"{name}, key {key}: {what}"
            yield f"{name} is not as it was written (its SHA-256 differs)"
    except OSError as error:
        yield f"{name} cannot be read: {error.strerror or error}"


def find_damaged_samples(file: BinaryIO, rows: list[Row], end: int) -> Iterator[tuple[str, str]]:
    """The keys of a shard's samples that are not as they were written, and what is wrong with each.

    Args:
        rows: all samples of the shard, by their offsets.
        end: the size that the shard should have.
    """
    starts = [row["offset"] - len(member_header(f"{row['key']}.npy", row["length"])) for row in rows]
    for row, start, stop in zip(rows, starts, [*starts[1:], end], strict=True):
        key, at, name = row["key"], row["offset"] - start, f"{row['key']}.npy"
        file.seek(start)
        stretch = file.read(stop - start)
        payload, rest = stretch[at : at + row["length"]], stretch[at + row["length"] :]
        if len(payload) < row["length"]:
            yield key, f"{name} lies beyond the end of the file"
            continue
        if stretch[:at] != member_header(name, row["length"]):
            yield key, f"the header of {name} is damaged"
        if zlib.crc32(payload) != row["crc32"]:
            yield key, f"the bytes of {name} are damaged (CRC-32 differs)"
        if not holds_json(rest, row):
            yield key, f"{key}.json, its header or the padding around it is damaged"


def holds_json(rest: bytes, row: Row) -> bool:
    """Whether a sample's ``.json`` follows its latents as it was written, as far as it concerns them: the post's own
    fields may be others since, without being encoded again."""
    name, padding = f"{row['key']}.json", bytes(-row["length"] % tarfile.BLOCKSIZE)
    text = rest[len(padding) + len(member_header(name, 0)) :].rstrip(b"\0")
    if rest.rstrip(b"\0") != padding + member_header(name, len(text)) + text:
        return False
    written = parse_json(text)
    return isinstance(written, dict) and all(written.get(field.name) == row[field.name] for field in LATENT_FIELDS)


def check_counts(samples: pa.Table, file: str, manifest: dict[str, Any]) -> Iterator[str]:
    """The number of samples of each shard, in the list of samples and in the manifest."""
    listed = {shard["name"]: shard["samples"] for shard in manifest["shards"]}
    found = {each["values"]: each["counts"] for each in pc.value_counts(samples["shard"]).to_pylist()}
    for name, count in listed.items():
        if found.get(name, 0) != count:
            yield f"shard {name} has {found.get(name, 0)} samples in {file}, {MANIFEST_FILE} says {count}"


def check_rows(table: pa.Table, manifest: dict[str, Any]) -> Iterator[str]:
    """What the manifest says of all rows of the index together."""
    counted = manifest.get("counts", {}).get("samples", len(table))
    if counted != len(table):
        yield f"{INDEX_FILE} has {len(table)} rows, {MANIFEST_FILE} counts {counted} samples"
    if fingerprint_rows(table, manifest["latents"]) != manifest["fingerprint"]:
        yield f"the fingerprint of {MANIFEST_FILE} is not that of these rows and settings"
