"""Samples without a word: each is noted and counted, and more of them than data.max_empty_captions stop the set."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.posts_on_disk import draw, make_base, make_config, read_jsonl, run
from trainer.config.schema import Config, FiltersConfig, SourceConfig
from trainer.core.errors import UserError
from trainer.data.index import open_index
from trainer.prepare import prepare as preparing


def config_of(folder: Path, *posts: dict[str, Any], **data: Any) -> Config:
    """A set of these posts, each with an image of its own."""
    (folder / "images").mkdir()
    for post in posts:
        draw(folder / "images" / f"{post['id']}.png", post["id"])
    (folder / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    return make_config(make_base(folder / "base"), folder, **data)


WORDS: list[dict[str, Any]] = [
    {"id": 1, "tag_string_general": "1girl"},
    {"id": 2, "tag_string_artist": "someone"},
    {"id": 3, "caption": "a cat"},
    {"id": 4, "text": "a dog"},
]
EMPTY: list[dict[str, Any]] = [
    {"id": 5, "rating": "g", "score": 5, "tag_string_general": ""},
    {"id": 6, "caption": " , ||| \n", "rating": "g"},
    {"id": 7},
]


def test_each_is_noted_and_counted(tmp_path: Path) -> None:
    config = config_of(tmp_path, *WORDS, *EMPTY, max_empty_captions=3 / 7)
    summary = run(config)
    assert summary.notes["empty_caption"] == 3 and "noted, empty_caption: 3" in str(summary)
    notes = [line for line in read_jsonl(tmp_path / "shards" / "notes.jsonl") if line["note"] == "empty_caption"]
    assert [(line["key"], line["origin"]) for line in notes] == [(str(n), f"posts.jsonl line {n}") for n in (5, 6, 7)]
    assert open_index(config.data.shards).manifest["counts"]["notes"]["empty_caption"] == 3
    # what a filter removes is no sample
    assert "empty_caption" not in run(replace(config, filters=FiltersConfig(required_tags=["1girl"]))).notes


def test_too_many_stop_it_before_anything_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "encode_share", None)
    blip = {"id": 8, "blip": "a long sentence", "rating": "g"}
    config = config_of(tmp_path, *WORDS, *EMPTY, blip, max_empty_captions=0.49)
    with pytest.raises(UserError, match=r"4 of 8 posts .* above data\.max_empty_captions") as caught:
        run(config)
    told = str(caught.value)
    assert "posts.jsonl line 5, posts.jsonl line 6, posts.jsonl line 7 ..." in told and "caption_column" in told
    assert "posts.jsonl: the record has text in blip" in told and not (tmp_path / "shards").exists()


def test_a_set_of_empty_captions_is_never_made(tmp_path: Path) -> None:
    config = config_of(tmp_path, *({"id": number, "rating": "g"} for number in range(1, 4)))
    with pytest.raises(UserError, match="3 of 3 posts have neither a caption nor tags"):
        run(config)


def test_posts_without_an_image_are_no_fault_where_that_is_said(tmp_path: Path) -> None:
    config = config_of(tmp_path, *WORDS, max_bad_fraction=0.0)
    with (tmp_path / "posts.jsonl").open("a") as file:
        file.write('{"id": 99, "tag_string_general": "1girl"}\n')
    with pytest.raises(UserError, match=r"1 whose image is not there(.|\n)*missing_images: ignore"):
        run(config)
    source = SourceConfig("posts", str(tmp_path / "posts.jsonl"), str(tmp_path / "images"), missing_images="ignore")
    summary = run(replace(config, data=replace(config.data, posts=None, images=None, sources=[source])))
    assert summary.samples == 4 and summary.by_source == {"posts.jsonl": {"posts without an image": 1}}
    counts = open_index(config.data.shards).manifest["counts"]
    assert counts["inputs"] == 4 and counts["set_aside"] == {}
