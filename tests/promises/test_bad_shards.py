"""P4. Bad shards: whatever lies in a set's folder, training gets sound latents or a message with file, shard and key.

Not promised: that numbers are the right ones where whoever changed them also wrote all sums again.
"""

import io
import json
import os
import pickle
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from support.posts_on_disk import rows_to_table
from trainer.core.errors import UserError
from trainer.core.files import sha256_file, write_json
from trainer.core.layout import INDEX_FILE, MANIFEST_FILE
from trainer.data.index import BadSample, Index, open_index, read_raw_latents
from trainer.data.manifest import DIGEST_KEY, seal_manifest
from trainer.data.shards import SCHEMA, ShardFile, ShardWriter, write_index
from trainer.data.tables import write_batches
from trainer.prepare.verify import verify_shards

Count = Callable[[str, bool], None]
KEYS = ["1", "2", "3", "4"]
SHAPE = (4, 16, 8)


def latents_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(SHAPE).astype(np.float16)


def write_set(folder: Path, payloads: dict[str, bytes] | None = None, **row: Any) -> None:
    """Four samples in two shards; ``payloads`` stand in place of .npy files, with right sums of everything."""
    folder.mkdir()
    shards: list[ShardFile] = []
    rows: list[dict[str, Any]] = []
    for number in (0, 1):
        writer = ShardWriter(folder, number)
        for place in (2 * number, 2 * number + 1):
            what = {
                "key": KEYS[place], "source": "s", "content_hash": "c" * 64, "bucket_width": 64, "bucket_height": 128,
                "original_width": 70, "original_height": 140, "crop_left": 0, "crop_top": 6,
            }  # fmt: skip
            full = writer.add(what, latents_of(place))
            if (payload := (payloads or {}).get(KEYS[place])) is not None:
                full |= {"length": len(payload), "crc32": zlib.crc32(payload)}
        shard = writer.finish()
        path = folder / shard.name
        content = bytearray(path.read_bytes())
        for full in writer.rows:
            if (payload := (payloads or {}).get(full["key"])) is not None:
                content[full["offset"] : full["offset"] + len(payload)] = payload
        path.write_bytes(content)
        shards.append(ShardFile(shard.name, shard.samples, len(content), sha256_file(path)))
        rows += [full | row if full["key"] == "2" else full for full in writer.rows]
    write_index(folder, rows_to_table(rows), shards, {"vae_sha256": "v"}, counts={"samples": 4})


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def declare(header: str) -> bytes:
    """A .npy file with some header, and the numbers of a sound one."""
    text = header.encode("latin1")
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + latents_of(1).tobytes()


def with_value(value: float) -> np.ndarray:
    array = latents_of(1)
    array[3, 15, 7] = value
    return array


