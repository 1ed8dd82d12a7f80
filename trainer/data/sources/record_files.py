"""Records of files: one JSON object a line, an array of them, or a table (CSV, TSV, Parquet); compressed or not.

What a file is, its content says. What is none of these is named once, and not line by line.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.core.errors import UserError
from trainer.data.fields import parse_json
from trainer.data.sources.records import MAX_SIDECAR, BadRecord, check_columns, not_an_object
from trainer.data.sources.tar_headers import MAGIC

# a line's bytes, a decoded record, or why there is none
Record = tuple[str, bytes | dict[str, Any] | BadRecord]  # after where it stands in its file, such as "line 3"
DECOMPRESSORS: dict[bytes, Callable[[Path], Any]] = {  # by a file's first bytes
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda path: io.BufferedReader(pa.input_stream(str(path), compression="zstd")),
}
COMPRESSED_ENDS = (".gz", ".bz2", ".xz", ".zst")
FOREIGN = {  # what people have instead, by its first bytes
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"SQLite format 3\0": "an SQLite database",
    b"ARROW1": "an Arrow file",
    b"Obj\x01": "an Avro file",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself (git lfs pull)",
    b"<": "a page of HTML or XML, such as a failed download leaves",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
READ = "posts files are .jsonl, .json (an array of posts), .csv, .tsv (also as .gz, .bz2, .xz or .zst) and .parquet"
START = 4096  # bytes of which a file's kind is seen
ROWS_AT_A_TIME = 1024  # of an Arrow or Parquet file that become Python values
READ_CHARACTERS = 2**20  # characters of an array that are read at a time
MAX_DOCUMENT = 2**26  # bytes up to which a file is looked at as a whole
BETWEEN = re.compile(r"[\s,]*")


class Damaged(Exception):
    """Why the rest of a file is lost."""


def iterate_records(file: Path, column: str | None = None, others: Sequence[str] = ()) -> Iterator[Record]:
    """The records of a file in order.

    Args:
        column: the field of finished captions that the source names; a table with columns must have it.
        others: further ones.

    Raises:
        UserError: when it cannot be read, is of another kind, or is damaged, so that the rest of it is lost.
    """
    start = read_start(file)  # first: it refuses pipes
    if file.suffix.lower() == ".parquet" or start.startswith(b"PAR1"):
        yield from iterate_parquet(file, column, others)
        return
    where = "its beginning"
    try:
        with open_content(file) as probe:
            start = probe.read(START)
        with open_content(file) as content:
            for where, record in choose_reader(file, content, start):
                yield where, record
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError, csv.Error, Damaged) as error:
        raise UserError(f"{file} is damaged after {where}: {error}") from error


def iterate_parquet(file: Path, column: str | None, others: Sequence[str] = ()) -> Iterator[Record]:
    """The rows of a Parquet file as the values of its columns, but for columns of bytes.

    Raises:
        UserError: when it cannot be read. One damaged page costs its whole row group, which may be the whole file:
            that is no matter of one record.
    """
    try:
        with pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            check_columns(schema, column, str(file), others)
            is_bytes = (pa.types.is_binary, pa.types.is_large_binary)
            columns = [each.name for each in schema if not any(check(each.type) for check in is_bytes)]
            batches = table.iter_batches(ROWS_AT_A_TIME, columns=columns)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read as Parquet: {error}") from error


def open_content(file: Path) -> BinaryIO:
    """A file opened for reading, without its compression.

    Raises:
        UserError: when it cannot be opened.
    """
    start = read_start(file)
    openers = [opener for magic, opener in DECOMPRESSORS.items() if start.startswith(magic)]
    return openers[0](file) if openers else file.open("rb")


def read_start(file: Path) -> bytes:
    """A file's first bytes."""
    try:
        if file.exists() and not file.is_file():  # a pipe would wait for ever
            raise UserError(f"{file} cannot be read: it is not a regular file")
        with file.open("rb") as opened:
            return opened.read(START)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error


def choose_reader(file: Path, content: BinaryIO, start: bytes) -> Iterator[Record]:
    """The records of a file's content, which begins with ``start``.

    Raises:
        UserError: when it is of another kind, naming it.
    """
    kind = next((kind for magic, kind in FOREIGN.items() if start.startswith(magic)), None)
    kind = "a tar archive" if start[MAGIC] == b"ustar" else kind
    if kind is not None:
        raise UserError(f"{file} is {kind}: {READ}")
    name = strip_compression(file.name)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if name.endswith((".csv", ".tsv")):
        return iterate_table_rows(content, "\t" if name.endswith(".tsv") else ",")
    if text.startswith(b"[") and (name.endswith(".json") or text[1:].lstrip()[:1] in (b"{", b"]")):
        return iterate_array(content)
    refuse_document(file, start)
    return iterate_lines(content)


