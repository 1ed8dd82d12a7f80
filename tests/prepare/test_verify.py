"""verify_shards: each kind of damage is found and named by shard and sample, nothing else is, nothing is written."""

import json
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from support.posts_on_disk import rows_to_table
from support.scripts import run_script
from trainer.core.disk import format_bytes
from trainer.core.errors import UserError
from trainer.core.files import sha256_file, write_json
from trainer.data.index import Index, open_index
from trainer.data.manifest import seal_manifest
from trainer.data.shards import LATENT_FIELDS, SCHEMA, ShardWriter, write_index
from trainer.data.tables import read_table, write_batches
from trainer.prepare.verify import verify_shards

# not in their order in the tars; one is longer than a tar header's name
KEYS = ["30", "4", "sub%2Fa%2Epng", "100", "7" + "%E5" * 60, "5", "62"]
FIRST, SECOND = "shard-00000.tar", "shard-00001.tar"  # the first holds four samples, the second three


def write_set(folder: Path, keys: list[str] = KEYS, per_shard: int = 4, value: float = 0.0) -> None:
    files, rows = [], []
    for number, start in enumerate(range(0, len(keys), per_shard)):
        writer = ShardWriter(folder, number)
        for place, key in enumerate(keys[start : start + per_shard]):
            row = {
                "key": key, "source": "posts.jsonl", "content_hash": "c" * 64, "bucket_width": 64,
                "bucket_height": 128, "original_width": 70, "original_height": 140, "crop_left": 0, "crop_top": 6,
                "score": start + place, "tags_general": "1girl ^_^", "extra": '{"id": 1}',
            }  # fmt: skip
            latents = np.random.default_rng(start + place).standard_normal((4, 16, 8)).astype(np.float16)
            latents[0, 0, 0] += value
            writer.add(row, latents)
        files.append(writer.finish())
        rows += writer.rows
    write_index(folder, rows_to_table(rows), files, {"vae_sha256": "v"}, counts={"samples": len(keys)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "shards"
    path.mkdir()
    write_set(path)
    return path


def place_of(folder: Path, key: str) -> tuple[int, int]:
    """Offset and length of a sample's payload."""
    row = next(row for row in Index(folder, {}).table.to_pylist() if row["key"] == key)
    return row["offset"], row["length"]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def problems(folder: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        verify_shards(folder)
    first, *lines = str(caught.value).splitlines()
    found = [line.strip() for line in lines if line.startswith("  ")]
    assert first == f"{len(found)} problem{'' if len(found) == 1 else 's'} in {folder}:"
    return found


def reseal(folder: Path) -> None:
    """Let the manifest name the shards and the index as they are now, as a faulty writer would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        shard |= {"size": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(
        folder / "manifest.json", seal_manifest(manifest | {"index_sha256": sha256_file(folder / "index.arrow")})
    )


def rewrite_index(folder: Path, rows: list[dict]) -> None:
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    with pa.OSFile(str(folder / "index.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table)


@pytest.fixture(autouse=True)
def nothing_is_written(folder: Path) -> Iterator[list]:
    """Every test takes a snapshot when it is done with the damage; nothing may differ from it afterwards."""
    snapshots: list = []
    yield snapshots
    for before in snapshots:
        assert snapshot(folder) == before


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    files = [path for path in folder.parent.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_mode, path.read_bytes()) for path in files}


def test_a_whole_set(folder: Path, nothing_is_written: list) -> None:
    nothing_is_written.append(snapshot(folder))
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    (folder / "report.html").touch()  # what lies beside the shards is nobody's business
    nothing_is_written[0] = snapshot(folder)
    assert verify_shards(folder).said == f"7 samples in 2 shards, {format_bytes(size)}, all as written: {folder}"


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("where", [0, 1, 500, -1])
def test_a_flipped_byte_of_latents(folder: Path, key: str, where: int, nothing_is_written: list) -> None:
    shard = FIRST if KEYS.index(key) < 4 else SECOND
    offset, length = place_of(folder, key)
    flip(folder / shard, offset + where % length)
    nothing_is_written.append(snapshot(folder))
    assert problems(folder) == [
        f"shard {shard}, key {key}: the bytes of {key}.npy are damaged (CRC-32 differs)",
        f"shard {shard} is not as it was written (its SHA-256 differs)",
    ]


def test_every_byte_counts(folder: Path) -> None:
    path = folder / SECOND
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        flip(path, place)
        found = problems(folder)
        assert f"shard {SECOND} is not as it was written (its SHA-256 differs)" in found, place
        assert all(SECOND in line for line in found)
        path.write_bytes(whole)
    verify_shards(folder)


def test_a_damaged_header_hides_no_other_sample(folder: Path) -> None:
    """The library's own reader stops at it without a word."""
    header = place_of(folder, "4")[0] - 512
    flip(folder / FIRST, header + 150)  # its checksum
    flip(folder / FIRST, place_of(folder, "100")[0] + 200)
    with tarfile.open(folder / FIRST) as tar:
        assert len(tar.getnames()) < 4
    assert problems(folder) == [
        f"shard {FIRST}, key 4: the header of 4.npy is damaged",
        f"shard {FIRST}, key 100: the bytes of 100.npy are damaged (CRC-32 differs)",
        f"shard {FIRST} is not as it was written (its SHA-256 differs)",
    ]


def test_a_truncated_shard(folder: Path, nothing_is_written: list) -> None:
    path = folder / FIRST
    size, cut = path.stat().st_size, place_of(folder, "sub%2Fa%2Epng")[0] + 100
    path.write_bytes(path.read_bytes()[:cut])
    nothing_is_written.append(snapshot(folder))
    assert problems(folder) == [
        f"shard {FIRST} has {cut} bytes, manifest.json says {size}",
        f"shard {FIRST}, key sub%2Fa%2Epng: sub%2Fa%2Epng.npy lies beyond the end of the file",
        f"shard {FIRST}, key 100: 100.npy lies beyond the end of the file",
        f"shard {FIRST} is not as it was written (its SHA-256 differs)",
    ]


def test_missing_and_strange_shards(folder: Path, nothing_is_written: list) -> None:
    (folder / SECOND).rename(folder / "shard-00007.tar")
    nothing_is_written.append(snapshot(folder))
    assert problems(folder) == [
        f"shard {SECOND} is missing",
        "shard-00007.tar is not of this set: manifest.json does not list it",
    ]


def test_a_changed_index(folder: Path, nothing_is_written: list) -> None:
    rows = Index(folder, {}).table.to_pylist()
    next(row for row in rows if row["key"] == "5")["score"] = 1000
    rewrite_index(folder, rows)
    nothing_is_written.append(snapshot(folder))
    (problem,) = problems(folder)
    assert problem.startswith("index.arrow is not the one that manifest.json names (its SHA-256 differs)")
    reseal(folder)  # the fingerprint gives it away even then
    open_index(folder)
    nothing_is_written.clear()
    assert problems(folder) == ["the fingerprint of manifest.json is not that of these rows and settings"]


@pytest.mark.parametrize("damage", ["missing", "cut", "noise", "columns"])
def test_an_index_that_cannot_be_read(folder: Path, damage: str) -> None:
    path = folder / "index.arrow"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "columns":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("key", pa.string())])):
            pass
    else:
        path.write_bytes(content[:1000] if damage == "cut" else bytes(byte ^ 0xA5 for byte in content))
    flip(folder / SECOND, 3000)
    first, second = problems(folder)
    assert first.startswith("index.arrow is") and "only whole shards" in first
    assert second == f"shard {SECOND} is not as it was written (its SHA-256 differs)"


