"""Shards and index: the contract's columns, webdataset's view of the tars, and damage that must not go unnoticed."""

import contextlib
import io
import json
import os
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset

from support.posts_on_disk import rows_to_table
from trainer.core.errors import UserError
from trainer.data import index as index_module
from trainer.data import shards
from trainer.data.index import Index, npy_header, open_index, read_raw_latents
from trainer.data.shards import ShardWriter, write_index

# as the design's section "Index columns" has them; crc32 is unsigned, the content's hash a SHA-256 in hex
CONTRACT = [
    ("key", "string"), ("source", "string"), ("shard", "string"), ("offset", "int64"), ("length", "int64"),
    ("crc32", "uint32"), ("content_hash", "string"), ("bucket_width", "int32"), ("bucket_height", "int32"),
    ("original_width", "int32"), ("original_height", "int32"), ("crop_left", "int32"), ("crop_top", "int32"),
    ("caption", "string"), ("rating", "string"), ("score", "int32"), ("year", "int32"), ("tags_general", "string"),
    ("tags_character", "string"), ("tags_copyright", "string"), ("tags_artist", "string"), ("tags_meta", "string"),
    ("extra", "string"),
]  # fmt: skip
KEYS = ["30", "4", "sub%2Fa%2Epng", "100", "7" + "%E5" * 60, "5"]  # one is longer than a tar header's name


def raw_latents(number: int) -> np.ndarray:
    """(4, 16, 8) fp16, a function of the sample's number."""
    return np.random.default_rng(number).standard_normal((4, 16, 8)).astype(np.float16)


def write_set(folder: Path, per_shard: int, latents: dict | None = None) -> dict:
    """Six samples in as many shards as it takes; returns the manifest."""
    folder.mkdir()
    files, rows = [], []
    for number, start in enumerate(range(0, len(KEYS), per_shard)):
        writer = ShardWriter(folder, number)
        for sample in range(start, min(start + per_shard, len(KEYS))):
            row = {
                "key": KEYS[sample], "source": "posts.jsonl", "content_hash": "c" * 64, "bucket_width": 64,
                "bucket_height": 128, "original_width": 70, "original_height": 140, "crop_left": 0, "crop_top": 6,
                "score": sample - 3, "tags_general": "1girl ^_^", "extra": '{"id": 1}',
            }  # fmt: skip
            writer.add(row, raw_latents(sample))
        files.append(writer.finish())
        rows += writer.rows
    return write_index(folder, rows_to_table(rows), files, latents or {"vae_sha256": "v"}, counts={"samples": 6})


@pytest.fixture
def index(tmp_path: Path) -> Index:
    write_set(tmp_path / "set", 4)
    return open_index(tmp_path / "set")


def test_columns_are_the_contract(index: Index) -> None:
    assert [(field.name, str(field.type)) for field in index.table.schema] == CONTRACT
    nullable = [field.name for field in index.table.schema if field.nullable]
    assert nullable == [name for name, _ in CONTRACT[CONTRACT.index(("caption", "string")) :]]
    assert index.table["key"].to_pylist() == sorted(KEYS) and len(index) == 6
    # any Arrow reader finds the same
    with pa.OSFile(str(index.folder / "index.arrow")) as file:
        assert pa.ipc.open_file(file).read_all().equals(index.table)


def test_rows_and_latents(index: Index) -> None:
    assert index.bucket_sizes.tolist() == [[64, 128]] * 6 and index.bucket_sizes.dtype == np.int32
    for number, key in enumerate(sorted(KEYS)):
        sample = KEYS.index(key)
        row = index.row(number)
        assert (row["key"], row["score"], row["caption"], row["crop_top"]) == (key, sample - 3, None, 6)
        latents = read_raw_latents(index, number)
        assert latents.dtype == np.float16 and np.array_equal(latents, raw_latents(sample))
    with pytest.raises(IndexError):
        index.row(6)
    with pytest.raises(IndexError):
        index.row(-1)


def test_webdataset_sees_the_same(index: Index) -> None:
    tars = sorted(str(path) for path in index.folder.glob("*.tar"))
    assert len(tars) == 2
    samples = {}
    for url in tars:
        for sample in webdataset.WebDataset(url, shardshuffle=False).decode():
            samples[sample["__key__"]] = sample
    assert set(samples) == set(KEYS)
    for number in range(len(index)):
        sample = samples[index.row(number)["key"]]
        latents = sample["npy"]
        assert np.array_equal(latents, read_raw_latents(index, number))
        assert sample["json"] == index.row(number)


def test_offsets_are_those_of_the_payloads(index: Index) -> None:
    for number in range(len(index)):
        row = index.row(number)
        payload = (index.folder / row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["length"]]
        with tarfile.open(index.folder / row["shard"]) as tar:
            member = tar.extractfile(f"{row['key']}.npy")
            assert member is not None and member.read() == payload
        assert zlib.crc32(payload) == row["crc32"]


