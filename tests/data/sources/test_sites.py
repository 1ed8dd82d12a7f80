"""Posts of other sites as gallery-dl writes them, one record of real shape each, and two sites beside each other."""

import io
import json
import tarfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from trainer.config.schema import DataConfig, SourceConfig
from trainer.data.post import Post, encode_key
from trainer.data.sites import find_site, image_stems, read_rating
from trainer.data.sources import iterate_sources
from trainer.data.sources.records import Reject, Remark

MD5 = "0123456789abcdef" * 2


def gallery_dl(category: str, **fields: Any) -> dict[str, Any]:
    return {"category": category, "subcategory": "post", "extension": "png", "filename": MD5, "md5": MD5} | fields


def gelbooru_kind(category: str, **fields: Any) -> dict[str, Any]:
    """A site of gelbooru's software: everything is text."""
    return gallery_dl(
        category, tags=" 1girl smile hatsune_miku ", id="863", width="64", height="64", score="5", source="",
        parent_id="", created_at="Sat Nov 04 00:46:07 +0000 2023", date="2023-11-04 00:46:07", **fields,
    )  # fmt: skip


CATEGORIES = {"tags_general": "1girl smile", "tags_character": "hatsune_miku", "tags_copyright": "vocaloid",
              "tags_artist": "someone"}  # fmt: skip
RECORDS: dict[str, dict[str, Any]] = {
    "danbooru": gallery_dl(
        "danbooru", id=1001, created_at="2008-08-12T00:46:05.385-04:00", date="2008-08-12 04:46:05", rating="s",
        score=4, image_width=64, image_height=64, media_asset={"id": 5, "created_at": "2008-08-12T00:46:05.385-04:00"},
        tag_string="1girl smile hatsune_miku vocaloid someone highres", tags=["1girl", "smile", "hatsune_miku"],
        **{name: value.split() for name, value in CATEGORIES.items()}, tags_meta=["highres"],
        **{f"tag_string_{name[5:]}": value for name, value in CATEGORIES.items()}, tag_string_meta="highres",
    ),
    "gelbooru": gallery_dl(
        "gelbooru", id=6018318, created_at="Sat Apr 17 11:59:39 -0500 2021", date="2021-04-17 16:59:39", score=9,
        width=64, height=64, rating="sensitive", tags="1girl smile hatsune_miku vocaloid someone highres",
        tags_metadata="highres", title="", has_notes="false", **CATEGORIES,
    ),
    "e621": gallery_dl(
        "e621", id=535, created_at="2007-02-17T14:02:32.000-05:00", rating="s",
        score={"up": 30, "down": -2, "total": 28},
        file={"width": 64, "height": 64, "ext": "png", "size": 100, "md5": MD5, "url": "https://x.invalid/a.png"},
        tags={"general": ["smile"], "artist": ["someone"], "contributor": [], "copyright": ["nintendo"],
              "character": ["fox_mccloud"], "species": ["canid", "fox"], "invalid": [], "meta": ["hi_res"], "lore": []},
        description="", fav_count=3, flags={"pending": False}, duration=None,
    ),
    "yandere": gallery_dl(
        "yandere", id=51824, created_at=1220000000, date="2008-08-29 08:53:20", rating="s", score=12, width=64,
        height=64, tags="1girl smile hatsune_miku", tags_circle="foo", tags_copyright="vocaloid",
        tags_general="1girl smile", filename="yande.re 51824",
    ),
    "rule34": gelbooru_kind("rule34", rating="questionable"),
    "safebooru": gelbooru_kind("safebooru", rating="safe"),
    "pixiv": gallery_dl(
        "pixiv", id=966412, title="x", caption="<a href='x'>look</a> new work!<br />", user={"id": 11, "name": "n"},
        tags=["オリジナル", "女の子", "hatsune miku"], create_date="2008-06-13T00:29:13+09:00", page_count=1, width=64,
        height=64, x_restrict=0, total_bookmarks=5, rating="General", num=0, date="2008-06-12 15:29:13",
        filename="966412_p0", suffix="", subcategory="work",
    ),
}  # fmt: skip
WANT: dict[str, dict[str, Any]] = {
    "danbooru": {"key": "1001", "year": 2008, "score": 4, "rating": "s", "general": "1girl smile", "artist": "someone",
                 "character": "hatsune_miku", "copyright": "vocaloid", "meta": "highres"},
    "gelbooru": {"key": "6018318", "year": 2021, "score": 9, "rating": "s", "general": "1girl smile", "meta": "highres",
                 "character": "hatsune_miku", "copyright": "vocaloid", "artist": "someone"},
    "e621": {"key": "535", "year": 2007, "score": 28, "rating": "g", "general": "smile canid fox", "artist": "someone",
             "copyright": "nintendo", "character": "fox_mccloud", "meta": "hi_res"},
    "yandere": {"key": "51824", "year": 2008, "score": 12, "rating": "g", "general": "1girl smile",
                "copyright": "vocaloid", "artist": "foo"},
    "rule34": {"key": "863", "year": 2023, "score": 5, "rating": "q", "general": " 1girl smile hatsune_miku "},
    "safebooru": {"key": "863", "year": 2023, "score": 5, "rating": "g", "general": " 1girl smile hatsune_miku "},
    "pixiv": {"key": "966412", "year": 2008, "score": 5, "rating": "g", "general": "オリジナル 女の子 hatsune_miku"},
}  # fmt: skip
NOTES = {"pixiv": ["HTML, which is no caption", "total_bookmarks taken as score"]}


