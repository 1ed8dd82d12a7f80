"""Arrow tables on disk, written whole or not at all, and DuckDB, which joins, sorts and counts them out of core.

Queries read files batch by batch, not mapped: pages of a mapped file that were touched count as the process's memory.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from trainer.core.errors import UserError, shorten
from trainer.core.files import write_file

if TYPE_CHECKING:  # importing it takes half a second, which only those who ask wait for
    import duckdb

MEMORY = 300_000_000  # bytes that DuckDB uses; what it holds beyond that lies in its temporary folder
READ_ROWS = 8192  # of a query's result at once


@dataclass(frozen=True)
class ArrowStream:
    """Record batches that DuckDB reads as a table, from the beginning in each query."""

    schema: pa.Schema
    batches: Callable[[], Iterator[pa.RecordBatch]]

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return pa.RecordBatchReader.from_batches(self.schema, self.batches()).__arrow_c_stream__(requested_schema)


@contextmanager
def connect(
    temporary: Path, memory: int = MEMORY, **tables: pa.Table | ArrowStream
) -> Iterator["duckdb.DuckDBPyConnection"]:
    """DuckDB over some tables, by their names.

    It reads no other file and loads no extension. Text is compared by its UTF-8 bytes, as Arrow does. Rows come in no
    order unless a query says ORDER BY. Values go into queries as parameters, never into their text.

    Args:
        temporary: the folder for what does not fit into its memory.
        memory: bytes; the default, or more for wide rows: of a sort whole runs, of 122,880 rows, lie in memory.

    Raises:
        UserError: where neither memory nor the disk has room for a query.
    """
    import duckdb

    options = {
        "memory_limit": f"{memory}B",
        "threads": 1,  # each has memory of its own, and sums of floats depend on their number
        "temp_directory": str(temporary),
        "preserve_insertion_order": False,
        "python_enable_replacements": False,  # else SQL could name any variable in reach
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    with duckdb.connect(config=options) as connection:
        connection.execute("SET enable_external_access = false")  # after the temporary folder, which it would refuse
        for name, table in tables.items():
            connection.register(name, table)
        try:
            yield connection
        except (duckdb.OutOfMemoryException, duckdb.IOException, OSError) as error:
            # what goes wrong while rows are read comes through Arrow, as an OSError in DuckDB's words
            if isinstance(error, OSError) and not str(error).startswith(("Out of Memory Error", "IO Error")):
                raise
            raise UserError(
                f"no room for a query in {temporary}: {shorten(str(error))}; make room and start again"
            ) from error


def read_rows(connection: "duckdb.DuckDBPyConnection", query: str, **values: Any) -> Iterator[dict[str, Any]]:
    """The rows of a query; ``values`` are its parameters ``$name``."""
    for batch in connection.sql(query, params=values).to_arrow_reader(READ_ROWS):
        yield from batch.to_pylist()


def read_table(path: Path) -> pa.Table:
    """An Arrow file, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def stream_table(path: Path) -> ArrowStream:
    """An Arrow file for a query."""
    with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
        return ArrowStream(reader.schema, lambda: read_batches(path))


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The record batches of an Arrow file, one at a time."""
    with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
        yield from map(reader.get_batch, range(reader.num_record_batches))


def cut_batches(batches: Iterable[pa.RecordBatch], schema: pa.Schema, rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of ``rows``, the last one shorter, so that the bytes of a file are those of its rows.

    A query's batches have any length, and anything in the place of a null.
    """
    waiting = schema.empty_table()
    for batch in batches:
        rest = batch
        while len(rest):
            part = rest.slice(0, rows - len(waiting))
            rest = rest.slice(len(part))
            # a copy with zero in the place of each null, as the library's take has it
            copied = pa.Table.from_batches([part.take(pa.array(np.arange(len(part))))])
            waiting = pa.concat_tables([waiting, copied.select(schema.names).cast(schema)])
            if len(waiting) == rows:
                full, waiting = waiting.combine_chunks(), schema.empty_table()
                yield full.to_batches()[0]
    if len(waiting):
        yield waiting.combine_chunks().to_batches()[0]


def write_batches(
    path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], facts: dict[str, Any] | None = None
) -> None:
    """An Arrow file; ``facts`` go into its schema's metadata."""
    if facts is not None:
        schema = schema.with_metadata({"told": json.dumps(facts, ensure_ascii=False)})

    def write(temporary: Path) -> None:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)

    write_file(path, write)


def read_facts(path: Path) -> dict[str, Any]:
    """The ``facts`` of ``write_batches``."""
    return json.loads(stream_table(path).schema.metadata[b"told"])
