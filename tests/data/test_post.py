"""One record: Danbooru's spelling, gallery-dl's, and everything that must be set aside rather than repaired."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.post import ImagePlace, Post, encode_key, read_post

DANBOORU = {
    "id": 123456,
    "created_at": "2022-03-04T05:06:07.890-05:00",
    "score": 151,
    "rating": "g",
    "image_width": 1000,
    "image_height": 1500,
    "file_ext": "jpg",
    "md5": "d" * 32,
    "file_url": "https://example.invalid/original.jpg",
    "media_asset": {"created_at": "2019-12-31T23:59:59.000-05:00", "id": 1},
    "tag_string": "1girl solo ^_^ hatsune_miku vocaloid someone highres",
    "tag_string_general": "1girl solo ^_^",
    "tag_string_character": "hatsune_miku",
    "tag_string_copyright": "vocaloid",
    "tag_string_artist": "someone",
    "tag_string_meta": "highres",
}
GALLERY_DL = {
    **{name: value for name, value in DANBOORU.items() if not name.startswith("tag_string")},
    "rating": "general",
    "tags": ["1girl", "solo", "^_^", "hatsune_miku", "vocaloid", "someone", "highres"],
    "tags_general": ["1girl", "solo", "^_^"],
    "tags_character": ["hatsune_miku"],
    "tags_copyright": ["vocaloid"],
    "tags_artist": "someone",
    "tags_meta": ["highres"],
}


def read(record: object, **more: str) -> Post:
    return read_post(record, source="posts.jsonl", image=ImagePlace(Path("a.png")), **more)


@pytest.mark.parametrize("record", [DANBOORU, GALLERY_DL])
def test_both_spellings_give_the_same_post(record: dict) -> None:
    post = read(record)
    assert (post.key, post.source, post.caption) == ("123456", "posts.jsonl", None)
    assert (post.rating, post.score, post.year) == ("g", 151, 2019)
    assert (post.tags_general, post.tags_character) == ("1girl solo ^_^", "hatsune_miku")
    assert (post.tags_copyright, post.tags_artist, post.tags_meta) == ("vocaloid", "someone", "highres")
    assert (post.stated_width, post.stated_height) == (1000, 1500)
    assert post.extra == {
        "created_at": "2022-03-04T05:06:07.890-05:00", "file_ext": "jpg", "id": 123456, "md5": "d" * 32}  # fmt: skip


def test_what_is_missing_is_none() -> None:
    post = read({"id": 1})
    assert (post.rating, post.score, post.year, post.stated_width, post.tags_general, post.extra) == (
        None, None, None, None, None, {"id": 1})  # fmt: skip
    assert read({"id": 1, "rating": None, "score": None, "media_asset": None}).rating is None


@pytest.mark.parametrize(
    ("dates", "year"),
    [
        ({"created_at": "2013-05-06"}, 2013),
        ({"created_at": "2005-05-24 03:35:31 UTC"}, 2005),
        ({"created_at": "2021-01-01T00:00:00Z", "media_asset": {}}, 2021),
        ({"created_at": "2021-01-01T00:00:00Z", "media_asset": {"created_at": "soon"}}, 2021),
        ({"created_at": "the year 2021"}, None),
        ({"created_at": "the year 2021", "date": "2008-06-12 15:29:13"}, 2008),  # gallery-dl's own
        ({"create_date": "2008-06-13T00:29:13+09:00"}, 2008),  # pixiv's
    ],
)
def test_year(dates: dict, year: int | None) -> None:
    assert read({"id": 1, **dates}).year == year


def test_uncategorised_tags_count_as_general() -> None:
    assert read({"id": 1, "tags": ["a", "b_c"]}).tags_general == "a b_c"
    assert read({"id": 1, "tag_string": "a b_c", "tag_string_artist": "x"}).tags_general is None


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"rating": "x"}, "rating"),
        ({"rating": 1}, "rating must be text"),
        ({"tag_string_general": 7}, "tag_string_general"),
        ({"tags_general": [1]}, "tags_general"),
        ({"tags": "['1girl', 'solo']"}, "a list written as text"),
        ({"caption": []}, "caption"),
        ({"tag_string_general": "\ud800"}, "tag_string_general"),
        ({"id": 1.5}, "id"),
        ({"id": True}, "id"),
        ({"id": ""}, "id"),
        ({"id": float("inf")}, "id"),
    ],
)
def test_wrong_values_are_told_by_name(wrong: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        read({"id": 1, **wrong})


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"score": "many"}, "unreadable score"),
        ({"score": True}, "unreadable score"),
        ({"score": 5.5}, "unreadable score"),
        ({"score": 2**31}, "unreadable score"),
        ({"score": float("inf")}, "unreadable score"),
        ({"score": {"total": []}}, "unreadable score.total"),
        ({"created_at": "the year 2021"}, "unreadable created_at"),
        ({"created_at": 12}, "unreadable created_at"),
        ({"media_asset": "x"}, "unreadable media_asset"),
        ({"media_asset": {"created_at": "soon"}}, "unreadable media_asset.created_at"),
        ({"image_width": 0}, "unreadable image_width"),
        ({"height": "tall"}, "unreadable height"),
        ({"aesthetic": float("-inf")}, "unreadable aesthetic"),
        ({"comment": "\ud800"}, "unreadable comment"),
        ({"\ud800": 1}, "unreadable \\ud800"),
    ],
)
def test_an_optional_field_never_costs_the_post(wrong: dict, kind: str) -> None:
    post = read({"id": 1, "tags": "a", **wrong})
    assert (post.key, post.tags_general, post.score, post.year, post.stated_width) == ("1", "a", None, None, None)
    assert [note.kind for note in post.notes] == [kind] and post.extra == {"id": 1} | {
        name: value for name, value in wrong.items() if name in ("created_at", "height") or value == "x"
    }  # fmt: skip
    (note,) = post.notes
    assert (note.kind + note.detail).encode() and note.detail.startswith(kind.removeprefix("unreadable "))


def test_what_tables_write_for_missing_is_missing() -> None:
    nan = float("nan")
    wrong = {"score": nan, "created_at": nan, "rating": nan, "caption": nan, "tags_general": nan, "image_width": "",
             "aesthetic": nan, "media_asset": nan, "tags_artist": "x"}  # fmt: skip
    post = read(wrong | {"id": nan, "score": "None"}, key="file")
    assert (post.key, post.notes, post.extra, post.tags_artist) == ("file", (), {}, "x")
    assert (post.score, post.year, post.rating, post.caption, post.tags_general) == (None, None, None, None, None)


def test_whole_floats_are_whole() -> None:
    post = read({"id": 5.0, "score": 7.0, "image_width": "128", "image_height": 64.0})
    assert (post.key, post.score, post.stated_width, post.stated_height) == ("5", 7, 128, 64)


@pytest.mark.parametrize("record", [[], "x", None, {}])
def test_no_post_at_all(record: object) -> None:
    with pytest.raises(ValueError, match=r"JSON object|neither id nor file"):
        read(record)


@pytest.mark.parametrize("caption", ["", " \n", None])
def test_an_empty_text_is_no_caption(caption: str | None) -> None:
    """As an empty cell of a table: the tags make it."""
    assert read({"id": 1, "caption": caption, "tag_string_general": "1girl"}).caption is None


def test_a_sidecar_caption_wins() -> None:
    assert read({"id": 1, "caption": "its own"}).caption == "its own"
    assert read({"id": 1, "caption": "its own"}, caption="a sidecar's").caption == "a sidecar's"


@given(st.text(st.characters(codec="utf-8"), min_size=1), st.text(st.characters(codec="utf-8"), min_size=1))
def test_keys_are_safe_and_injective(one: str, other: str) -> None:
    key = encode_key(one)
    assert key.isascii() and key.isprintable() and not set(key) & set("./\\ \0")
    assert (key == encode_key(other)) == (one == other)
