"""Arrow tables on disk: written whole or not at all, memory-mapped, and taken from without joining their strings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.core.files import write_file


def read_table(path: Path) -> pa.Table:
    """An Arrow file, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


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
