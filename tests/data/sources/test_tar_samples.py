"""Tars as people make them: formats and spellings as in folders, dotted names, and members that lie apart."""

import io
import tarfile
from pathlib import Path

import pytest
import webdataset

from support.paths import REPOSITORY
from trainer.config.schema import DataConfig, SourceConfig
from trainer.data.images import read_bytes
from trainer.data.post import Post
from trainer.data.sources import iterate_sources
from trainer.data.sources.records import Item, Reject, Remark
from trainer.data.sources.tars import split_name

PNG = (REPOSITORY / "demo" / "images" / "bee.png").read_bytes()


def items_of(path: Path, *members: tuple[str, bytes]) -> list[Item]:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return list(iterate_sources(DataConfig("shards", sources=[SourceConfig("tars", str(path))])))


def rejects(items: list[Item]) -> list[tuple[str, str]]:
    return [(item.reason, item.detail) for item in items if isinstance(item, Reject)]


@pytest.mark.parametrize("image", ["png", "jpg", "jpeg", "webp", "gif", "bmp", "avif", "tiff", "JFIF"])
@pytest.mark.parametrize("sidecar", ["txt", "caption", "tags", "{}.txt", "TXT"])
def test_the_formats_and_captions_of_folders(tmp_path: Path, image: str, sidecar: str) -> None:
    members = ((f"a.{image}", PNG), (f"a.{sidecar.format(image)}", b"1girl"))
    (post,) = items_of(tmp_path / "t.tar", *members)
    assert isinstance(post, Post) and (post.caption, read_bytes(post.image)) == ("1girl", PNG)


def test_a_post_named_after_the_whole_image(tmp_path: Path) -> None:
    (post,) = items_of(tmp_path / "t.tar", ("a.png.json", b'{"id": 5, "score": 3}'), ("a.png", PNG))
    assert isinstance(post, Post) and (post.key, post.score) == ("5", 3)


def test_what_of_a_tar_is_not_read_is_counted(tmp_path: Path) -> None:
    items = items_of(
        tmp_path / "t.tar",
        ("__MACOSX/._a.png", b"x"), ("sub/.cache/b.png", PNG), ("sub/.cache/b.txt", b"b"), ("README", b"x"),
        ("./a.png", PNG), ("./a.txt", b"a"), ("./a.tags", b"x"), ("./a.cls", b"1"), (".DS_Store", b"x"),
    )  # fmt: skip
    assert [item.key for item in items if isinstance(item, Post)] == ["t%2F%2E%2Fa"] and not rejects(items)
    assert sorted((item.kind, item.origin) for item in items if isinstance(item, Remark)) == [
        ("hidden or system file, not read", "t.tar: .DS_Store"),
        ("member of a hidden or system folder, not read", "t.tar: __MACOSX/._a.png"),
        ("member of a hidden or system folder, not read", "t.tar: sub/.cache/b.png"),
        ("member of a hidden or system folder, not read", "t.tar: sub/.cache/b.txt"),
        ("second sidecar of an image, not read: .tags", "t.tar: ./a.tags"),
        ("unread file: .cls", "t.tar: ./a.cls"), ("unread file: no extension", "t.tar: README"),
    ]  # fmt: skip


def test_dots_in_names_are_explained(tmp_path: Path) -> None:
    name = "235342 Track 2.0 (Clean)"
    items = items_of(tmp_path / "t.tar", (f"{name}.jpg", PNG), (f"{name}.txt", b"a"), ("v1.0/b.png", PNG),
                     ("v1.0/b.txt", b"b"))  # fmt: skip
    assert [item.caption for item in items if isinstance(item, Post)] == ["b"]  # a folder may have dots
    ((reason, detail),) = rejects(items)
    assert reason == "no_image" and "the key ends at the first dot of a name, here after '235342 Track 2'" in detail


def test_members_that_lie_apart_are_explained(tmp_path: Path) -> None:
    items = items_of(tmp_path / "t.tar", ("1.jpg", PNG), ("2.jpg", PNG), ("1.txt", b"a"), ("2.txt", b"b"),
                     ("3.png", PNG), ("4.txt", b"x"), ("5.png", PNG), ("5.txt", b"c"))  # fmt: skip
    assert [item.caption for item in items if isinstance(item, Post)] == ["c"]
    told = {item.origin: item.detail for item in items if isinstance(item, Reject)}
    assert len(rejects(items)) == 6
    for key in "12":
        assert "its members (jpg, txt) do not follow each other in the tar" in told[f"t.tar: {key}"]
    assert all("follow each other" not in told[f"t.tar: {key}"] for key in "34")


def test_an_image_that_needs_a_plug_in_says_so(tmp_path: Path) -> None:
    items = items_of(tmp_path / "t.tar", ("1.heic", PNG), ("1.txt", b"a"))
    assert "heic: pip install pillow-heif" in rejects(items)[0][1]


def test_a_folder_of_tars_counts_what_lies_beside_them(tmp_path: Path) -> None:
    items_of(tmp_path / "t.tar", ("1.png", PNG), ("1.txt", b"a"))
    (tmp_path / "t.idx").write_text("x")
    (tmp_path / ".cache").mkdir()
    items = list(iterate_sources(DataConfig("shards", sources=[SourceConfig("tars", str(tmp_path))])))
    kinds = [item.kind for item in items if isinstance(item, Remark)]
    assert kinds == ["unread file: .idx", "hidden or system folder, not entered"]


@pytest.mark.parametrize(
    "name",
    [
        "a.png",
        "sub/a.PNG",
        "v1.0/b.c.png",
        "./a.json",
        "a b/ü.cls.txt",
        "a.",
        "deep/er/001.seg.png",
        "README",
        ".hidden.png",
    ],
)
def test_keys_and_extensions_are_webdatasets(name: str) -> None:
    """An extension is lowered as webdataset does when it groups members."""
    their_key, their_extension = webdataset.tariterators.base_plus_ext(name)
    key, extension = split_name(name)
    assert key == their_key and (key is None or extension == their_extension.lower())


def test_samples_are_those_that_webdataset_reads(tmp_path: Path) -> None:
    captions = {f"{'deep/' * (n % 3)}{n:04d}": f"drawing {n}" for n in range(20)}
    with webdataset.TarWriter(str(tmp_path / "t.tar")) as writer:
        for key, caption in captions.items():
            writer.write({"__key__": key, "png": PNG, "txt": caption, "json": {"score": 3}})
    theirs = {
        sample["__key__"]: (sample["txt"].decode(), sample["png"])
        for sample in webdataset.WebDataset(str(tmp_path / "t.tar"), shardshuffle=False)
    }
    items = list(iterate_sources(DataConfig("shards", sources=[SourceConfig("tars", str(tmp_path / "t.tar"))])))
    posts = [item for item in items if isinstance(item, Post)]
    ours = {post.origin.removeprefix("t.tar: "): (post.caption, read_bytes(post.image)) for post in posts}
    assert len(posts) == len(items) and ours == theirs and {key: value[0] for key, value in ours.items()} == captions
