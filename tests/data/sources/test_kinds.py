"""Every kind of source on real drawings: what becomes a post, what is set aside, and that bytes come back whole."""

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from support.paths import REPOSITORY
from trainer.config.schema import DataConfig, SourceConfig
from trainer.core.errors import UserError
from trainer.data.images import BadImage, read_bytes, read_image_header, stat_image
from trainer.data.post import ImagePlace, Post
from trainer.data.sources import iterate_sources
from trainer.data.sources.records import Reject, Remark

DEMO = REPOSITORY / "demo"
RECORDS = [json.loads(line) for line in (DEMO / "posts.jsonl").read_text().splitlines()][:12]
FILES = [DEMO / "images" / record["file"] for record in RECORDS]


def iterate(*sources: SourceConfig) -> list[Post | Reject]:
    """Posts and rejects of some sources."""
    items = iterate_sources(DataConfig("shards", sources=list(sources)))
    return [item for item in items if not isinstance(item, Remark)]


def posts_of(*sources: SourceConfig) -> list[Post]:
    items = iterate(*sources)
    assert all(isinstance(item, Post) for item in items), items
    return [item for item in items if isinstance(item, Post)]


def told(items: list[Post | Reject]) -> list[str]:
    """Each post's key, each reject's reason."""
    return [item.reason if isinstance(item, Reject) else item.key for item in items]


def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package datasets with a cache of the test's own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path))
    return datasets


def test_every_kind_gives_the_same_posts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = hub_folder(tmp_path, monkeypatch)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "b.parquet", row_group_size=5)
    (tmp_path / "c").mkdir()
    for record, file in zip(RECORDS, FILES, strict=True):
        shutil.copy(file, tmp_path / "c" / file.name)
        (tmp_path / "c" / f"{file.name}.json").write_text(json.dumps(record))
    with webdataset.ShardWriter(str(tmp_path / "d-%02d.tar"), maxcount=5, verbose=0) as writer:
        for record, file in zip(RECORDS, FILES, strict=True):
            writer.write({"__key__": f"k/{record['id']}", "png": file.read_bytes(), "json": record})
    (tmp_path / "d").mkdir()
    for file in tmp_path.glob("d-*.tar"):
        file.rename(tmp_path / "d" / file.name)
    rows = [record | {"image": str(file)} for record, file in zip(RECORDS, FILES, strict=True)]
    made = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
    made.save_to_disk(tmp_path / "e", num_shards=3)
    sources = [
        SourceConfig("posts", str(tmp_path / "a.jsonl"), str(DEMO / "images")),
        SourceConfig("posts", str(tmp_path / "b.parquet"), str(DEMO / "images")),
        SourceConfig("folder", str(tmp_path / "c")),
        SourceConfig("tars", str(tmp_path / "d")),
        SourceConfig("dataset", str(tmp_path / "e"), name="hub"),
    ]
    posts = posts_of(*sources)
    assert len(posts) == 60
    assert [post.source for post in posts[::12]] == ["a.jsonl", "b.parquet", "c", "d", "hub"]
    want = {post.key: post for post in posts[:12]}
    for post in posts:
        same = want[post.key]
        assert (post.year, post.tags_general, post.tags_artist, post.extra) == (
            same.year, same.tags_general, same.tags_artist, same.extra)  # fmt: skip
        data = read_bytes(pickle.loads(pickle.dumps(post.image)))
        assert data == read_bytes(same.image) and read_image_header(data) == (same.stated_width, same.stated_height)
    *files, member, cell = [post.image for post in posts[::12]]
    assert [file[1:] for file in files] == [(None,) * 4] * 3
    assert member.offset and member.length and member.row is None
    assert cell[1:] == (None, None, 0, "image")


def test_a_missing_source_is_told_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for kind, path, images, said in (
        ("posts", "none.jsonl", "empty", "none.jsonl cannot be read: No such file"),
        ("posts", "none.parquet", "empty", "none.parquet cannot be read"),
        ("posts", "a.jsonl", "none", "none is not a folder"),
        ("folder", "none", None, "none is not a folder"),
        ("folder", "empty", None, "empty holds no images"),
        ("tars", "none.tar", None, "none.tar is neither a tar file nor a folder"),
        ("tars", "empty", None, "empty holds no .tar files"),
        ("tars", "pipe:echo", None, "is neither a tar file nor a folder"),
        ("kohya", "none.json", "empty", "none.json cannot be read"),
    ):
        source = SourceConfig(kind, str(tmp_path / path), images and str(tmp_path / images))  # type: ignore[arg-type]
        good = SourceConfig("posts", str(DEMO / "posts.jsonl"), str(DEMO / "images"))
        with pytest.raises(UserError, match=r"^data\.sources\.1: ") as caught:
            iterate(good, source)
        assert said in str(caught.value)


