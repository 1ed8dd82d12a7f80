"""Hostile and damaged inputs of every kind: each gives a post, a reject with a reason or a UserError, never anything
else, and nothing is ever written."""

import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from support.paths import REPOSITORY
from trainer.config.schema import SourceConfig
from trainer.core.errors import UserError
from trainer.data.buckets import Fit
from trainer.data.images import BadImage, open_arrow, read_bytes, read_image_header, read_pixels
from trainer.data.post import ImagePlace, Post
from trainer.data.sources.folders import iterate_folder
from trainer.data.sources.hub_datasets import find_image_column, iterate_dataset_rows
from trainer.data.sources.image_folders import list_images
from trainer.data.sources.kohya import iterate_kohya
from trainer.data.sources.posts_files import iterate_posts_file
from trainer.data.sources.records import Reject, Remark
from trainer.data.sources.tars import iterate_tars

DEMO = REPOSITORY / "demo"
PNG = (DEMO / "images" / "bee.png").read_bytes()
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")
# what a name must never lead to, and what file systems, tars and JSON stumble over
NAMES = st.one_of(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=40),
    st.lists(st.sampled_from(["..", ".", "", "a", "a.png", "secret.png", "sub", "~", "\\", "\0", "ü名", "%2e"]),
             min_size=1, max_size=6).map("/".join),
    st.sampled_from(["/etc/passwd", "file:///etc/passwd", "C:\\a.png", "pipe:ls", "x" * 300, "a/" * 300, "\ud800"]),
)  # fmt: skip
quick = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def flip(content: bytes, random: np.random.Generator, truncate: bool = True) -> bytes:
    """The bytes with a few bits changed, sometimes cut short."""
    damaged = bytearray(
        content[: random.integers(1, len(content) + 1)] if truncate and random.random() < 0.3 else content
    )
    for _ in range(random.integers(0, 4)):
        damaged[random.integers(len(damaged))] ^= 1 << int(random.integers(8))
    return bytes(damaged)


def judge(items: Any) -> Counter[str]:
    """What came of each item; every reject and remark says why, in text that a report can hold."""
    counts: Counter[str] = Counter()
    for item in items:
        if isinstance(item, Remark):
            assert item.kind and item.count > 0 and (item.origin + item.kind + item.detail).encode()
            continue
        assert isinstance(item, Post | Reject)
        if isinstance(item, Reject):
            assert item.reason and item.detail
            assert (item.origin + item.reason + item.detail).encode()
        else:
            assert item.key.isascii() and not set(item.key) & set("./\\\0 ")
            assert item.origin.encode()
        counts[item.reason if isinstance(item, Reject) else "post"] += 1
    return counts


@pytest.fixture
def fenced(tmp_path: Path) -> Any:
    """A folder for a source, beside a secret; at the end nothing but what the test put there may be there."""
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "in").mkdir()
    yield tmp_path / "in"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "secret.png"]
    assert (tmp_path / "secret.png").read_bytes() == PNG


# --- images


def encode(mode: str, form: str, size: tuple[int, int], random: np.random.Generator) -> bytes | None:
    """A picture of noise; None where the format does not have the mode."""
    bands = random.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(random.integers(0, 65536, (size[1], size[0]), dtype=np.uint16))
    else:
        image = Image.fromarray(bands).convert("RGB" if mode in ("P", "CMYK") else "RGBA").convert(mode)
    buffer = io.BytesIO()
    try:
        image.save(buffer, form, **({"transparency": 3} if mode == "P" and form in ("PNG", "GIF") else {}))
    except (OSError, ValueError, KeyError):
        return None
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM"])
@pytest.mark.parametrize("mode", MODES)
def test_modes_whole_and_damaged(mode: str, form: str) -> None:
    random = np.random.default_rng(len(mode) + len(form))
    for number in range(12):
        width, height = (int(side) for side in random.integers(1, 40, 2))
        content = encode(mode, form, (width, height), random)
        if content is None:
            return
        if number:
            content = flip(content, random)
        try:
            size = read_image_header(content)
            if size[0] * size[1] < 10**6:
                pixels = read_pixels(content, Fit(size, size, 0, 0))
                assert pixels.shape == (size[1], size[0], 3) and pixels.dtype == np.uint8
            assert form != "PPM" and (number or size == (width, height))
        except BadImage as error:
            assert error.detail and error.reason in {"not_an_image", "undecodable", "bomb", "empty"}
            assert number or form == "PPM"


