"""Filters: each removes what it says and counts it; what it removed comes back without being encoded again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from support.posts_on_disk import draw, make_base, make_config, read_jsonl, run
from trainer.config.schema import Config, FiltersConfig
from trainer.core.errors import UserError
from trainer.data.index import open_index
from trainer.prepare import encode as encoding
from trainer.prepare.prepare import Summary
from trainer.prepare.verify import verify_shards

POSTS: list[dict[str, Any]] = [
    {"id": 1, "rating": "g", "score": 10, "created_at": "2010-05-01", "tag_string_general": "1girl long_hair"},
    {"id": 2, "rating": "s", "score": -3, "created_at": "2015-05-01", "tag_string_general": "1boy"},
    {"id": 3, "rating": "q", "score": 0, "created_at": "2020-05-01", "tag_string_artist": "long_hair"},
    {"id": 4, "rating": "e", "score": 7, "created_at": "2023-05-01", "tag_string_general": "1girl comic"},
    {"id": 5, "tag_string_general": "comic"},
    {"id": 6, "file": "6.png", "caption": "1girl, long hair ||| comic"},
]
SIZES = [(90, 60), (60, 90), (70, 70), (200, 50), (64, 64), (40, 40)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("filters")
    (folder / "images").mkdir()
    for post, size in zip(POSTS, SIZES, strict=True):
        draw(folder / "images" / f"{post['id']}.png", post["id"], size)
    # the bytes of 2 once more, under a key that comes later
    (folder / "images" / "7.png").write_bytes((folder / "images" / "2.png").read_bytes())
    lines = [*POSTS, {"id": 7, "rating": "g", "score": 50, "created_at": "2015-01-01", "tag_string_general": "1boy"}]
    (folder / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in lines))
    return make_config(make_base(folder / "base"), folder)


def filtered(config: Config, **filters: Any) -> tuple[Summary, str]:
    """The summary, and the keys that are left."""
    summary = run(replace(config, filters=FiltersConfig(**filters)))
    return summary, "".join(open_index(config.data.shards).table["key"].to_pylist())


@pytest.mark.parametrize(
    ("filters", "left", "removed"),
    [
        ({}, "1234567", {}),
        ({"min_score": 0}, "1347", {"min_score": 3}),
        ({"ratings": ["g", "s"]}, "127", {"ratings": 4}),
        ({"first_year": 2015}, "2347", {"first_year": 3}),
        ({"last_year": 2015}, "127", {"last_year": 4}),
        ({"first_year": 2015, "last_year": 2020}, "237", {"last_year": 1, "first_year": 3}),
        ({"required_tags": ["long_hair"]}, "136", {"required_tags": 4}),
        ({"required_tags": ["long hair", "1girl"]}, "16", {"required_tags": 5}),
        ({"forbidden_tags": ["comic"]}, "1237", {"forbidden_tags": 3}),
        ({"min_side": 60}, "12357", {"min_side": 2}),
        ({"drop_duplicates": True}, "123456", {"drop_duplicates": 1}),
        (
            {"min_score": 0, "forbidden_tags": ["comic"], "min_side": 70},
            "3",
            {"min_score": 3, "forbidden_tags": 1, "min_side": 2},
        ),
    ],
)  # fmt: skip
def test_each_filter_removes_what_it_says(
    config: Config, tmp_path: Path, filters: dict[str, Any], left: str, removed: dict[str, int]
) -> None:
    afresh = replace(config, data=replace(config.data, shards=str(tmp_path / "shards")))
    summary, keys = filtered(afresh, **filters)
    assert (keys, summary.filtered) == (left, removed)
    assert open_index(afresh.data.shards).manifest["counts"]["filtered"] == removed
    for name, count in removed.items():
        assert f"removed by filters.{name}: {count}" in str(summary)


def test_a_filter_can_be_changed_afterwards(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, data=replace(config.data, shards=str(tmp_path / "shards")))
    assert filtered(config)[1] == "1234567"
    fresh = open_index(config.data.shards).fingerprint
    monkeypatch.setattr(encoding, "encode_raw_latents", None)  # nothing is encoded from here on
    for filters, left in (
        ({"min_side": 60}, "12357"),
        ({"min_score": 0}, "1347"),
        ({"drop_duplicates": True, "forbidden_tags": ["comic"]}, "123"),
    ):
        summary, keys = filtered(config, **filters)
        assert keys == left and sum(summary.filtered.values()) == 7 - len(left)
        verify_shards(tmp_path / "shards")
    assert filtered(config)[1] == "1234567" and open_index(config.data.shards).fingerprint == fresh


def test_duplicates_are_reported_even_if_they_stay(config: Config, tmp_path: Path) -> None:
    config = replace(config, data=replace(config.data, shards=str(tmp_path / "shards")))
    summary, _ = filtered(config)
    assert summary.notes == {"duplicate": 1} and "filters.drop_duplicates" not in str(summary)
    (note,) = read_jsonl(tmp_path / "shards" / "notes.jsonl")
    assert note == {"key": "7", "origin": "posts.jsonl line 7", "note": "duplicate", "of": "2"}


def test_filters_cut_finished_captions_at_the_configured_separator(config: Config, tmp_path: Path) -> None:
    post = {"id": 6, "file": "6.png", "caption": "1girl <sep> long hair, a|||b <sep> comic"}
    (tmp_path / "posts.jsonl").write_text(json.dumps(post))
    data = replace(config.data, posts=[str(tmp_path / "posts.jsonl")], shards=str(tmp_path / "shards"))
    config = replace(config, data=data, captions=replace(config.captions, keep_tokens_separator="<sep>"))
    assert filtered(config, required_tags=["1girl", "long_hair", "comic", "a|||b"])[1] == "6"
    with pytest.raises(UserError, match="1 removed by required_tags"):
        filtered(config, required_tags=["b"])


def test_a_separator_inside_a_tag_is_noted(config: Config, tmp_path: Path) -> None:
    posts = [{"id": 1, "tag_string_general": "a|||b c", "tag_string_artist": "|||"}, {"id": 2, "tag_string_meta": "||"}]
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    data = replace(config.data, posts=[str(tmp_path / "posts.jsonl")], shards=str(tmp_path / "shards"))
    # five of the images belong to none of the two posts
    counted = {"separator inside a tag": 1, "images without a post": 5}
    assert run(replace(config, data=data)).by_source == {"posts.jsonl": counted}
    note, _ = read_jsonl(tmp_path / "shards" / "notes.jsonl")
    assert note["key"] == "1" and note["detail"] == "tags_general, tags_artist: |||"


def test_of_two_copies_the_one_with_words_is_kept(config: Config, tmp_path: Path) -> None:
    for name, words in (("a", "  "), ("b", "1girl"), ("c", "1girl, smile")):
        draw(tmp_path / "images" / f"{name}.png", 1) if name != "a" else (tmp_path / "images").mkdir()
        (tmp_path / "images" / f"{name}.txt").write_text(words)
    (tmp_path / "images" / "a.png").write_bytes((tmp_path / "images" / "b.png").read_bytes())
    config = make_config(Path(config.model.pretrained), tmp_path, posts=None, max_empty_captions=1.0)
    summary, keys = filtered(config, drop_duplicates=True)
    assert (summary.filtered, keys) == ({"drop_duplicates": 2}, "b%2Epng")
    notes = read_jsonl(tmp_path / "shards" / "notes.jsonl")
    assert [(note["key"], note["of"]) for note in notes if note["note"] == "duplicate"] == [
        ("a%2Epng", "b%2Epng"), ("c%2Epng", "b%2Epng")]  # fmt: skip


def test_several_frames_are_noted_and_stay_so(config: Config, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    drawn = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green")]
    drawn[0].save(tmp_path / "images" / "a.gif", save_all=True, append_images=drawn[1:])
    drawn[0].save(tmp_path / "images" / "b.gif")
    drawn[1].save(tmp_path / "images" / "c.tiff", save_all=True, append_images=drawn[:1])
    for name in "abcd":
        (tmp_path / "images" / f"{name}.txt").write_text("a caption")
    config = make_config(Path(config.model.pretrained), tmp_path, posts=None)
    assert run(config).notes == {"several_frames": 2}
    notes = read_jsonl(tmp_path / "shards" / "notes.jsonl")
    assert [note["key"] for note in notes if note["note"] == "several_frames"] == ["a%2Egif", "c%2Etiff"]
    draw(tmp_path / "images" / "d.png", 1)  # only this is looked at again
    assert (run(config).encoded, run(config).notes) == (1, {"several_frames": 2})
    verify_shards(tmp_path / "shards")
    for name in ("a.gif", "c.tiff"):
        (tmp_path / "images" / name).unlink()
    assert run(config).notes == {}


def test_nothing_is_left(config: Config, tmp_path: Path) -> None:
    config = replace(config, data=replace(config.data, shards=str(tmp_path / "shards")))
    with pytest.raises(UserError, match=r"no sample is left of 7 inputs: 7 removed by min_score$"):
        filtered(config, min_score=1000)
