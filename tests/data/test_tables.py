"""Arrow tables through DuckDB: order by bytes, no other files, and files whose bytes are a function of their rows."""

from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from trainer.core.errors import UserError
from trainer.data.tables import (
    connect,
    cut_batches,
    read_batches,
    read_facts,
    read_rows,
    read_table,
    stream_table,
    write_batches,
)

SCHEMA = pa.schema([pa.field("key", pa.string(), nullable=False), pa.field("score", pa.int32())])
KEYS = ["b", "a", "é", "z", "Z", "a%2E", "\U0001f600", "\uffff", "aa", "A"]


def test_text_is_ordered_by_its_bytes_as_arrow_orders_it(tmp_path: Path) -> None:
    table = pa.table({"key": KEYS})
    with connect(tmp_path, posts=table) as connection:
        found = [row["key"] for row in read_rows(connection, "SELECT key FROM posts ORDER BY key")]
    assert found == sorted(KEYS, key=str.encode) == table.sort_by("key")["key"].to_pylist()


def test_values_are_parameters_and_files_are_out_of_reach(tmp_path: Path) -> None:
    with connect(
        tmp_path / "made_when_needed", posts=pa.table({"key": ["'; DROP TABLE posts; --", "b"]})
    ) as connection:
        query = "SELECT count(*) AS n FROM posts WHERE key = $key"
        assert list(read_rows(connection, query, key="'; DROP TABLE posts; --")) == [{"n": 1}]
        (tmp_path / "a.csv").write_text("1\n")
        for refused in (f"SELECT * FROM read_csv('{tmp_path}/a.csv')", "INSTALL httpfs", "SET memory_limit = '9GB'"):
            if refused.startswith("SET"):
                connection.execute("SET lock_configuration = true")
            with pytest.raises(duckdb.Error):
                connection.execute(refused)
        with pytest.raises(duckdb.Error, match="KEYS"):  # no table: SQL does not see Python's variables
            connection.execute("SELECT * FROM KEYS")


def test_a_file_is_read_by_each_query_from_its_beginning(tmp_path: Path) -> None:
    batches = [pa.RecordBatch.from_pylist([{"key": str(n), "score": n}], schema=SCHEMA) for n in range(5)]
    write_batches(tmp_path / "t.arrow", SCHEMA, batches, {"a": "ä"})
    assert read_facts(tmp_path / "t.arrow") == {"a": "ä"}
    assert read_table(tmp_path / "t.arrow").to_pylist() == [{"key": str(n), "score": n} for n in range(5)]
    assert [batch["key"].to_pylist() for batch in read_batches(tmp_path / "t.arrow")] == [[str(n)] for n in range(5)]
    with connect(tmp_path, posts=stream_table(tmp_path / "t.arrow")) as connection:
        query = "SELECT a.key, b.score FROM posts a JOIN posts b ON a.score = b.score + 1 ORDER BY a.key"
        for _ in range(2):
            assert [(r["key"], r["score"]) for r in read_rows(connection, query)] == [
                ("1", 0),
                ("2", 1),
                ("3", 2),
                ("4", 3),
            ]


def test_a_query_without_room_is_a_users_problem(tmp_path: Path) -> None:
    table = pa.table({"key": [str(number) * 20 for number in range(100_000)]})
    (tmp_path / "file").write_text("where the folder should be")
    with (
        pytest.raises(UserError, match=r"no room for a query in .*/file: "),
        connect(tmp_path / "file", 1_000_000, posts=table) as connection,
    ):
        list(read_rows(connection, "SELECT key FROM posts ORDER BY key DESC"))


def test_what_is_written_depends_on_the_rows_alone(tmp_path: Path) -> None:
    """However a query cuts its batches, and whatever lies where nothing is."""
    rows = [{"key": str(n), "score": None if n % 3 else n} for n in range(10)]
    valid = pa.array([n % 3 == 0 for n in range(10)])
    written = set()
    for rubbish, cuts in ((0, [0, 10]), (77, [0, 1, 1, 4, 9, 10])):
        scores = pa.array(np.where(np.arange(10) % 3, rubbish, np.arange(10)).astype(np.int32))
        dirty = pa.Array.from_buffers(pa.int32(), 10, [pa.array(valid).buffers()[1], scores.buffers()[1]])
        table = pa.table({"score": dirty, "key": [str(n) for n in range(10)]})
        parts = [table.slice(low, high - low).to_batches() for low, high in pairwise(cuts)]
        cut = list(cut_batches([batch for part in parts for batch in part], SCHEMA, 4))
        assert [len(batch) for batch in cut] == [4, 4, 2] and pa.Table.from_batches(cut).to_pylist() == rows
        write_batches(tmp_path / "t.arrow", SCHEMA, cut)
        written.add((tmp_path / "t.arrow").read_bytes())
    assert len(written) == 1
    assert list(cut_batches([], SCHEMA, 4)) == []


@pytest.mark.parametrize("rows", [1, 7, 64, 100])
def test_nulls_of_every_type_are_written_the_same_however_they_are_cut(tmp_path: Path, rows: int) -> None:
    """Bits of validity and of truth do not end with a byte where a batch ends."""
    count = 100
    values = {
        "key": [f"{n}é" for n in range(count)],
        "truth": [None if n % 3 else n % 2 == 0 for n in range(count)],
        "number": [None if n % 5 == 1 else n / 7 for n in range(count)],
        "known": [None if n % 4 else {"crc32": n, "shard": None if n % 8 else str(n)} for n in range(count)],
    }
    table = pa.table(values)
    written = set()
    for step in (1, 3, 8, 50, count):
        parts = [batch for low in range(0, count, step) for batch in table.slice(low, step).to_batches()]
        write_batches(tmp_path / "t.arrow", table.schema, cut_batches(parts, table.schema, rows))
        assert read_table(tmp_path / "t.arrow").to_pylist() == table.to_pylist()
        written.add((tmp_path / "t.arrow").read_bytes())
    assert len(written) == 1


def test_an_error_while_rows_are_read_is_told_from_one_of_the_caller(tmp_path: Path) -> None:
    """Arrow hands on what goes wrong in the middle of a result as an OSError in DuckDB's words."""
    with pytest.raises(UserError, match=r"no room for a query in .*make room"), connect(tmp_path / "queries"):
        raise OSError("Out of Memory Error: failed to offload data block")
    with pytest.raises(OSError, match="another file"), connect(tmp_path / "queries"):
        raise OSError("another file cannot be read")