# --- parquet


def test_parquet_of_gallery_dl(tmp_path: Path) -> None:
    when = datetime(2019, 5, 1, 12, tzinfo=UTC)
    rows = [
        {"id": 1, "file": FILES[0].name, "tags_general": ["1girl", "solo"], "created_at": when, "rating": "general"},
        {"id": 2, "file": FILES[1].name, "tags_general": None, "created_at": None, "rating": None},
        {"id": 3, "file": "../x.png", "tags_general": ["a b"], "created_at": when, "rating": "g"},
        {"id": 4, "file": FILES[2].name, "tags_general": ["a b"], "created_at": when, "rating": "g"},
        {"id": 5, "file": FILES[3].name, "tags_general": [], "created_at": when, "rating": "x"},
    ]
    table = pa.Table.from_pylist(rows).append_column("blob", pa.array([b"x"] * 5))
    table = table.append_column("aesthetic", pa.array([0.5, None, 1.0, 1.0, 1.0]))
    pq.write_table(table, tmp_path / "p.parquet")
    items = iterate(SourceConfig("posts", str(tmp_path / "p.parquet"), str(DEMO / "images"), name="mine"))
    assert told(items) == ["1", "2", "outside_folder", "4", "bad_record"]
    one, two, three, four, _ = items
    assert isinstance(one, Post) and isinstance(two, Post) and isinstance(four, Post)
    assert four.tags_general == "a_b"
    assert (one.year, one.tags_general, one.rating, one.source) == (2019, "1girl solo", "g", "mine")
    assert one.extra == {"aesthetic": 0.5, "id": 1, "created_at": "2019-05-01T12:00:00+00:00"}
    assert (two.year, two.tags_general, two.extra) == (None, None, {"id": 2})
    assert three.origin == "p.parquet row 3"


# --- sidecars


def test_a_caption_file_may_be_called_caption(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        shutil.copy(FILES[0], tmp_path / f"{name}.png")
    (tmp_path / "a.caption").write_text("one, two\n")
    (tmp_path / "b.caption").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "c.caption").mkdir()
    items = iterate(SourceConfig("folder", str(tmp_path)))
    assert told(items) == ["a%2Epng", "caption_ambiguous", "no_sidecar"]
    assert isinstance(items[0], Post) and items[0].caption == "one, two"