@quick
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"BM", b"GIF89a"]),
)
def test_bytes_that_are_no_image(content: bytes, magic: bytes) -> None:
    for read in (read_image_header, lambda data: read_pixels(data, Fit((8, 8), (8, 8), 0, 0))):
        with pytest.raises(BadImage):
            read(magic + content + b"\xff" * 8)


# --- posts files and sd-scripts' metadata


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6,
)  # fmt: skip
FIELDS = ("id", "file", "score", "rating", "created_at", "media_asset", "caption", "tags", "tag_string_general",
          "tags_artist", "image_width", "a\ud800")  # fmt: skip
RECORDS = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6)


@quick
@given(st.lists(st.one_of(RECORDS.map(lambda record: json.dumps(record).encode()), st.binary(max_size=60)), max_size=6),
       NAMES)  # fmt: skip
def test_any_lines_of_posts(fenced: Path, lines: list[bytes], file: str) -> None:
    (fenced / "images").mkdir(exist_ok=True)
    (fenced / "images" / "a.png").write_bytes(PNG)
    named = json.dumps({"id": 1, "file": file}).encode()
    # the first line keeps the others from saying that the file is of another kind
    (fenced / "posts.jsonl").write_bytes(b"\n".join([b"{}", *lines, named, b'{"file": "a.png"}']))
    images = list_images(fenced / "images")
    items = list(iterate_posts_file(fenced / "posts.jsonl", images, "s"))
    judge(items)
    assert isinstance(items[-1], Post)
    for item in items:
        if isinstance(item, Post):
            assert item.image[1:] == (None,) * 4 and item.image.path.resolve().is_relative_to(images.path.resolve())


