"""Posts files and folders with sidecars: what is found, in which order, and what is set aside instead of raised."""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.config.schema import Config, DataConfig
from trainer.core.errors import UserError
from trainer.data.index import open_index, read_raw_latents
from trainer.data.post import Post
from trainer.data.sources import iterate_sources
from trainer.data.sources.records import Reject, Remark
from trainer.prepare.prepare import prepare
from trainer.report.examples import draw_original, find_images


def iterate_posts(posts: list[str] | None, images: str | None) -> list[Post | Reject]:
    """The short form of sources: data.posts and data.images."""
    items = iterate_sources(DataConfig("shards", posts=posts, images=images))
    return [item for item in items if not isinstance(item, Remark)]


def put_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path.with_suffix(".png.tmp"), format="png")
    return path.with_suffix(".png.tmp").rename(path)


def read_lines(folder: Path, *lines: object) -> list[Post | Reject]:
    """The posts of one JSONL file beside the folder of images."""
    images = folder / "images"
    images.mkdir(exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "posts.jsonl").write_text(text, encoding="utf-8")
    return iterate_posts([str(folder / "posts.jsonl")], str(images))


def reasons(items: list[Post | Reject]) -> list[str | None]:
    return [item.reason if isinstance(item, Reject) else None for item in items]


def test_images_by_id_and_by_file(tmp_path: Path) -> None:
    images = tmp_path / "images"
    by_id = put_image(images / "12.jpeg")
    gallery = put_image(images / "deep" / f"danbooru_34_{'a' * 32}.PNG")
    named = put_image(images / "sub" / "ünïcode 名前.webp")
    one, two, three, four = read_lines(
        tmp_path, {"id": 12}, {"id": "34"}, {"id": 56, "file": "sub/ünïcode 名前.webp"}, {"file": "12.jpeg"}
    )
    assert isinstance(one, Post) and (one.key, one.image.path) == ("12", by_id)
    assert isinstance(two, Post) and (two.key, two.image.path) == ("34", gallery)
    assert isinstance(three, Post) and (three.key, three.image.path) == ("56", named)
    assert isinstance(four, Post) and four.key == "12%2Ejpeg"
    assert one.source == "posts.jsonl" and four.origin == "posts.jsonl line 4"


def test_the_order_is_the_files(tmp_path: Path) -> None:
    for number in (3, 1, 2):
        put_image(tmp_path / "images" / f"{number}.png")
    assert [post.key for post in read_lines(tmp_path, {"id": 3}, "", {"id": 1}, "  ", {"id": 2})] == ["3", "1", "2"]


def test_broken_lines_are_set_aside_and_the_rest_goes_on(tmp_path: Path) -> None:
    put_image(tmp_path / "images" / "1.png")
    put_image(tmp_path / "images" / "2.png")
    put_image(tmp_path / "images" / "2.jpg")
    items = read_lines(
        tmp_path,
        "{not json",
        "[1, 2]",
        '{"id": 1, "score": NaN}',
        "[" * 100_000,
        {"id": 1, "rating": "many"},
        {"id": 7},
        {"score": 3},
        {"id": 2},
        {"id": 1, "file": 5},
        {"id": 1},
    )
    assert reasons(items) == [
        "bad_json", "bad_record", None, "bad_json", "bad_record", "image_missing", "bad_record",
        "image_ambiguous", "bad_record", None,
    ]  # fmt: skip
    assert [item.key for item in items] == [None, None, "1", None, "1", "7", None, "2", "1", "1"]
    assert [item.origin for item in items] == [f"posts.jsonl line {number}" for number in range(1, 11)]


@pytest.mark.parametrize("file", ["../secret.png", "sub/../../secret.png", "/etc/passwd", "link.png", "way/secret.png"])
def test_paths_that_lead_out_are_set_aside(tmp_path: Path, file: str) -> None:
    put_image(tmp_path / "secret.png")
    put_image(tmp_path / "images" / "sub" / "a.png")
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "images" / "way").symlink_to(tmp_path)
    assert reasons(read_lines(tmp_path, {"id": 1, "file": file})) == ["outside_folder"]