def strip_compression(name: str) -> str:
    """A file's name in lower case, without the endings that compressions add."""
    name = name.lower()
    while name.endswith(COMPRESSED_ENDS):
        name = name[: name.rfind(".")]
    return name


def iterate_lines(file: BinaryIO) -> Iterator[Record]:
    """A file's lines that are not blank; of one that is too long only so much that it is seen to be."""
    number = 0
    while line := file.readline(MAX_SIDECAR + 1):
        number += 1
        rest = line
        while len(rest) > MAX_SIDECAR and not rest.endswith(b"\n"):
            rest = file.readline(MAX_SIDECAR + 1)
        if len(line) > MAX_SIDECAR:
            yield f"line {number}", BadRecord("bad_record", f"longer than {MAX_SIDECAR} bytes")
        elif line.strip():
            yield f"line {number}", line


def refuse_document(file: Path, start: bytes) -> None:
    """Refuse one JSON value over several lines, of which each line would be set aside for itself.

    Raises:
        UserError: with the names in it.
    """
    first, end, _ = start.partition(b"\n")
    if end and first.startswith(b"{") and parse_json(first) is None:
        with open_content(file) as content:
            whole = parse_json(content.read(MAX_DOCUMENT))
        if whole is not None:
            names = ", ".join(list(whole)[:10])
            raise UserError(f"{file} is one JSON object (of {names}), not one post a line or an array of posts: {READ}")


def iterate_table_rows(file: BinaryIO, delimiter: str) -> Iterator[Record]:
    """The rows of a table by the names in its first line; an empty cell is a field that the row does not have.

    Raises:
        Damaged: when the first line is no line of names.
    """
    csv.field_size_limit(MAX_SIDECAR)
    lines = BoundedLines(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
    rows = csv.reader(lines, delimiter=delimiter)
    names = [name.strip() for name in next(rows, [])]
    if not all(names) or len(set(names)) != len(names):
        raise Damaged(f"the first line of a table names its columns, each once, not {', '.join(names)!r}")
    lines.of_row = 0
    for number, row in enumerate(rows, start=1):
        lines.of_row = 0
        if row:
            yield f"row {number}", name_cells(names, row)


class BoundedLines:
    """The lines of a table, of which no row is so long that a small compressed file fills the memory."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text = text
        self.of_row = 0  # characters so far, set to 0 by whoever reads rows: quoted cells hold line ends

    def __iter__(self) -> Iterator[str]:
        """Raises Damaged at a row that is too long."""
        while line := self.text.readline(MAX_SIDECAR + 1):
            self.of_row += len(line)
            if self.of_row > MAX_SIDECAR:
                raise Damaged(f"a row is longer than {MAX_SIDECAR} characters")
            yield line


def name_cells(names: list[str], row: list[str]) -> dict[str, Any] | BadRecord:
    """One row of a table."""
    if len(row) != len(names):
        return BadRecord("bad_record", f"{len(row)} cells, but the table has {len(names)} columns")
    for name, value in zip(names, row, strict=True):
        if value.startswith(("['", '["')):
            return BadRecord("bad_record", f"{name} holds a list as text: keep lists in .jsonl or .parquet")
    return {name: value for name, value in zip(names, row, strict=True) if value}


def iterate_array(file: BinaryIO) -> Iterator[Record]:
    """The items of one JSON array, read piece by piece.

    Raises:
        Damaged: where it makes no sense any more.
    """
    decoder = json.JSONDecoder()
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    buffer, number, ended = text.read(READ_CHARACTERS).lstrip(), 0, False
    at = 1  # after the bracket
    while True:
        at = BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]
        if buffer[at : at + 1] == "]":
            if (buffer[at + 1 :] + text.read(READ_CHARACTERS)).strip():
                raise Damaged("something follows the end of the array")
            return
        try:
            item, end = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            if ended or len(buffer) - at > MAX_SIDECAR:
                raise Damaged("the array ends too early" if ended else str(error)) from error
            end = len(buffer)
        if end == len(buffer) and not ended:  # there may be more of this item
            more = text.read(READ_CHARACTERS)
            buffer, at, ended = buffer[at:] + more, 0, not more
            continue
        at, number = end, number + 1
        yield f"post {number}", item if isinstance(item, dict) else not_an_object(item)