class Trap:
    """Whatever unpickles it leaves a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.putenv, ("TRAPPED", "1")


PAYLOADS = {
    "NaN": (npy(with_value(np.nan)), "NaN or infinity"),
    "infinity": (npy(with_value(-np.inf)), "NaN or infinity"),
    "another shape": (npy(latents_of(1).reshape(4, 8, 16)), r"holds float16 \(4, 8, 16\)"),
    "half of the channels": (npy(np.zeros((2, 32, 8), np.float16)), "holds float16"),
    "bf16's bits as integers": (npy(latents_of(1).view(np.uint16)), "holds uint16"),
    "fp32": (npy(latents_of(1).astype(np.float32)[:2]), r"holds float32"),
    "the other byte order": (npy(latents_of(1).astype(">f2")), "holds >f2"),
    "objects": (npy(np.full(SHAPE, None, dtype=object)).ljust(1152, b"\0"), "holds Python objects"),
    "objects that run": (npy(np.array([Trap()] * 4, dtype=object)).ljust(1152, b"\0"), "holds Python objects"),
    "a pickle": (pickle.dumps(Trap()).ljust(1152, b"\0"), "is no .npy file"),
    "records": (npy(np.zeros(128, dtype=[("a", "<f4"), ("b", "O")])), "holds Python objects"),
    "a giant shape": (declare("{'descr': '<f2', 'fortran_order': False, 'shape': (4, 1099511627776, 1099511627776)}"),
                      "holds float16"),
    "a negative shape": (declare("{'descr': '<f2', 'fortran_order': False, 'shape': (4, -16, -8)}"), "holds float16"),
    "too few numbers": (declare("{'descr': '<f2', 'fortran_order': False, 'shape': (4, 16, 8)}")[:-2],
                        "has 1022 bytes of numbers"),
    "a header that calls": (declare("{'descr': __import__('os').putenv('TRAPPED', '1'), 'shape': (4, 16, 8)}"),
                            "is no .npy file"),
    "a header nested deeply": (declare("(" * 500 + ")" * 500), "is no .npy file"),
    "a header of 64 KB": (b"\x93NUMPY\x02\x00" + (60_000).to_bytes(4, "little") + b" " * 60_000, "is no .npy file"),
    "no header": (bytes(range(256)) * 4 + bytes(16), "is no .npy file"),
    "a zip": (b"PK\x03\x04" + bytes(1100), "is no .npy file"),
}  # fmt: skip


@pytest.mark.parametrize("what", PAYLOADS)
def test_payloads_with_right_sums(tmp_path: Path, what: str, count_try: Count) -> None:
    payload, said = PAYLOADS[what]
    write_set(tmp_path / "set", {"2": payload})
    index = open_index(tmp_path / "set")
    with pytest.raises(BadSample, match=said) as caught:
        read_raw_latents(index, 1)
    told = str(caught.value)
    held = "shard-00000.tar" in told and "key 2" in told and "TRAPPED" not in os.environ
    count_try("a payload with right sums is refused with shard and key, and nothing of it runs", held)
    assert held, told
    for sound in (0, 2, 3):
        assert np.array_equal(read_raw_latents(index, sound), latents_of(sound))


ROWS = {
    "a place before the shard": ({"offset": -1}, "bytes lie outside of the shard"),
    "a place behind the shard": ({"offset": 10**15}, "bytes lie outside of the shard"),
    "a giant length": ({"length": 2**62}, "length is not that of its bucket's latents"),
    "a negative length": ({"length": -5}, "length is not that of its bucket's latents"),
    "no length": ({"length": 0}, "length is not that of its bucket's latents"),
    "a bucket of nothing": ({"bucket_width": 0}, "bucket_width is no multiple of 8"),
    "a negative bucket": ({"bucket_height": -64}, "bucket_height is no multiple of 8"),
    "a giant bucket": ({"bucket_width": 2**31 - 8, "length": 2**40}, "bucket_width is no multiple of 8"),
    "a bucket of 65": ({"bucket_width": 65}, "bucket_width is no multiple of 8"),
    "another bucket": ({"bucket_width": 128}, "length is not that of its bucket's latents"),
    "no original": ({"original_height": 0}, "original_height is below 1"),
    "no key": ({"key": ""}, "its key is"),
    "a shard elsewhere": ({"shard": "../shard-00000.tar"}, "names shard ../shard-00000.tar"),
}  # fmt: skip


@pytest.mark.parametrize("what", ROWS)
def test_rows_that_lead_elsewhere(tmp_path: Path, what: str, count_try: Count) -> None:
    row, said = ROWS[what]
    write_set(tmp_path / "set", None, **row)
    with pytest.raises(UserError, match=said) as caught:
        open_index(tmp_path / "set")
    told = str(caught.value)
    held = INDEX_FILE in told and str(tmp_path / "set") in told
    count_try("a row that leads elsewhere is refused when the set is opened", held)
    assert held, told
    with pytest.raises(UserError, match=said):  # and is no traceback of verify_shards
        verify_shards(tmp_path / "set")


def put_index(folder: Path, content: bytes) -> None:
    """Another index, whose hash the manifest has."""
    (folder / INDEX_FILE).write_bytes(content)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    write_json(folder / MANIFEST_FILE, seal_manifest(manifest | {"index_sha256": sha256_file(folder / INDEX_FILE)}))


def indexes(table: pa.Table, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Contents that are no index of ours."""

    def arrow(changed: pa.Table) -> bytes:
        write_batches(folder / "other.arrow", changed.schema, changed.to_batches())
        return (folder / "other.arrow").read_bytes()

    def with_column(name: str, column: pa.Array, nullable: bool = False) -> pa.Table:
        place = table.schema.get_field_index(name)
        return table.set_column(place, pa.field(name, column.type, nullable=nullable), column)

    sound = arrow(table)
    yield "nothing", b""
    yield "text", b"not an arrow file\n" * 100
    yield "a pickle", pickle.dumps(Trap())
    yield "half of it", sound[: len(sound) // 2]
    yield "its end alone", sound[-64:]
    yield "a stream", bytes(pa.ipc.new_stream(sink := pa.BufferOutputStream(), table.schema).close() or sink.getvalue())
    yield "no columns", arrow(pa.table({}))
    yield "a column less", arrow(table.drop_columns(["crc32"]))
    yield "offsets as text", arrow(with_column("offset", pa.array(["0"] * 4)))
    yield "offsets in 32 bits", arrow(with_column("offset", table["offset"].combine_chunks().cast(pa.int32())))
    yield "keys as numbers", arrow(with_column("key", pa.array([1, 2, 3, 4])))
    yield "lengths with null", arrow(with_column("length", pa.array([None, 1, 2, 3], pa.int64())))
    yield "keys that are no UTF-8", arrow(with_column("key", pa.array([b"\xff", b"2", b"3", b"4"]).view(pa.string())))
    generator = np.random.default_rng(0)
    for number in range(40):
        flipped = bytearray(sound)
        for place in generator.integers(0, len(sound), 8):
            flipped[place] ^= 1 << generator.integers(8)
        yield f"flipped bits {number}", bytes(flipped)


def test_indexes_that_are_none(tmp_path: Path, count_try: Count) -> None:
    """With the right hash, so that only their own checks are between them and training."""
    folder = tmp_path / "set"
    write_set(folder)
    table = pa.table(open_index(folder).table.to_pydict(), schema=SCHEMA)
    manifest = (folder / MANIFEST_FILE).read_bytes()
    for what, content in indexes(table, tmp_path):
        (folder / MANIFEST_FILE).write_bytes(manifest)
        put_index(folder, content)
        held = True
        try:
            opened = open_index(folder)  # bits of captions are nobody's to check
            for row in range(len(opened)):
                read_raw_latents(opened, row)
            held = what.startswith("flipped")
        except UserError as error:
            held = str(folder) in str(error)
        count_try("an index that is none, or is damaged, is a message", held)
        assert held, what


BROKEN_MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda said: [said],
    "text": lambda said: "manifest",
    "no format": lambda said: {k: v for k, v in said.items() if k != "format_version"},
    "format true": lambda said: said | {"format_version": True},
    "format as text": lambda said: said | {"format_version": "1"},
    "no fingerprint": lambda said: {k: v for k, v in said.items() if k != "fingerprint"},
    "a number as fingerprint": lambda said: said | {"fingerprint": 5},
    "a short fingerprint": lambda said: said | {"fingerprint": "abc"},
    "index hash null": lambda said: said | {"index_sha256": None},
    "latents' hash as list": lambda said: said | {"latents_sha256": []},
    "latents as list": lambda said: said | {"latents": []},
    "VAE as number": lambda said: said | {"latents": {"vae_sha256": 7}},
    "counts as list": lambda said: said | {"counts": [1]},
    "counts of text": lambda said: said | {"counts": {"samples": "4"}},
    "inputs without hash": lambda said: said | {"inputs": {}},
    "no shards": lambda said: {k: v for k, v in said.items() if k != "shards"},
    "shards as object": lambda said: said | {"shards": {}},
    "shards of text": lambda said: said | {"shards": ["shard-00000.tar"]},
    "an empty list of shards": lambda said: said | {"shards": []},
    "a shard without size": lambda said: said | {"shards": [{"name": "shard-00000.tar"}]},
    "a shard with more": lambda said: said | {"shards": [said["shards"][0] | {"url": "pipe:id"}]},
    "a shard elsewhere": lambda said: said | {"shards": [said["shards"][0] | {"name": "../../etc/passwd"}]},
    "a pipe": lambda said: said | {"shards": [said["shards"][0] | {"name": "pipe:touch trap"}]},
    "a size of text": lambda said: said | {"shards": [said["shards"][0] | {"size": "1"}]},
    "a negative size": lambda said: said | {"shards": [said["shards"][0] | {"size": -1}]},
    "a giant number of samples": lambda said: said | {"shards": [said["shards"][0] | {"samples": 10**30}]},
    "a shard twice": lambda said: said | {"shards": said["shards"] * 2},
}


