"""Folders and tars: what is read, under which spellings, and that nothing else passes without a word."""

import re
from collections import Counter
from pathlib import Path

import pytest

from support.paths import REPOSITORY
from trainer.config.schema import DataConfig, SourceConfig
from trainer.core.errors import UserError
from trainer.data.post import Post
from trainer.data.sources import iterate_sources
from trainer.data.sources.folders import Walk
from trainer.data.sources.records import REASONS, Item, Reject, Remark, explain_reason

PNG = (REPOSITORY / "demo" / "images" / "bee.png").read_bytes()


def items_of(**source: object) -> list[Item]:
    return list(iterate_sources(DataConfig("shards", sources=[SourceConfig(**source)])))  # type: ignore[arg-type]


def folder_of(path: Path, *names: str, **contents: str | bytes) -> Path:
    """Images of these names, and other files with their contents."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(PNG)
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def remarks(items: list[Item]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for item in items:
        if isinstance(item, Remark):
            counts[item.kind] += item.count
    return dict(counts)


def captions(items: list[Item]) -> dict[str, str | None]:
    return {item.key: item.caption for item in items if isinstance(item, Post)}


def rejects(items: list[Item]) -> dict[str, str]:
    return {item.origin: f"{item.reason}: {item.detail}" for item in items if isinstance(item, Reject)}


def test_what_no_one_reads_is_counted_by_kind(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.png", "alone.png", ".hidden.png", "b.jfif", "c.AVIF", "d.tif", **{
        "a.txt": "1girl", "b.txt": "b", "c.txt": "c", "d.txt": "d", "e.jxl": "x", "e.txt": "e", "f.HEIC": "x",
        "info.json": "{}", "film.mp4": "x", "other.mp4": "x", "README": "x", "Thumbs.db": "x", "metadata.jsonl": "x",
    })  # fmt: skip
    items = items_of(kind="folder", path=str(folder))
    assert captions(items) == {"a%2Epng": "1girl", "b%2Ejfif": "b", "c%2EAVIF": "c", "d%2Etif": "d"}
    assert list(rejects(items)) == ["alone.png"]
    assert remarks(items) == {
        "unread file: .mp4": 2, "unread file: .jxl": 1, "unread file: .heic": 1, "unread file: .jsonl": 1,
        "unread file: no extension": 1, "caption without an image: .txt": 1, "post without an image: .json": 1,
        "hidden or system file, not read": 2,
    }  # fmt: skip
    details = {item.origin: item.detail for item in items if isinstance(item, Remark)}
    assert "pip install pillow-heif" in details["f.HEIC"] and "pip install pillow-jxl-plugin" in details["e.jxl"]


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".Trash-1000", "@eaDir", "__MACOSX", "__pycache__", "#recycle"])
def test_hidden_and_system_folders_are_never_entered(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / ".mine", "a.png", f"{name}/b.png", f"sub/{name}/deep/c.png", **{"a.txt": "a"})
    items = items_of(kind="folder", path=str(folder))
    assert list(captions(items)) == ["a%2Epng"] and not rejects(items)  # the source's own folder may be hidden
    assert remarks(items) == {"hidden or system folder, not entered": 2}
    posts = folder_of(tmp_path, **{"posts.jsonl": '{"id": "b"}'}) / "posts.jsonl"
    found = items_of(kind="posts", path=str(posts), images=str(folder))
    assert [item.reason for item in found if isinstance(item, Reject)] == ["image_missing"]


def test_a_folder_that_holds_no_image_says_what_there_is(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "@eaDir/a.png", **{"a.mp4": "x", "b.mp4": "x"})
    with pytest.raises(UserError, match=r"2 unread file: \.mp4, 1 hidden or system folder, not entered"):
        items_of(kind="folder", path=str(folder))


def test_files_around_the_images_of_posts_are_counted(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "images", "1.png", ".git/2.png", **{"1.json": "{}", "2.json": "{}", ".x": "", "a.mp4": ""}
    )
    posts = folder_of(tmp_path, **{"posts.jsonl": '{"id": 1}\n'}) / "posts.jsonl"
    items = items_of(kind="posts", path=str(posts), images=str(folder), name="mine")
    assert remarks(items) == {
        "hidden or system folder, not entered": 1, "hidden or system file, not read": 1,
        "unread file: .json": 2, "unread file: .mp4": 1,
    }  # fmt: skip
    assert {item.source for item in items if isinstance(item, Remark)} == {"mine"}


def test_every_reason_is_said_in_words() -> None:
    """Wherever the package sets an input aside."""
    code = "".join(path.read_text() for path in (REPOSITORY / "trainer").rglob("*.py"))
    used = set(re.findall(r'(?:BadRecord|BadImage)\("([a-z_]+)"', code))
    used |= set(re.findall(r'Reject\([^()]*(?:\[[^]]*\])?[^()]*, "([a-z_]+)"', code)) | {"bad_tar", "refused_member"}
    assert len(used) > 15 and used <= set(REASONS) and explain_reason("of_old") == "of_old"


def test_a_posts_file_beside_its_images_is_not_called_unread(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "1.png", **{"posts.jsonl": '{"id": 1}\n', "other.jsonl": ""})
    items = items_of(kind="posts", path=str(folder / "posts.jsonl"), images=str(folder))
    assert remarks(items) == {"unread file: .jsonl": 1}


def test_links_of_a_folder_of_images_are_followed_for_posts(tmp_path: Path) -> None:
    folder_of(tmp_path / "elsewhere", "1.png", "2.png")
    folder = folder_of(tmp_path / "images")
    folder.mkdir()
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "3.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    posts = folder_of(tmp_path, **{"posts.jsonl": '{"id": 1}\n{"file": "more/2.png"}\n{"id": 3}\n'}) / "posts.jsonl"
    source = {"kind": "posts", "path": str(posts), "images": str(folder)}
    assert sorted(rejects(items_of(**source)).values())[0].startswith("image_missing")
    assert len(captions(items_of(**source, follow_links=True))) == 3


def linked(tmp_path: Path) -> Path:
    """A folder with links to a folder and a file elsewhere, to itself, to a folder in it and to the one above it."""
    folder_of(tmp_path / "elsewhere", "b.png", "sub/c.png", **{"b.txt": "b", "sub/c.txt": "c"})
    folder = folder_of(tmp_path / "mine", "a.png", "zoo/d.png", **{"a.txt": "a", "zoo/d.txt": "d"})
    (folder / "more").symlink_to("../elsewhere")
    (folder / "again").symlink_to(tmp_path / "elsewhere" / "sub")
    (folder / "loop").symlink_to(".")
    (folder / "inner").symlink_to("zoo")
    (folder / "up").symlink_to("..")
    (folder / "nowhere").symlink_to("nothing")
    (folder / "e.png").symlink_to("../elsewhere/b.png")
    (folder / "e.txt").symlink_to("../elsewhere/b.txt")
    return folder


def test_linked_folders_are_named_and_not_entered(tmp_path: Path) -> None:
    items = items_of(kind="folder", path=str(linked(tmp_path)))
    assert list(captions(items)) == ["a%2Epng", "zoo%2Fd%2Epng"]
    assert remarks(items) == {"linked folder, not entered": 5, "unread file: no extension": 1}
    assert all("follow_links" in item.detail for item in items if isinstance(item, Remark) and "linked" in item.kind)
    assert rejects(items)["e.png"].startswith("outside_folder") and "follow_links" in rejects(items)["e.png"]


def test_links_are_followed_and_no_folder_is_entered_twice(tmp_path: Path) -> None:
    folder = linked(tmp_path)
    items = items_of(kind="folder", path=str(folder), follow_links=True)
    told = {"a": "a", "zoo%2Fd": "d", "e": "b", "again%2Fc": "c", "more%2Fb": "b"}
    assert captions(items) == {f"{key}%2Epng": caption for key, caption in told.items()}
    # loop and inner lie in the folder; what more and up lead to is there already
    assert remarks(items)["linked folder, not entered"] == len({"loop", "inner", "more/sub", "up/elsewhere", "up/mine"})
    assert [found.name for found in Walk(folder).files() if "/" in found.name] == ["zoo/d.png", "zoo/d.txt"]


def test_a_link_to_a_system_folder_is_not_followed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "mine", "a.png", **{"a.txt": "a"})
    folder_of(tmp_path / "elsewhere", "b.png")
    (folder / "@eaDir").symlink_to(tmp_path / "elsewhere")
    items = items_of(kind="folder", path=str(folder), follow_links=True)
    assert len(captions(items)) == 1 and remarks(items) == {"hidden or system folder, not entered": 1}


@pytest.mark.parametrize("name", ["a.txt", "a.caption", "a.png.txt", "a.TXT", "a.tags", "a.png.caption", "a.Tags"])
def test_spellings_of_a_caption(tmp_path: Path, name: str) -> None:
    items = items_of(kind="folder", path=str(folder_of(tmp_path, "a.png", **{name: "1girl"})))
    assert captions(items) == {"a%2Epng": "1girl"} and not remarks(items)


@pytest.mark.parametrize("name", ["a.json", "a.png.json", "a.JSON"])
def test_spellings_of_a_post(tmp_path: Path, name: str) -> None:
    items = items_of(kind="folder", path=str(folder_of(tmp_path, "a.png", **{name: '{"score": 3}'})))
    assert [item.score for item in items if isinstance(item, Post)] == [3] and not remarks(items)


def test_a_second_sidecar_is_counted_and_two_equal_ones_are_no_guess(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.png", "b.png", "c.png", **{
        "a.txt": "wins", "a.tags": "x", "a.png.txt": "x", "a.png.json": "{}", "a.json": "{}",
        "b.png.txt": "x", "b.tags": "x", "c.txt": "x", "c.caption": "x",
    })  # fmt: skip
    items = items_of(kind="folder", path=str(folder))
    assert captions(items) == {"a%2Epng": "wins"}
    assert remarks(items) == {
        "second sidecar of an image, not read: .tags": 1, "second sidecar of an image, not read: .txt": 1,
        "second sidecar of an image, not read: .json": 1,
    }  # fmt: skip
    told = rejects(items)
    assert "b.tags, b.png.txt" in told["b.png"] and "c.txt, c.caption" in told["c.png"]


@pytest.mark.parametrize(
    ("content", "said"),
    [("1girl, café".encode("latin-1"), "in another encoding"), ("初音".encode("cp932"), "in another encoding"),
     ("1girl".encode("utf-16"), "UTF-16")],
)  # fmt: skip
def test_details_name_the_sidecar(tmp_path: Path, content: bytes, said: str) -> None:
    folder = folder_of(tmp_path, "a.png", "b.png", "c.png", **{
        "a.png.txt": content, "b.json": "{", "c.png.json": '{"rating": 5}'})  # fmt: skip
    told = rejects(items_of(kind="folder", path=str(folder)))
    assert told["a.png"].startswith(f"bad_record: a.png.txt is not UTF-8 but {said}")
    assert told["b.png"].startswith("bad_json: b.json: ")


def test_a_folder_of_many_levels_keeps_each_sidecar_with_its_own(tmp_path: Path) -> None:
    names = ["a.png", "b/a.png", "b/c/a.png", "b/d.png", "e.png"]
    folder = folder_of(tmp_path, *names, **{name.replace(".png", ".txt"): name for name in names})
    items = items_of(kind="folder", path=str(folder))
    assert list(captions(items).values()) == sorted(names) and not remarks(items)