def test_a_link_by_id_that_leads_out_is_set_aside(tmp_path: Path) -> None:
    put_image(tmp_path / "secret.png")
    inside = put_image(tmp_path / "images" / "1.png")
    (tmp_path / "images" / "2.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "images" / "3.png").symlink_to(inside)
    assert reasons(read_lines(tmp_path, {"id": 1}, {"id": 2}, {"id": 3})) == [None, "outside_folder", None]


@pytest.mark.parametrize("file", ["none.png", "nul\0.png", "half\ud800.png", "x" * 5000 + ".png", "a" + "/b" * 3000])
def test_paths_that_cannot_be(tmp_path: Path, file: str) -> None:
    assert reasons(read_lines(tmp_path, {"id": 1, "file": file})) in (["image_missing"], ["outside_folder"])


def test_a_folder_with_sidecars(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    for name in ("b.png", "a.png", "sub/c.jpg", "danbooru_9_ff.png", "d.png", "e.png", "f.png"):
        put_image(folder / name)
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "a.txt").write_text("a finished caption ||| tag\n", encoding="utf-8-sig")
    (folder / "b.json").write_text(json.dumps({"id": 5, "tag_string_general": "x y"}))
    (folder / "sub" / "c.txt").write_text("wins")
    (folder / "sub" / "c.jpg.json").write_text(json.dumps({"score": 7, "tags_general": ["z"]}))
    (folder / "danbooru_9_ff.png.json").write_text(json.dumps({"id": 9, "rating": "sensitive"}))
    (folder / "e.txt").write_bytes(b"\xff\xfe broken")
    (folder / "f.json").write_text("{")
    items = iterate_posts(None, str(folder))
    assert [item.origin for item in items] == [
        "a.png", "b.png", "d.png", "danbooru_9_ff.png", "e.png", "f.png", "sub/c.jpg"]  # fmt: skip
    assert reasons(items) == [None, None, "no_sidecar", None, "bad_record", "bad_json", None]
    a, b, d, gallery, _, _, c = items
    assert isinstance(a, Post) and (a.key, a.caption, a.source) == ("a%2Epng", "a finished caption ||| tag", "mine")
    assert isinstance(b, Post) and (b.key, b.caption, b.tags_general) == ("5", None, "x y")
    assert isinstance(gallery, Post) and (gallery.key, gallery.rating) == ("9", "s")
    assert isinstance(c, Post) and (c.key, c.caption, c.score) == ("sub%2Fc%2Ejpg", "wins", 7)
    assert d.key == "d%2Epng"


def test_a_sidecar_link_that_leads_out_is_set_aside(tmp_path: Path) -> None:
    put_image(tmp_path / "images" / "a.png")
    (tmp_path / "secret").write_text("password")
    (tmp_path / "images" / "a.txt").symlink_to(tmp_path / "secret")
    assert reasons(iterate_posts(None, str(tmp_path / "images"))) == ["outside_folder"]


def test_a_name_that_is_not_unicode(tmp_path: Path) -> None:
    put_image(tmp_path / os.fsdecode(b"bad\xff.png"))
    (tmp_path / os.fsdecode(b"bad\xff.txt")).write_text("a caption")
    (post,) = iterate_posts(None, str(tmp_path))
    assert isinstance(post, Post) and (post.key, post.origin) == ("bad%FF%2Epng", "bad\\xff.png")


def test_what_cannot_be_read_at_all_is_the_users(tmp_path: Path) -> None:
    for posts, images, said in (
        (None, None, "data.images is not set"),
        (None, str(tmp_path / "none"), "is not a folder"),
        ([str(tmp_path / "none.jsonl")], str(tmp_path), "cannot be read"),
        (None, str(tmp_path), "holds no images"),
    ):
        with pytest.raises(UserError, match=said):
            iterate_posts(posts, images)


def test_a_set_of_mixed_sources(make_config: Callable[..., Config], tmp_path: Path) -> None:
    plain = make_config()
    images, (posts,) = Path(plain.data.images or ""), plain.data.posts or []
    lines = [json.loads(line) for line in Path(posts).read_text().splitlines()]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:8]))
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        for line in lines[8:16]:
            (tmp_path / "post.json").write_text(json.dumps(line))
            tar.add(tmp_path / "post.json", f"{line['id']}.json")
            tar.add(images / line["file"], f"{line['id']}.png")
    meta = {
        Path(line["file"]).stem: {"caption": "a drawing", "tags": line["tag_string_general"]} for line in lines[16:]
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    sources = (
        f"[{{kind: posts, path: {tmp_path / 'some.jsonl'}, images: {images}}}, {{kind: tars, path: "
        f"{tmp_path / 'more.tar'}, name: more}}, {{kind: kohya, path: {tmp_path / 'meta.json'}, images: {images}}}]"
    )
    words = ["data.posts=null", "data.images=null", f"data.sources={sources}", f"data.shards={tmp_path / 'shards'}"]
    config = make_config(*words)
    assert prepare(config).samples == 24
    index, before = open_index(tmp_path / "shards"), open_index(plain.data.shards)
    rows = [index.row(number) for number in range(24)]
    assert Counter(row["source"] for row in rows) == {"some.jsonl": 8, "more": 8, "meta.json": 8}
    # the same images give the same latents, wherever they lie
    latents = {before.row(number)["content_hash"]: read_raw_latents(before, number) for number in range(24)}
    assert all(np.array_equal(read_raw_latents(index, n), latents[row["content_hash"]]) for n, row in enumerate(rows))
    found, _ = find_images(config, {row["key"] for row in rows})
    assert all(draw_original(found[row["key"]], row)[0] for row in rows)