def test_the_order_is_that_of_whole_paths(tmp_path: Path) -> None:
    names = ["s/b.png", "s-a/x.png", "s.png", "s/a/z.png", "s0.png", "a.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FILES[0], tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("x")
    assert [post.origin for post in posts_of(SourceConfig("folder", str(tmp_path)))] == sorted(names)


def test_pipes_among_images_and_sidecars(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    shutil.copy(FILES[0], tmp_path / "b.png")
    os.mkfifo(tmp_path / "b.txt")
    a, b = iterate(SourceConfig("folder", str(tmp_path)))
    assert isinstance(a, Post) and told([b]) == ["bad_record"]
    with pytest.raises(BadImage, match="not_an_image"):
        read_bytes(a.image)


# --- tars


def write_tar(file: Path, *members: tuple[str, bytes] | tarfile.TarInfo, **options: Any) -> Path:
    with tarfile.open(file, "w", **options) as tar:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            payload = b"" if isinstance(member, tarfile.TarInfo) else member[1]
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return file


PNG = FILES[0].read_bytes()


def test_samples_of_a_tar(tmp_path: Path) -> None:
    file = write_tar(
        tmp_path / "t.tar",
        ("sub/a.PNG", PNG), ("sub/a.txt", b"a caption"), ("sub/a.cls", b"\x80\x04K\x01."),
        ("b.png", PNG), ("b.json", b'{"id": 7, "score": 3}'), ("b.txt", b"wins"),
        ("c.png", PNG),
        ("d.json", b"{}"), ("d.npy", b""),
        ("e.png", PNG), ("e.jpg", PNG), ("e.txt", b"x"),
        ("f.png", PNG), ("f.json", b"{"),
        ("g.png", PNG), ("g.png", PNG), ("g.txt", b"x"),
        ("h.png", b""), ("h.txt", b"x"),
        (".hidden.png", PNG), ("README", b"x"),
        ("ünïcode " + "x" * 200 + ".png", PNG), ("ünïcode " + "x" * 200 + ".txt", b"long"),
    )  # fmt: skip
    items = iterate(SourceConfig("tars", str(file)))
    assert told(items)[:6] == ["t%2Fsub%2Fa", "7", "image_ambiguous", "bad_json", "bad_sample", "t%2Fh"]
    assert told(items)[7:] == ["no_sidecar", "no_image"]  # which the tar's other members might have explained
    assert [item.origin for item in items[:2]] == ["t.tar: sub/a", "t.tar: b"]
    a, b, *_, h, long = items[:7]
    assert isinstance(a, Post) and isinstance(b, Post) and isinstance(h, Post) and isinstance(long, Post)
    assert (a.caption, b.caption, b.score, b.source, long.caption) == ("a caption", "wins", 3, "t.tar", "long")
    assert read_bytes(a.image) == read_bytes(b.image) == read_bytes(long.image) == PNG
    assert stat_image(a.image) == (len(PNG), file.stat().st_mtime_ns)
    with pytest.raises(BadImage, match="empty"):
        read_bytes(h.image)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_format(tmp_path: Path, form: int) -> None:
    name = "/".join(["folder" * 8] * 3) + "/" + "n" * 40
    file = write_tar(tmp_path / "t.tar", (f"{name}.png", PNG), (f"{name}.txt", b"x"), format=form)
    (post,) = posts_of(SourceConfig("tars", str(file)))
    assert post.origin == f"t.tar: {name}" and read_bytes(post.image) == PNG


def test_a_broken_header_costs_its_own_sample(tmp_path: Path) -> None:
    members = [(f"{n:03d}.{ext}", payload) for n in range(100) for ext, payload in (("png", PNG), ("txt", b"x"))]
    file = write_tar(tmp_path / "t.tar", *members)
    with tarfile.open(file) as tar:
        broken = {tar.getmember(name).offset for name in ("005.png", "040.txt", "041.png")}
    content = bytearray(file.read_bytes())
    for offset in broken:
        content[offset + 150] ^= 1  # in the checksum
    file.write_bytes(content)
    items = iterate(SourceConfig("tars", str(file)))
    good = [post.key for post in items if isinstance(post, Post)]
    assert good == [f"t%2F{n:03d}" for n in range(100) if n not in (5, 40, 41)]
    rejects = [item for item in items if isinstance(item, Reject)]
    assert sorted(reject.reason for reject in rejects) == ["bad_sample"] + ["bad_tar"] * 2 + ["no_image"] * 2
    assert any(reject.origin == f"t.tar: byte {min(broken)}" and "are no member" in reject.detail for reject in rejects)


@pytest.mark.parametrize("lost", ["1.png", "1.json", "1.txt", "0.json", "0.txt", "2.txt"])
def test_a_sample_that_lost_a_sidecar_is_no_post(tmp_path: Path, lost: str) -> None:
    members = [("png", PNG), ("json", b'{"score": 5}'), ("txt", b"x")]
    file = write_tar(tmp_path / "t.tar", *[(f"{n}.{ext}", payload) for n in range(4) for ext, payload in members])
    with tarfile.open(file) as tar:
        offset = tar.getmember(lost).offset
    with file.open("r+b") as broken:
        broken.seek(offset)
        broken.write(b"?")
    posts = {post.key: post for post in iterate(SourceConfig("tars", str(file))) if isinstance(post, Post)}
    assert posts.keys() == {f"t%2F{n}" for n in range(4)} - {f"t%2F{lost[0]}"}
    assert all((post.score, post.caption) == (5, "x") for post in posts.values())


def test_a_truncated_tar_keeps_what_is_whole(tmp_path: Path) -> None:
    file = write_tar(
        tmp_path / "t.tar",
        *[(f"{n}.{ext}", payload) for n in range(5) for ext, payload in (("txt", b"x"), ("png", PNG))],
    )
    with tarfile.open(file) as tar:
        end = tar.getmember("3.png").offset_data + 100
    os.truncate(file, end)
    items = iterate(SourceConfig("tars", str(file)))
    assert told(items) == ["t%2F0", "t%2F1", "t%2F2", "bad_tar", "no_image"]


def test_joined_tars_are_read_to_the_end(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "a.tar", ("a.png", PNG), ("a.txt", b"x"))
    other = write_tar(tmp_path / "b.tar", ("b.png", PNG), ("b.txt", b"x"))
    (tmp_path / "ab.tar").write_bytes(one.read_bytes() + other.read_bytes())
    assert told(iterate(SourceConfig("tars", str(tmp_path / "ab.tar")))) == ["ab%2Fa", "ab%2Fb"]


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_links_devices_and_names_that_lead_out(tmp_path: Path) -> None:
    bad = [
        special("a.png", tarfile.SYMTYPE, "/etc/passwd"), special("b.png", tarfile.LNKTYPE, "z.png"),
        special("c.png", tarfile.CHRTYPE), special("d.png", tarfile.BLKTYPE), special("e.png", tarfile.FIFOTYPE),
        ("/f.png", PNG), ("../g.png", PNG), ("sub/../../h.png", PNG), special("sub", tarfile.DIRTYPE),
    ]  # fmt: skip
    file = write_tar(tmp_path / "t.tar", *bad, ("z.png", PNG), ("z.txt", b"x"))
    items = iterate(SourceConfig("tars", str(file)))
    assert told(items) == ["refused_member"] * 8 + ["t%2Fz"]
    assert items[0] == Reject(None, "t.tar: a.png", "refused_member", "a symbolic link, not a regular file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.tar"]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_refused(tmp_path: Path, mode: str) -> None:
    for name in ("t.tar", "t.tar.gz"):
        with tarfile.open(tmp_path / name, mode):
            pass
        for path in (tmp_path / name, tmp_path):
            with pytest.raises(UserError, match=r"is compressed: .*decompress it"):
                iterate(SourceConfig("tars", str(path)))
        (tmp_path / name).unlink()


# --- datasets


def test_a_dataset_that_was_shuffled_and_filtered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = hub_folder(tmp_path, monkeypatch)
    rows = [{"picture": file.read_bytes(), "text": f"drawing {n}", "number": n} for n, file in enumerate(FILES)]
    whole = datasets.Dataset.from_list(rows)
    chosen = whole.shuffle(seed=3).select(range(7))
    datasets.DatasetDict({"train": chosen, "test": whole}).save_to_disk(tmp_path / "d", num_shards={"train": 2})
    source = SourceConfig("dataset", str(tmp_path / "d"), caption_column="text")
    posts = posts_of(source)
    assert [post.extra["number"] for post in posts] == chosen["number"]
    assert [post.key for post in posts] == [f"d%2F{n}" for n in range(7)]
    for post in posts:
        assert read_bytes(post.image) == FILES[int(post.extra["number"])].read_bytes()
        assert post.caption == f"drawing {post.extra['number']}" and stat_image(post.image)[0] == 0
    assert len(posts_of(SourceConfig("dataset", str(tmp_path / "d"), split="test"))) == 12
    for more, said in (
        ({"split": "none"}, "has no split none, only train, test"),
        ({"image_column": "none"}, "has no column none, only picture, text, number"),
        ({"image_column": "text"}, "the column text of .* holds no images"),
        ({"caption_column": "none"}, "has no column none"),
    ):
        with pytest.raises(UserError, match=f"data.sources.0: .*{said}"):
            iterate(SourceConfig("dataset", str(tmp_path / "d"), **more))  # type: ignore[arg-type]


def test_a_folder_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_folder(tmp_path, monkeypatch)
    folder = tmp_path / "imagefolder"
    folder.mkdir()
    for file in FILES[:4]:
        shutil.copy(file, folder / file.name)
    lines = [{"file_name": file.name, "text": file.stem, "score": n} for n, file in enumerate(FILES[:4])]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    posts = posts_of(SourceConfig("dataset", str(folder), caption_column="text"))
    assert sorted(str(post.image.path) for post in posts) == sorted(str(folder / file.name) for file in FILES[:4])
    assert all(post.caption == post.image.path.stem for post in posts)
    with pytest.raises(UserError, match="name a whole split"):
        iterate(SourceConfig("dataset", str(folder), split="train[:2]"))


def test_rows_without_an_image_or_with_one_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = hub_folder(tmp_path, monkeypatch)
    inside = tmp_path / "d" / "a.png"
    cells = [(PNG, None), (None, "/etc/passwd"), (None, "a.png"), (None, str(inside)), None, (None, None), (b"", None)]
    images = [cell and {"bytes": cell[0], "path": cell[1]} for cell in cells]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "score": pa.array([1, 2, 3, 4, 5, 6, 7], pa.int64())})
    datasets.Dataset(table).save_to_disk(tmp_path / "d")
    shutil.copy(FILES[0], inside)
    items = iterate(SourceConfig("dataset", str(tmp_path / "d")))
    assert told(items) == [
        "d%2F0", "outside_folder", "outside_folder", "d%2F3", "image_missing", "image_missing", "d%2F6"]  # fmt: skip
    one, *_, last = (item for item in items if isinstance(item, Post))
    assert read_bytes(one.image) == PNG
    with pytest.raises(BadImage, match="empty"):
        read_bytes(last.image)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"data\.sources\.0: .*pip install .*datasets"):
        iterate(SourceConfig("dataset", str(tmp_path)))
    with pytest.raises(UserError, match=r"^data\.sources\.1"):
        iterate(SourceConfig("posts", str(DEMO / "posts.jsonl"), str(DEMO / "images")), SourceConfig("dataset", "a/b"))


