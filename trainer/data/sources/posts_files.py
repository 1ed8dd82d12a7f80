"""Posts files, of text or Parquet, whose images lie in a folder."""

import os
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.core.errors import UserError
from trainer.data.post import Post, encode_key, read_key
from trainer.data.sources.caption_fields import NO_FIELD, check_columns, read_captioned
from trainer.data.sources.find_image import find_image
from trainer.data.sources.image_folders import ImageFolder
from trainer.data.sources.record_files import is_parquet, iterate_records
from trainer.data.sources.records import BadRecord, Item, Reject, parse_record

BATCH_ROWS = 1024  # rows of a Parquet file that are decoded at a time


def iterate_posts_file(file: Path, images: ImageFolder, source: str, column: str | None = None) -> Iterator[Item]:
    """The posts of one file, in order.

    Args:
        column: the field of finished captions that the source names.

    Raises:
        UserError: when the file cannot be read at all, a part of it costs the rest, or it is not clear which column
            holds the captions.
    """
    if is_parquet(file):
        for number, row in enumerate(iterate_parquet(file, column), start=1):
            yield read_record(row, source, f"{file.name} row {number}", images, column)
        return
    records = iterate_records(file)
    posts = (read_record(record, source, f"{file.name} {where}", images, column) for where, record in records)
    yield from refuse_unused_column(posts, column, file.name)


def refuse_unused_column(items: Iterator[Item], column: str | None, file: str) -> Iterator[Item]:
    """The items of a file without columns, of which some must have the field that the config names.

    Raises:
        UserError: after the last one, where none has.
    """
    posts, without = 0, 0
    for item in items:
        if isinstance(item, Post):
            posts += 1
            without += any(note.kind == NO_FIELD for note in item.notes)
        yield item
    if posts and posts == without:
        raise UserError(f"caption_column {column} has no effect: no record of {file} has a field of that name")


def iterate_parquet(file: Path, column: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file as the values of its columns, but for columns of bytes.

    Raises:
        UserError: when it cannot be read. One damaged page costs its whole row group, which may be the whole file:
            that is no matter of one record.
    """
    try:
        with pq.ParquetFile(file) as table:
            columns = [each.name for each in table.schema_arrow if not pa.types.is_large_binary(each.type)]
            check_columns(table.schema_arrow, column, str(file))
            columns = [name for name in columns if not pa.types.is_binary(table.schema_arrow.field(name).type)]
            for batch in table.iter_batches(BATCH_ROWS, columns=columns):
                yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read as Parquet: {error}") from error


def read_record(
    line: bytes | dict[str, Any] | BadRecord, source: str, origin: str, images: ImageFolder, column: str | None
) -> Post | Reject:
    """One line or row of a posts file."""
    key = None
    try:
        if isinstance(line, BadRecord):
            raise line
        record = parse_record(line) if isinstance(line, bytes) else plain_values(line)
        key = read_key(record)
        name = find_image(record, images)
        image = images.place(name)
        # a file name is as good a key as an id, and the only one where several files are of one post
        own_key = key or encode_key(os.fsencode(name))
        return read_captioned(record, column, source=source, image=image, origin=origin, key=own_key)
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