@pytest.mark.parametrize("sealed", [True, False], ids=["with its digest", "as of an older version"])
def test_manifests_that_make_no_sense(tmp_path: Path, sealed: bool, count_try: Count) -> None:
    folder = tmp_path / "set"
    write_set(folder)
    sound = json.loads((folder / MANIFEST_FILE).read_text())
    for what, change in BROKEN_MANIFESTS.items():
        said = change({key: value for key, value in sound.items() if key != DIGEST_KEY})
        write_json(folder / MANIFEST_FILE, seal_manifest(said) if sealed and isinstance(said, dict) else said)
        for command in (open_index, verify_shards):
            with pytest.raises(UserError, match="manifest") as caught:
                command(folder)
            held = str(folder) in str(caught.value)
            count_try("a manifest that makes no sense is a message", held)
            assert held, what


TEXTS = {
    "nothing": b"", "half": b'{"format_version": 1, "lat', "nested": b"[" * 200_000, "objects": b'{"a":' * 99_999,
    "not UTF-8": b'{"format_version": 1, "x": "\xff\xfe"}', "NaN": b'{"format_version": NaN}',
    "twice": b'{"format_version": 1, "format_version": 1}', "huge": b'{"format_version": ' + b"9" * 5000 + b"}",
    "zeros": bytes(4096), "UTF-16": '{"format_version": 1}'.encode("utf-16"), "1e999": b'{"format_version": 1e999}',
    "101 levels": b'{"a":' * 101 + b"1" + b"}" * 101,
}  # fmt: skip