# --- sd-scripts


def test_metadata_of_sd_scripts(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for name in ("a.png", "deep/b.png", "c.png", "c.webp", "d.e.png", "deep/c2.jpg", "x/y.png", "y.png"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FILES[0], images / name)
    entries: dict[str, Any] = {
        "a": {"caption": "a girl", "tags": "1girl, solo", "train_resolution": [512, 512]},
        str(images / "deep" / "b.png"): {"tags": "1girl, solo"},
        "c": {"caption": "x"},
        "c.webp": {"caption": "first line\nsecond", "tags": "t"},
        "d.e": {"caption": ""},
        "c2": {},
        "x/y": {"caption": "", "tags": "only"},
        "y": {"caption": "two of them"},
        "none": {"caption": "x"},
        "/etc/passwd": {"caption": "x"},
        "../secret": {"caption": "x"},
        "./a.png": {"caption": 5},
        "c.png": {"tags": ["1girl", "long hair"]},
        "deep/b": "text",
    }
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    items = iterate(SourceConfig("kohya", str(tmp_path / "meta.json"), str(images)))
    assert told(items) == [
        "a%2Epng", "deep%2Fb%2Epng", "image_ambiguous", "c%2Ewebp", "d%2Ee%2Epng", "deep%2Fc2%2Ejpg", "x%2Fy%2Epng",
        "y%2Epng", "image_missing", "outside_folder", "outside_folder", "bad_record", "c%2Epng", "bad_record",
    ]  # fmt: skip
    captions = [item.caption for item in items if isinstance(item, Post)]
    assert captions == ["a girl,1girl, solo", "1girl, solo", "first line", "", "", "only", "two of them",
                        "1girl, long hair"]  # fmt: skip
    assert items[0].origin == "meta.json: a" and all(item.stated_width is None for item in items[:1])


@pytest.mark.parametrize("text", ["[]", "{", "\udcff"])
def test_what_is_no_metadata_of_sd_scripts(tmp_path: Path, text: str) -> None:
    (tmp_path / "meta.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="is not a metadata file of sd-scripts"):
        iterate(SourceConfig("kohya", str(tmp_path / "meta.json"), str(tmp_path)))


# --- where images lie


def cell(path: Path, row: int, column: str) -> ImagePlace:
    return ImagePlace(path, row=row, column=column)


def test_places_that_are_gone(tmp_path: Path) -> None:
    tar, arrow, none = write_tar(tmp_path / "t.tar", ("a.png", PNG)), tmp_path / "t.arrow", tmp_path / "none"
    with (
        pa.OSFile(str(arrow), "wb") as sink,
        pa.ipc.new_stream(sink, pa.schema([("i", pa.binary())])) as w,
    ):
        w.write_table(pa.table({"i": [b"a", None]}))
    cases = [
        (ImagePlace(none), "missing"), (ImagePlace(tar / "x"), "missing"), (ImagePlace(Path("nul\0")), "unreadable"),
        (ImagePlace(tmp_path), "not_an_image"), (ImagePlace(none, 0, 5), "missing"),
        (ImagePlace(tar, 512, 10**9), "unreadable"), (ImagePlace(tar, 512, 2**40), "too_large"),
        (cell(none, 0, "i"), "missing"), (cell(tar, 0, "i"), "unreadable"), (cell(arrow, 2, "i"), "missing"),
        (cell(arrow, -1, "i"), "missing"), (cell(arrow, 0, "j"), "unreadable"), (cell(arrow, 1, "i"), "empty"),
    ]  # fmt: skip
    for place, reason in cases:
        with pytest.raises(BadImage) as caught:
            read_bytes(place)
        assert (caught.value.reason, bool(caught.value.detail)) == (reason, True), place
    assert read_bytes(cell(arrow, 0, "i")) == b"a"
    for gone in (ImagePlace(none), ImagePlace(none, 0, 5), cell(none, 0, "i")):
        with pytest.raises(BadImage, match="missing"):
            stat_image(gone)
    assert Image.open(io.BytesIO(PNG)).size == read_image_header(PNG)