def put(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64)).save(path)
    return path.read_bytes()


def read(*sources: SourceConfig) -> list[Any]:
    """Posts and rejects of some sources."""
    items = iterate_sources(DataConfig("shards", sources=list(sources)))
    return [item for item in items if not isinstance(item, Remark)]


def posts_of(*sources: SourceConfig) -> list[Post]:
    items = read(*sources)
    assert all(isinstance(item, Post) for item in items), items
    return items


def describe(post: Post) -> dict[str, Any]:
    tags = {name: getattr(post, f"tags_{name}") for name in ("general", "character", "copyright", "artist", "meta")}
    told = {"key": post.key, "year": post.year, "score": post.score, "rating": post.rating}
    return told | {name: value for name, value in tags.items() if value}


@pytest.mark.parametrize("site", RECORDS)
def test_each_site_in_each_kind_of_source(tmp_path: Path, site: str) -> None:
    record = RECORDS[site]
    name = "966412_p0.png" if site == "pixiv" else f"{record['id']}.png"
    content, text = put(tmp_path / "images" / name), json.dumps(record)
    (tmp_path / "images" / f"{name}.json").write_text(text)
    (tmp_path / "a.jsonl").write_text(text + "\n")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for extension, data in (("png", content), ("json", text.encode())):
            info = tarfile.TarInfo(f"a.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    posts = posts_of(
        SourceConfig("folder", str(tmp_path / "images")),
        SourceConfig("posts", str(tmp_path / "a.jsonl"), str(tmp_path / "images")),
        SourceConfig("tars", str(tmp_path / "a.tar")),
    )
    assert len(posts) == 3
    for post in posts:
        assert describe(post) == WANT[site] and post.caption is None
        assert (post.stated_width, post.stated_height) == (64, 64)
        assert [note.kind for note in post.notes] == NOTES.get(site, [])


@pytest.mark.parametrize(
    ("category", "rating", "letter"),
    [
        ("danbooru", "general", "g"), ("danbooru", "s", "s"), ("danbooru", "g", "g"), (None, "s", "s"),
        (None, "safe", "g"), (None, "Explicit", "e"), (None, "QUESTIONABLE", "q"), (None, "", None),
        ("gelbooru", "s", "s"), ("e621", "s", "g"), ("konachan", "s", "g"), ("safebooru", "s", "g"), ("e926", "q", "q"),
        ("sankaku", "s", "g"), ("pixiv", "R-18", "e"), ("pixiv", "R-18G", "e"), ("rule34", "explicit", "e"),
    ],
)  # fmt: skip
def test_ratings(category: str | None, rating: str, letter: str | None) -> None:
    assert read_rating({"category": category, "rating": rating}) == letter


