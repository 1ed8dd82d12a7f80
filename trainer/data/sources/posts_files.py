"""Posts files, JSONL or Parquet, whose images lie in a folder."""

import os
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.core.errors import UserError
from trainer.data.post import Post, encode_key, read_key, read_post
from trainer.data.sources.folders import ImageFolder, find_image
from trainer.data.sources.records import MAX_SIDECAR, BadRecord, Reject, parse_record

BATCH_ROWS = 1024  # rows of a Parquet file that are decoded at a time


def iterate_posts_file(file: Path, images: ImageFolder, source: str) -> Iterator[Post | Reject]:
    """The posts of one file, in order.

    Raises:
        UserError: when the file cannot be read at all, or a part of a Parquet file cannot be decoded.
    """
    if file.suffix.lower() == ".parquet":
        for number, row in enumerate(iterate_parquet(file), start=1):
            yield read_record(row, source, f"{file.name} row {number}", images)
        return
    try:
        lines = file.open("rb")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    with lines:
        for number, line in enumerate(iterate_lines(lines), start=1):
            if len(line) > MAX_SIDECAR:
                yield Reject(None, f"{file.name} line {number}", "bad_record", f"longer than {MAX_SIDECAR} bytes")
            elif line.strip():
                yield read_record(line, source, f"{file.name} line {number}", images)


def iterate_lines(file: BinaryIO) -> Iterator[bytes]:
    """A file's lines; of one that is too long only so much that it is seen to be."""
    while line := file.readline(MAX_SIDECAR + 1):
        rest = line
        while len(rest) > MAX_SIDECAR and not rest.endswith(b"\n"):
            rest = file.readline(MAX_SIDECAR + 1)
        yield line


def iterate_parquet(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file as the values of its columns, but for columns of bytes.

    Raises:
        UserError: when it cannot be read. One damaged page costs its whole row group, which may be the whole file:
            that is no matter of one record.
    """
    try:
        with pq.ParquetFile(file) as table:
            columns = [each.name for each in table.schema_arrow if not pa.types.is_large_binary(each.type)]
            columns = [name for name in columns if not pa.types.is_binary(table.schema_arrow.field(name).type)]
            for batch in table.iter_batches(BATCH_ROWS, columns=columns):
                yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read as Parquet: {error}") from error


def read_record(line: bytes | dict[str, Any], source: str, origin: str, images: ImageFolder) -> Post | Reject:
    """One line or row of a posts file."""
    key = None
    try:
        record = parse_record(line) if isinstance(line, bytes) else plain_values(line)
        key = read_key(record)
        path = find_image(record, images)
        # a file name is as good a key as an id, and the only one where several files are of one post
        own_key = key or encode_key(os.fsencode(path.relative_to(images.path)))
        return read_post(record, source=source, image=path, origin=origin, key=own_key)
    except BadRecord as error:
        return Reject(key, origin, *error.args)
    except ValueError as error:
        return Reject(key, origin, "bad_record", str(error))


def plain_values(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table as JSON would hold it: dates as ISO text, decimals as numbers."""
    return {name: plain_value(value) for name, value in row.items()}


def plain_value(value: Any) -> Any:
    match value:
        case date():  # a datetime is one
            return value.isoformat()
        case dict():
            return plain_values(value)
        case Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
    return value