KINDS_OF_FILES = st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.json.gz"])
STARTS = st.sampled_from([b"", b"[", b"[{", b"id,file\n", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"])


@quick
@given(st.tuples(STARTS, st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode())).map(b"".join),
       KINDS_OF_FILES)  # fmt: skip
def test_any_bytes_as_a_posts_file(fenced: Path, content: bytes, name: str) -> None:
    (fenced / name).write_bytes(content)
    try:
        judge(iterate_posts_file(fenced / name, list_images(fenced), "s"))
    except UserError as error:
        assert name in str(error)
    finally:
        (fenced / name).unlink()


@quick
@given(st.dictionaries(NAMES, JSON | st.fixed_dictionaries({"caption": JSON, "tags": JSON}), max_size=6))
def test_any_metadata_of_sd_scripts(fenced: Path, entries: dict[str, Any]) -> None:
    (fenced / "images").mkdir(exist_ok=True)
    (fenced / "images" / "a.png").write_bytes(PNG)
    (fenced / "meta.json").write_text(json.dumps(entries))
    judge(iterate_kohya(fenced / "meta.json", list_images(fenced / "images"), "s"))


def test_damaged_parquet(fenced: Path) -> None:
    random = np.random.default_rng(3)
    table = pa.table({"id": list(range(40)), "file": ["a.png"] * 40, "tags_general": [["a", "b"]] * 40})
    pq.write_table(table, fenced / "good.parquet", row_group_size=10)
    (fenced / "images").mkdir()
    (fenced / "images" / "a.png").write_bytes(PNG)
    images, ends = list_images(fenced / "images"), Counter[str]()
    content = (fenced / "good.parquet").read_bytes()
    for number in range(150):
        file = fenced / f"{number}.parquet"
        file.write_bytes(flip(content, random))
        try:
            judge(iterate_posts_file(file, images, "s"))
            ends["read"] += 1
        except UserError as error:
            assert str(file) in str(error)
            ends["refused"] += 1
    assert min(ends["read"], ends["refused"]) > 10


# --- tars


def tar_of(members: list[tuple[str, bytes, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of (name, type, payload); what the format cannot hold is left out."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, kind, payload in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "secret.png", len(payload)
            try:
                tar.addfile(info, io.BytesIO(payload))
            except (ValueError, UnicodeEncodeError):
                continue
    return buffer.getvalue()


def read_all(file: Path) -> Counter[str]:
    """Iterate a tar and read every image of it, which lies within the file."""
    items = list(iterate_tars(file, "s"))
    for item in items:
        if isinstance(item, Post):
            path, offset, length, *_ = item.image
            assert path == file and offset is not None and length is not None
            assert 0 <= offset <= offset + length <= file.stat().st_size
            if length:
                assert len(read_bytes(item.image)) == length
    return judge(items)


KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE,
                         tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE,
                         b"S", b"V", b"?"])  # fmt: skip
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@quick
@given(st.lists(st.tuples(NAMES, st.sampled_from(["", ".png", ".txt", ".json"]), KINDS), max_size=8), FORMATS)
def test_names_and_types_in_tars(fenced: Path, members: list[tuple[str, str, bytes]], form: int) -> None:
    whole = [(name + ending, kind, b"{}" if ending == ".json" else b"x") for name, ending, kind in members]
    last = [("last/sample.png", tarfile.REGTYPE, PNG), ("last/sample.txt", tarfile.REGTYPE, b"a")]
    (fenced / "t.tar").write_bytes(tar_of(whole + last, form))
    assert read_all(fenced / "t.tar")["post"] >= 1
    assert sorted(path.name for path in fenced.iterdir()) == ["t.tar"]


def test_damaged_tars(fenced: Path) -> None:
    random = np.random.default_rng(4)
    members = [(f"{n}.{ext}", tarfile.REGTYPE, payload) for n in range(20) for ext, payload in
               (("png", PNG[: int(random.integers(1, 900))]), ("json", b'{"score": 1}'), ("txt", b"a, b"))]  # fmt: skip
    members += [(f"{'l' * 120}{n}.{ext}", tarfile.REGTYPE, b"x") for n in range(3) for ext in ("png", "txt")]
    totals: Counter[str] = Counter()
    for number in range(200):
        form = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[number % 3]
        file = fenced / f"{number}.tar"
        file.write_bytes(flip(tar_of(members, form), random, truncate=number % 2 == 0))
        counts = read_all(file)
        if number % 2:  # not cut short: a flipped bit costs its own sample, or that and the one before or behind it
            assert counts["post"] >= (20 if form == tarfile.USTAR_FORMAT else 23) - 2 * 3
        totals += counts
        file.unlink()
    assert totals["bad_tar"] > 50 and totals["post"] > 2000


def header(name: bytes = b"a.png", size: bytes = b"00000000001", kind: bytes = b"0", prefix: bytes = b"") -> bytes:
    """A header with a good checksum, whatever its fields say."""
    block = bytearray(512)
    for start, value in ((0, name), (100, b"0000644"), (124, size), (156, kind), (257, b"ustar\x0000"), (345, prefix)):
        block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "damage",
    [
        header(size=b"\xff" * 12),  # negative, in base 256
        header(size=b"\x80" + b"\xff" * 11),
        header(size=b"77777777777"),
        header(size=b"not octal.."),
        header(size=b"-0000000001"),
        header(kind=b"x", size=b"00000000024") + b"99 path=far too long".ljust(512, b"\0"),
        header(kind=b"x", size=b"00000000021") + b"no number path=a\n".ljust(512, b"\0"),
        header(kind=b"x", size=b"00000000013") + b"11 size=-5\n".ljust(512, b"\0") + header() + bytes(512),
        header(kind=b"x", size=b"00000000014") + b"12 size=9e9\n".ljust(512, b"\0") + header() + bytes(512),
        header(kind=b"L", size=b"07777777777"),
        header(kind=b"x", size=b"00010000000"),
        b"\x01" * 512,
        b"x" * 700,  # what follows lies at no multiple of 512 any more, and is lost
    ],
)
def test_headers_that_lie(fenced: Path, damage: bytes) -> None:
    parts = [tar_of([(f"{n}.png", b"0", PNG), (f"{n}.txt", b"0", b"a")])[: 3 * 512 + len(PNG) + -len(PNG) % 512]
             for n in range(4)]  # fmt: skip
    (fenced / "t.tar").write_bytes(parts[0] + parts[1] + damage + b"".join(parts[2:]))
    counts = read_all(fenced / "t.tar")
    assert counts["bad_tar"] >= 1 and counts["post"] >= (4 if len(damage) % 512 == 0 else 2)


def test_a_name_with_a_zero_byte_in_pax(fenced: Path) -> None:
    record = b"16 path=a\x00b.png\n"
    assert len(record) == 16
    pax = header(kind=b"x", size=b"00000000020") + record.ljust(512, b"\0")
    (fenced / "t.tar").write_bytes(pax + header() + b"x".ljust(512, b"\0"))
    assert read_all(fenced / "t.tar") == {"refused_member": 1}


def test_a_very_long_name(fenced: Path) -> None:
    name = "/".join(["名" * 80] * 200)
    (fenced / "t.tar").write_bytes(tar_of([(f"{name}.png", b"0", PNG), (f"{name}.txt", b"0", b"a")]))
    (post,) = iterate_tars(fenced / "t.tar", "s")
    assert isinstance(post, Post) and post.origin == f"t.tar: {name}"


# --- datasets and folders


def test_damaged_arrow_files(fenced: Path) -> None:
    random = np.random.default_rng(5)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": bytes([n]) * 50, "path": f"{n}.png"} for n in range(20)] + [None]
    table = pa.table(
        {"image": pa.array(images, kind), "tags": [["a", "b"]] * 21, "caption": [f"c{n}" for n in range(21)]}
    )
    with pa.OSFile(str(fenced / "good.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    content, ends = (fenced / "good.arrow").read_bytes(), Counter[str]()
    for number in range(400):
        file = fenced / f"{number}.arrow"
        file.write_bytes(flip(content, random))
        for row in (0, 7, 20):
            try:
                assert read_bytes(ImagePlace(file, row=row, column="image"))
                ends["read"] += 1
            except BadImage as error:
                ends[error.reason] += 1
        try:
            damaged = open_arrow(file)
            column = find_image_column(SourceConfig("dataset", "x"), damaged.schema)
            assert all(isinstance(row, dict) for row, _ in iterate_dataset_rows(damaged, column))
        except (pa.ArrowException, OSError, ValueError, UserError):  # as iterate_dataset catches them
            pass
    assert ends.keys() <= {"read", "unreadable", "empty", "missing", "too_large"} and ends["unreadable"] > 100


def test_a_folder_of_traps(fenced: Path) -> None:
    raw = [
        b"bad\xff.png",
        "名前 ü.png".encode(),
        b"new\nline.png",
        b"-rf.png",
        b"a.png.png",
        b"..png",
        b"x" * 251 + b".png",
    ]
    for name in raw:
        (fenced / os.fsdecode(name)).write_bytes(PNG)
        Path(os.fsdecode(os.path.join(fsencoded(fenced), name[:-4] + b".txt"))).write_bytes(b"a")  # noqa: PTH118
    (fenced / "link.png").symlink_to("../secret.png")
    (fenced / "loop.png").symlink_to("loop.png")
    (fenced / "up").symlink_to("..")
    (fenced / "dangling.png").symlink_to("nothing")
    (fenced / "hard.png").hardlink_to(fenced / "-rf.png")
    (fenced / "hard.txt").symlink_to("loop.png")
    deep = fenced / Path(*["d" * 10] * 200)
    deep.mkdir(parents=True)
    (deep / "a.png").write_bytes(PNG)
    (deep / "a.txt").mkdir()
    assert judge(iterate_folder(fenced, "s")) == {
        "post": 6, "outside_folder": 1, "image_missing": 3, "no_sidecar": 1}  # fmt: skip


def fsencoded(path: Path) -> bytes:
    return os.fsencode(path)