def test_e621_s_own_answer_says_by_its_shape_what_it_is(tmp_path: Path) -> None:
    own = {name: value for name, value in RECORDS["e621"].items() if name not in ("category", "subcategory")}
    assert read_rating(own) == "g" and find_site(own) == find_site(RECORDS["e621"])


def test_several_files_of_one_post(tmp_path: Path) -> None:
    records = [
        RECORDS["pixiv"] | {"page_count": 2, "num": number, "filename": f"966412_p{number}"} for number in range(2)
    ]
    for record in records:
        put(tmp_path / "images" / f"{record['filename']}.png")
        (tmp_path / "images" / f"{record['filename']}.png.json").write_text(json.dumps(record))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for source in (
        SourceConfig("folder", str(tmp_path / "images")),
        SourceConfig("posts", str(tmp_path / "a.jsonl"), str(tmp_path / "images")),
    ):
        posts = posts_of(source)
        assert [post.key for post in posts] == ["966412_p0%2Epng", "966412_p1%2Epng"]
        assert [post.image.path.name for post in posts] == ["966412_p0.png", "966412_p1.png"]
    # a site of which we know nothing but what gallery-dl calls everything; a pool's count is no post's
    assert image_stems(gallery_dl("fanbox", id=7, count=3, num=2, filename="x")) == ["x"]
    assert image_stems(gallery_dl("danbooru", id=7, count=3, num=2, filename="x")) == ["7", "x"]
    assert image_stems(gallery_dl("fanbox", id=7, count="many", filename="x")) == ["7", "x"]


@pytest.mark.parametrize(
    ("category", "caption", "kind"),
    [
        ("pixiv", "thank you for 100 followers", "uploader's text, which is no caption"),
        ("tumblr", "thank you", "uploader's text, which is no caption"),
        ("danbooru", "<p>words</p>", "HTML, which is no caption"),
        (None, 'see <a href="x">my shop</a>', "HTML, which is no caption"),
        (None, "words<br/>words", "HTML, which is no caption"),
        ("danbooru", "1girl, solo", None),
        (None, "1girl, <3, >_<, <|>_<|>, a < b > c, <lora:x:1>", None),
    ],
)
def test_descriptions_are_no_captions(tmp_path: Path, category: str | None, caption: str, kind: str | None) -> None:
    record = {
        "id": 1,
        "caption": caption,
        "tags": ["a"],
        **({"category": category, "subcategory": "x"} if category else {}),
    }
    put(tmp_path / "1.png")
    (tmp_path / "1.json").write_text(json.dumps(record))
    (post,) = posts_of(SourceConfig("folder", str(tmp_path)))
    assert [note.kind for note in post.notes] == ([kind] if kind else [])
    assert post.caption == (None if kind else caption) and post.tags_general == "a"


def test_a_rating_that_is_a_number_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "1.png")
    (tmp_path / "1.json").write_text('{"id": 1, "rating": 0}')
    (item,) = read(SourceConfig("folder", str(tmp_path)))
    assert isinstance(item, Reject) and "rating must be text" in item.detail and "not 0" in item.detail


def test_numbers_as_pandas_writes_them(tmp_path: Path) -> None:
    """A column of whole numbers in which one is missing becomes one of floats with NaN."""
    nan = float("nan")
    put(tmp_path / "images" / "1.png")
    rows = {"id": [1.0, 2.0, nan], "file": ["1.png"] * 3, "score": [5.0, nan, 1.0], "aesthetic": [nan, 1.0, 2.5],
            "created_at": [1650000000, 1650000000000, None], "image_width": [Decimal(600)] * 3}  # fmt: skip
    pq.write_table(pa.table(rows), tmp_path / "p.parquet")
    posts = posts_of(SourceConfig("posts", str(tmp_path / "p.parquet"), str(tmp_path / "images")))
    assert [post.key for post in posts[:2]] == ["1", "2"] and posts[2].key == encode_key("1.png")
    assert [(post.score, post.year, post.stated_width) for post in posts] == [
        (5, 2022, 600), (None, 2022, 600), (1, None, 600)]  # fmt: skip
    assert [post.extra.get("aesthetic") for post in posts] == [None, 1.0, 2.5]
    assert not any(post.notes for post in posts)