def test_any_damage_to_the_index_is_told_without_a_crash(folder: Path) -> None:
    path = folder / "index.arrow"
    whole = path.read_bytes()
    for place in range(0, len(whole), 61):
        flip(path, place)
        assert "index.arrow" in problems(folder)[0], place
        path.write_bytes(whole)


def swap(path: Path, first: int, second: int, length: int) -> None:
    """Two stretches of a file in each other's place."""
    content = bytearray(path.read_bytes())
    swapped = bytes(content[second : second + length]), bytes(content[first : first + length])
    content[first : first + length], content[second : second + length] = swapped
    path.write_bytes(content)


def test_swapped_latents(folder: Path, nothing_is_written: list) -> None:
    """The payloads of two samples, of the same length, in each other's place."""
    (first, length), (second, other) = place_of(folder, "30"), place_of(folder, "4")
    assert length == other
    swap(folder / FIRST, first, second, length)
    nothing_is_written.append(snapshot(folder))
    assert problems(folder) == [
        *(f"shard {FIRST}, key {key}: the bytes of {key}.npy are damaged (CRC-32 differs)" for key in ("30", "4")),
        f"shard {FIRST} is not as it was written (its SHA-256 differs)",
    ]


def test_swapped_names(folder: Path) -> None:
    """The headers of two samples in each other's place: any other reader would give each the other's latents."""
    swap(folder / SECOND, place_of(folder, "5")[0] - 512, place_of(folder, "62")[0] - 512, 512)
    assert problems(folder) == [
        *(f"shard {SECOND}, key {key}: the header of {key}.npy is damaged" for key in ("5", "62")),
        f"shard {SECOND} is not as it was written (its SHA-256 differs)",
    ]


@pytest.mark.parametrize("end", ["header", "text", "padding"])
@pytest.mark.parametrize("key", ["30", "sub%2Fa%2Epng", KEYS[4], "62"])
def test_a_flipped_byte_around_the_json(folder: Path, key: str, end: str) -> None:
    shard = FIRST if KEYS.index(key) < 4 else SECOND
    offset, length = place_of(folder, key)
    with tarfile.open(folder / shard) as tar:
        member = tar.getmember(f"{key}.json")
    place = {"header": member.offset_data - 400, "text": member.offset_data, "padding": offset + length}[end]
    flip(folder / shard, place)
    assert problems(folder) == [
        f"shard {shard}, key {key}: {key}.json, its header or the padding around it is damaged",
        f"shard {shard} is not as it was written (its SHA-256 differs)",
    ]


