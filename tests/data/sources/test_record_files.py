"""Posts files of every spelling: lines, arrays and tables, compressed or not; what is none of them is named once."""

import bz2
import gzip
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from trainer.core.errors import UserError
from trainer.data.sources import record_files
from trainer.data.sources.record_files import iterate_records
from trainer.data.sources.records import BadRecord

POSTS: list[dict[str, Any]] = [{"id": 1, "rating": "g", "tags": ["a", "b"]}, {"id": 2, "caption": "[ü], ]"}, {"id": 3}]
LINES = "".join(json.dumps(post) + "\n" for post in POSTS).encode()
ARRAY = json.dumps(POSTS, ensure_ascii=False).encode()


def read(file: Path, content: bytes) -> list[Any]:
    """The records, lines decoded, reasons for those that are none."""
    file.write_bytes(content)
    items = [record for _, record in iterate_records(file)]
    return [
        json.loads(item) if isinstance(item, bytes) else item.args[0] if isinstance(item, BadRecord) else item
        for item in items
    ]


def compress_zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("end", "compress"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", compress_zstd)],
)
def test_lines_arrays_and_tables_compressed_or_not(tmp_path: Path, end: str, compress: Any) -> None:
    assert read(tmp_path / f"a.jsonl{end}", compress(LINES)) == POSTS
    assert read(tmp_path / f"a.json{end}", compress(b"\xef\xbb\xbf \n" + ARRAY + b"\n")) == POSTS
    assert read(tmp_path / f"a.jsonl{end}", compress(json.dumps(POSTS, indent=2).encode())) == POSTS
    rows = b'\xef\xbb\xbfid,rating,caption\r\n1,g,"a, ""b"""\r\n\r\n2,,\r\n'
    told = [{"id": "1", "rating": "g", "caption": 'a, "b"'}, {"id": "2"}]
    assert read(tmp_path / f"a.csv{end}", compress(rows)) == told
    assert read(tmp_path / f"a.tsv{end}", compress(b"id\tcaption\n1\ta, b\n")) == [{"id": "1", "caption": "a, b"}]


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_an_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(record_files, "READ_CHARACTERS", size)
    assert read(tmp_path / "a.json", b"[" + b" " * 9 + b"12, 3," + ARRAY[1:]) == ["bad_record", "bad_record", *POSTS]
    assert read(tmp_path / "a.json", b"[]") == []


@pytest.mark.parametrize("size", [4, 2**20])
@pytest.mark.parametrize("content", [ARRAY[:-1], ARRAY[:-4], ARRAY + b"{}", b'[{"id": 1}, nonsense, {"id": 2}]'])
def test_a_damaged_array_stops_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, size: int
) -> None:
    monkeypatch.setattr(record_files, "READ_CHARACTERS", size)
    with pytest.raises(UserError, match=r"a\.json is damaged after post \d"):
        read(tmp_path / "a.json", content)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, compress_zstd])
def test_a_file_that_was_cut_short_stops_with_its_place(tmp_path: Path, compress: Any) -> None:
    whole = compress(b"".join(b'{"id": %d}\n' % number for number in range(300_000)))
    with pytest.raises(UserError, match=r"a\.jsonl is damaged after line"):
        read(tmp_path / "a.jsonl", whole[: len(whole) // 2])


def test_rows_that_do_not_fit_their_table(tmp_path: Path) -> None:
    rows = b"id,tags\n1,a,b\n2,\"['a', 'b']\"\n3,a b\n"
    assert read(tmp_path / "a.csv", rows) == ["bad_record", "bad_record", {"id": "3", "tags": "a b"}]
    for head in (b"id,id\n1,2\n", b"id,\n1,2\n"):
        with pytest.raises(UserError, match="names its columns, each once"):
            read(tmp_path / "a.csv", head)


FOREIGN = {
    "page.jsonl": (b"<!DOCTYPE html>", "a page of HTML"),
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "base.json": (b"SQLite format 3\0...", "an SQLite database"),
    "wide.jsonl": ("{}\n".encode("utf-16"), "text in UTF-16"),
    "api.json": (json.dumps({"posts": POSTS}, indent=1).encode(), "one JSON object (of posts)"),
    "packed.csv": (gzip.compress(b"PK\x03\x04"), "a zip archive"),
}


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_a_file_of_another_kind_is_named_once(tmp_path: Path, name: str) -> None:
    content, said = FOREIGN[name]
    with pytest.raises(UserError) as caught:
        read(tmp_path / name, content)
    assert said in str(caught.value) and "posts files are .jsonl" in str(caught.value)


def test_archives_folders_and_parquet_under_another_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.jsonl", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(UserError, match="a zip archive"):
        list(iterate_records(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="is not a regular file"):
        list(iterate_records(tmp_path))
    for name, content in (("b", b"PAR1..."), ("c.PARQUET", b"{}\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as Parquet"):
            list(iterate_records(tmp_path / name))


def test_lines_that_are_no_json_stay_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 1,\n{"id": 2}\n\n[1]\n')
    assert [where for where, _ in iterate_records(tmp_path / "a.jsonl")] == ["line 1", "line 2", "line 4"]
