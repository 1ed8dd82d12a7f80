"""Arrow tables on disk, written whole or not at all, and DuckDB, which joins, sorts and counts them out of core.

Queries read files batch by batch, not mapped: pages of a mapped file that were touched count as the process's memory.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from trainer.core.files import write_file

MEMORY = "400MB"  # of DuckDB; what it holds beyond that lies in its temporary folder
THREADS = 2
READ_ROWS = 8192  # of a query's result at once


@dataclass(frozen=True)
class ArrowStream:
    """Record batches that DuckDB reads as a table, from the beginning in each query."""

    schema: pa.Schema
    batches: Callable[[], Iterator[pa.RecordBatch]]

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return pa.RecordBatchReader.from_batches(self.schema, self.batches()).__arrow_c_stream__(requested_schema)


@contextmanager
def connect(temporary: Path, **tables: pa.Table | ArrowStream) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB over some tables, by their names; ``temporary`` is the folder for what does not fit into its memory.

    It reads no other file and loads no extension. Text is compared by its UTF-8 bytes, as Arrow does. Rows come in no
    order unless a query says ORDER BY. Values go into queries as parameters, never into their text.
    """
    options = {
        "memory_limit": MEMORY,
        "threads": THREADS,
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
        yield connection


def read_rows(connection: duckdb.DuckDBPyConnection, query: str, **values: Any) -> Iterator[dict[str, Any]]:
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
    waiting, count = [], 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch)
        while count >= rows:
            table = pa.Table.from_batches(waiting)
            yield from tidy_batch(table.slice(0, rows), schema)
            waiting, count = table.slice(rows).to_batches(), count - rows
    if count:
        yield from tidy_batch(pa.Table.from_batches(waiting), schema)


def tidy_batch(table: pa.Table, schema: pa.Schema) -> list[pa.RecordBatch]:
    """A table as one batch, with zero in the place of each null, as the library's take has it."""
    taken = table.combine_chunks().take(pa.array(np.arange(len(table))))
    return taken.select(schema.names).cast(schema).combine_chunks().to_batches()


def write_batches(
    path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], facts: dict[str, Any] | None = None
) -> None:
    """An Arrow file; ``facts`` go into its schema's metadata."""
    metadata = {"told": json.dumps(facts, ensure_ascii=False)} if facts is not None else None

    def write(temporary: Path) -> None:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema.with_metadata(metadata)) as writer:
            for batch in batches:
                writer.write_batch(batch)

    write_file(path, write)


def read_facts(path: Path) -> dict[str, Any]:
    """The ``facts`` of ``write_batches``."""
    return json.loads(stream_table(path).schema.metadata[b"told"])


def write_table(path: Path, table: pa.Table, told: dict[str, Any] | None = None) -> None:
    """An Arrow file; ``told`` goes into its schema's metadata."""
    schema = table.schema.with_metadata({"told": json.dumps(told, ensure_ascii=False)} if told is not None else None)

    def write(temporary: Path) -> None:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_table(table.cast(schema))

    write_file(path, write)


def read_told(table: pa.Table) -> dict[str, Any]:
    """The ``told`` of ``write_table``."""
    return json.loads(table.schema.metadata[b"told"])


def take_rows(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Some rows in this order, as one chunk.

    Batch by batch: the library's own take joins a whole column of strings first, which costs its size each time and
    fails above 2 GiB.
    """
    order = np.argsort(rows, kind="stable")
    ascending, parts, start = rows[order], [table.slice(0, 0)], 0
    for batch in table.to_batches():
        low, high = np.searchsorted(ascending, [start, start + len(batch)])
        if low < high:
            parts.append(pa.Table.from_batches([batch.take(pa.array(ascending[low:high] - start))]))
        start += len(batch)
    taken = pa.concat_tables(parts).combine_chunks()
    back = np.empty(len(order), dtype=np.int64)
    back[order] = np.arange(len(order))
    return taken.take(pa.array(back)).combine_chunks()