def test_a_shard_of_another_set(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_set(other, value=1.0)
    (folder / SECOND).write_bytes((other / SECOND).read_bytes())
    found = problems(folder)
    for key in KEYS[4:]:
        assert f"shard {SECOND}, key {key}: the bytes of {key}.npy are damaged (CRC-32 differs)" in found
        assert f"shard {SECOND}, key {key}: {key}.json, its header or the padding around it is damaged" in found
    assert found[-1] == f"shard {SECOND} is not as it was written (its SHA-256 differs)" and len(found) == 7


def list_latents(folder: Path) -> None:
    """Give the set its list of all that lies in its tars, as a preparation writes it."""
    fields = [field.name for field in LATENT_FIELDS]
    latents = Index(folder, {}).table.select(fields)
    write_batches(folder / "latents.arrow", latents.schema, latents.to_batches())
    manifest = json.loads((folder / "manifest.json").read_text())
    named = manifest | {"latents_sha256": sha256_file(folder / "latents.arrow")}
    write_json(folder / "manifest.json", seal_manifest(named))


def test_samples_are_named_without_an_index(folder: Path) -> None:
    list_latents(folder)
    verify_shards(folder)
    (folder / "index.arrow").unlink()
    flip(folder / FIRST, place_of_latents(folder, "4"))
    assert problems(folder) == [
        "index.arrow is missing",
        f"shard {FIRST}, key 4: the bytes of 4.npy are damaged (CRC-32 differs)",
        f"shard {FIRST} is not as it was written (its SHA-256 differs)",
    ]


def place_of_latents(folder: Path, key: str) -> int:
    return next(row["offset"] for row in read_table(folder / "latents.arrow").to_pylist() if row["key"] == key)


def test_a_damaged_sample_that_the_index_lacks_is_named(folder: Path) -> None:
    """As one of a post that is filtered now: it lies in its tar, and in latents.arrow."""
    list_latents(folder)
    offset, _ = place_of(folder, "4")
    rewrite_index(folder, [row for row in Index(folder, {}).table.to_pylist() if row["key"] != "4"])
    reseal(folder)
    flip(folder / FIRST, offset)
    found = problems(folder)
    assert f"shard {FIRST}, key 4: the bytes of 4.npy are damaged (CRC-32 differs)" in found
    assert not any("samples in" in problem for problem in found)  # the shard has as many as the manifest says


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_list_of_latents_that_is_not_the_manifests(folder: Path, damage: str) -> None:
    list_latents(folder)
    if damage == "missing":
        (folder / "latents.arrow").unlink()
    else:
        flip(folder / "latents.arrow", 500)
    flip(folder / FIRST, place_of(folder, "4")[0])
    latents, sample, shard = problems(folder)  # samples are named by the index then
    assert latents.startswith("latents.arrow is ") and f"shard {FIRST}, key 4: " in sample and FIRST in shard


def test_samples_that_the_index_does_not_have(folder: Path) -> None:
    rows = Index(folder, {}).table.to_pylist()
    rewrite_index(folder, [row for row in rows if row["key"] not in ("4", "62")])
    reseal(folder)
    found = problems(folder)
    assert f"shard {FIRST} has 3 samples in index.arrow, manifest.json says 4" in found
    assert "index.arrow has 5 rows, manifest.json counts 7 samples" in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[::-1], "its key is not after the one before it"),
        (lambda rows: [*rows, rows[-1]], "its key is not after the one before it"),
        (lambda rows: [{**rows[0], "shard": "shard-00009.tar"}, *rows[1:]], "names shard shard-00009.tar"),
    ],
)
def test_rows_out_of_order_and_of_no_shard(folder: Path, change: Callable[[list], list], said: str) -> None:
    rewrite_index(folder, change(Index(folder, {}).table.to_pylist()))
    reseal(folder)
    (problem,) = problems(folder)
    assert problem.startswith("index.arrow") and said in problem
    with pytest.raises(UserError, match=said):
        open_index(folder)


def test_the_command(folder: Path, nothing_is_written: list) -> None:
    def verify(*words: str) -> subprocess.CompletedProcess[str]:
        return run_script("scripts/verify_shards.py", *words)

    whole = verify(str(folder))
    first, *rest = whole.stdout.splitlines()  # how long it took is said where it took a second
    assert whole.returncode == 0 and "7 samples in 2 shards" in first and "".join(rest)[:4] in ("", "took")
    shards = f"data.shards={folder}"
    by_config = verify("configs/stage1_feature_alignment.yaml", shards)
    assert (by_config.returncode, by_config.stdout) == (0, whole.stdout)
    for words in ([], [shards], [str(folder), shards], [str(folder), str(folder)]):
        assert "usage: " in verify(*words).stderr
    flip(folder / FIRST, place_of(folder, "100")[0])
    nothing_is_written.append(snapshot(folder))
    damaged = verify(str(folder))
    assert damaged.returncode == 2 and not damaged.stdout
    assert f"shard {FIRST}, key 100: the bytes of 100.npy are damaged" in damaged.stderr
    assert "Traceback" not in damaged.stderr
    missing = verify(str(folder / "nothing"))
    assert missing.returncode == 2 and "manifest.json does not exist" in missing.stderr