def test_tars_hold_nothing_but_the_samples(index: Index) -> None:
    with tarfile.open(index.folder / "shard-00000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [f"{key}.{end}" for key in KEYS[:4] for end in ("npy", "json")]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert not list(index.folder.glob(".tmp*"))


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = write_set(tmp_path / "a", 4), write_set(tmp_path / "b", 4)
    assert first == second
    for shard in first["shards"]:
        assert (tmp_path / "a" / shard["name"]).read_bytes() == (tmp_path / "b" / shard["name"]).read_bytes()


def test_fingerprint_is_of_the_samples_not_of_the_sharding(tmp_path: Path) -> None:
    one, other = write_set(tmp_path / "a", 6), write_set(tmp_path / "b", 1)
    assert one["fingerprint"] == other["fingerprint"] and one["index_sha256"] != other["index_sha256"]
    assert write_set(tmp_path / "c", 6, {"vae_sha256": "w"})["fingerprint"] != one["fingerprint"]
    table = open_index(tmp_path / "a").table
    for name, value in (("score", 9), ("tags_general", "x"), ("crc32", 1), ("content_hash", "d"), ("caption", "")):
        column = pa.array([value, *table[name].to_pylist()[1:]], shards.SCHEMA.field(name).type)
        changed = table.set_column(table.schema.get_field_index(name), name, column)
        assert shards.fingerprint_rows(changed, one["latents"]) != one["fingerprint"], name


def test_an_index_travels_to_workers(index: Index) -> None:
    read_raw_latents(index, 0)
    copy = pickle.loads(pickle.dumps(index))
    assert len(pickle.dumps(index)) < 5000 and copy.fingerprint == index.fingerprint
    assert np.array_equal(read_raw_latents(copy, 3), read_raw_latents(index, 3))
    child = os.fork()
    if child == 0:
        same = np.array_equal(read_raw_latents(index, 5), raw_latents(KEYS.index(sorted(KEYS)[5])))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_few_descriptors_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "set", 1)
    monkeypatch.setattr(index_module, "MAX_OPEN_SHARDS", 2)
    index = open_index(tmp_path / "set")

    def open_tars() -> int:
        count = 0
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor is gone by now
                count += link.readlink().is_relative_to(tmp_path) and link.readlink().suffix == ".tar"
        return count

    for number in (0, 1, 2, 3, 4, 5, 0):
        assert read_raw_latents(index, number).shape == (4, 16, 8)
    assert open_tars() == 2
    del index
    assert open_tars() == 0


@pytest.mark.parametrize("where", [0, 70, -1])
def test_a_flipped_byte_is_noticed(index: Index, where: int) -> None:
    row = index.row(2)
    path = index.folder / row["shard"]
    content = bytearray(path.read_bytes())
    content[row["offset"] + where % row["length"]] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_raw_latents(open_index(index.folder), 2)
    assert row["key"] in str(caught.value) and row["shard"] in str(caught.value) and "damaged" in str(caught.value)
    read_raw_latents(open_index(index.folder), 3)


def test_a_wrong_shape_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    writer = ShardWriter(folder, 0)
    row = dict.fromkeys(name for name, _ in CONTRACT) | {
        "key": "1", "source": "s", "content_hash": "c", "bucket_width": 128, "bucket_height": 64,
        "original_width": 1, "original_height": 1, "crop_left": 0, "crop_top": 0}  # fmt: skip
    writer.add(row, raw_latents(0))
    shard = writer.finish()
    write_index(folder, rows_to_table(writer.rows), [shard], {})
    with pytest.raises(UserError, match=r"key 1: holds float16 \(4, 16, 8\), the index says float16 \(4, 8, 16\)"):
        read_raw_latents(open_index(folder), 0)


@pytest.mark.parametrize("layout", ["version 2", "Fortran"])
def test_an_array_of_another_layout_is_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Another NumPy may write other headers than this one's: the numbers are what counts."""

    def write(buffer: io.BytesIO, array: np.ndarray, allow_pickle: bool) -> None:
        array, version = (np.asfortranarray(array), (1, 0)) if layout == "Fortran" else (array, (2, 0))
        write_array(buffer, array, version=version, allow_pickle=allow_pickle)

    write_array = np.lib.format.write_array
    monkeypatch.setattr(np.lib.format, "write_array", write)
    write_set(tmp_path / "set", 2)
    index = open_index(tmp_path / "set")
    for number in range(6):
        row = index.row(number)
        with (index.folder / row["shard"]).open("rb") as file:
            file.seek(row["offset"])
            assert not file.read(128).startswith(npy_header((4, 16, 8)))
        assert np.array_equal(read_raw_latents(index, number), raw_latents(KEYS.index(row["key"])))


def test_what_does_not_belong_together_is_refused(index: Index, tmp_path: Path) -> None:
    folder = index.folder

    def refuses(said: str) -> None:
        with pytest.raises(UserError, match=said) as caught:
            open_index(folder)
        assert str(folder) in str(caught.value)

    manifest, arrow, tar = folder / "manifest.json", folder / "index.arrow", folder / "shard-00001.tar"
    good, table, content = manifest.read_text(), arrow.read_bytes(), tar.read_bytes()
    tar.write_bytes(content[:-512])
    refuses("shard-00001.tar has .* bytes")
    tar.unlink()
    refuses("shard-00001.tar is missing")
    tar.write_bytes(content)
    write_set(tmp_path / "other", 2)
    arrow.write_bytes((tmp_path / "other" / "index.arrow").read_bytes())
    refuses("SHA-256 differs")
    arrow.unlink()
    refuses("index.arrow is missing")
    arrow.write_bytes(table)
    manifest.write_text(json.dumps(json.loads(good) | {"format_version": 2}))
    refuses("format_version 2")
    manifest.write_text("{")
    refuses("cannot be read")
    manifest.unlink()
    refuses(r"scripts/build_shards\.py")
    manifest.write_text(good)
    assert len(open_index(folder)) == 6


def test_many_rows_stay_in_few_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "INDEX_ROWS", 4)
    manifest = write_set(tmp_path / "set", 6)
    index = open_index(tmp_path / "set")
    assert index.table["key"].num_chunks == 2 and manifest["fingerprint"] == index.fingerprint
    assert [index.row(number)["key"] for number in range(6)] == sorted(KEYS)