@pytest.mark.parametrize("what", TEXTS)
def test_manifests_that_are_no_json(tmp_path: Path, what: str, count_try: Count) -> None:
    write_set(tmp_path / "set")
    (tmp_path / "set" / MANIFEST_FILE).write_bytes(TEXTS[what])
    with pytest.raises(UserError, match=r"manifest\.json") as caught:
        open_index(tmp_path / "set")
    count_try("a manifest that is no JSON is a message", True)
    assert len(str(caught.value)) < 500


def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path: Path, count_try: Count) -> None:
    """Its digest is of what it says, so that white space and the spelling of letters are free."""
    folder = tmp_path / "set"
    write_set(folder)
    sound, said = (folder / MANIFEST_FILE).read_bytes(), open_index(folder).manifest
    generator = np.random.default_rng(1)
    for place in generator.integers(0, 8 * len(sound), 1500):
        flipped = bytearray(sound)
        flipped[place // 8] ^= 1 << (place % 8)
        (folder / MANIFEST_FILE).write_bytes(flipped)
        try:
            held = open_index(folder).manifest == said
        except UserError:
            held = True
        if not held and DIGEST_KEY not in json.loads(bytes(flipped)):
            held = True  # the digest's own name: a set of an older version, which verify_shards proves as before
        count_try("a flipped bit of a manifest is noticed, or changes nothing that it says", held)
        assert held, place


def test_damage_anywhere_in_a_shard(tmp_path: Path, count_try: Count) -> None:
    """Bits of the numbers or their header: the sample; bits between samples: nothing that training reads."""
    folder = tmp_path / "set"
    write_set(folder)
    index = open_index(folder)
    sound = {name: (folder / name).read_bytes() for name in ("shard-00000.tar", "shard-00001.tar")}
    generator = np.random.default_rng(2)
    for _ in range(300):
        name = f"shard-0000{generator.integers(2)}.tar"
        damaged = bytearray(sound[name])
        place = int(generator.integers(len(damaged)))
        damaged[place] ^= 1 << generator.integers(8)
        (folder / name).write_bytes(damaged)
        for row in range(4):
            said, lies = None, index.row(row)
            try:
                latents = read_raw_latents(Index(folder, index.manifest), row)
                assert np.array_equal(latents, latents_of(row))
            except BadSample as error:
                said = str(error)
            hit = lies["shard"] == name and lies["offset"] <= place < lies["offset"] + lies["length"]
            held = (said is not None) == hit and (not hit or (name in said and f"key {lies['key']}" in said))
            count_try("a flipped bit of a shard is a message for its sample, and for no other", held)
            assert held, (place, said)
        (folder / name).write_bytes(sound[name])


def test_shards_that_change_under_a_run(tmp_path: Path, count_try: Count) -> None:
    """Cut, emptied, gone, or a folder, after the set was opened."""
    write_set(tmp_path / "set")
    path = tmp_path / "set" / "shard-00000.tar"
    sound = path.read_bytes()

    def cut(size: int) -> None:
        path.write_bytes(sound[:size])

    changes: list[Callable[[], object]] = [
        lambda: cut(600), lambda: cut(0), path.unlink, lambda: (path.unlink(), path.mkdir()),
    ]  # fmt: skip
    for change in changes:
        index = open_index(tmp_path / "set")
        change()
        with pytest.raises(BadSample, match=r"shard-00000\.tar, key 2: "):
            read_raw_latents(index, 1)
        count_try("a shard that is cut or gone under a run is a message with shard and key", True)
        path.rmdir() if path.is_dir() else None
        path.write_bytes(sound)
