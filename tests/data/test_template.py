"""Captions by a template: what each kind of part gives, what stays in place, and what is left out by chance."""

import dataclasses
import json
from collections import Counter
from typing import Any

import pytest

from support.captions import compose_caption
from trainer.config.caption_fields import CaptionPart, ColumnRule, QualityRule
from trainer.config.schema import CaptionsConfig
from trainer.data.caption_draws import draw_record, draw_sample_caption, explain_parts, join_drawn
from trainer.data.template import CaptionRules, ready_rules

POST: dict[str, Any] = {
    "key": "7", "caption": None, "rating": "s", "score": 120, "year": 2022,
    "tags_general": "solo 1girl long_hair smile blue_sky", "tags_character": "hatsune_miku kagamine_rin",
    "tags_copyright": "vocaloid", "tags_artist": "some_one", "tags_meta": "highres",
    "extra": json.dumps({"aesthetic": 0.8, "source_kind": "anime", "odd": True, "votes": 3}),
}  # fmt: skip
# of Animagine XL 4.0: rating after the series, everything else in any order, quality at the end
FOUR = [
    CaptionPart(tags="people", fixed=True), CaptionPart(tags="character", fixed=True),
    CaptionPart(tags="copyright", fixed=True), CaptionPart(tag="rating", fixed=True),
    CaptionPart(tags="general"), CaptionPart(tags="meta"), CaptionPart(tag="year"),
    CaptionPart(tag="quality", fixed=True),
]  # fmt: skip


def rules(*parts: CaptionPart, frequent: tuple[str, ...] = (), **changes: Any) -> CaptionRules:
    return ready_rules(CaptionsConfig(template=list(parts), **changes), frequent)


def draws(ready: CaptionRules, passes: int = 200, **changes: Any) -> list[list[str]]:
    texts = [draw_sample_caption(POST | changes, pass_, 42, ready) for pass_ in range(passes)]
    return [text.split(", ") if text else [] for text in texts]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (CaptionPart(tags="character"), "hatsune miku, kagamine rin"),
        (CaptionPart(tags="general"), "solo, 1girl, long hair, smile, blue sky"),  # no part has the people
        (CaptionPart(tag="rating"), "rating: sensitive"),
        (CaptionPart(tag="quality"), "best quality"),
        (CaptionPart(tag="year"), "newest"),
        (CaptionPart(column="source_kind", prefix="source_"), "source_anime"),
        (CaptionPart(column="votes"), "3"),
        (CaptionPart(column="odd"), ""),
        (CaptionPart(column="nothing"), ""),
        (CaptionPart(column="aesthetic"), "pretty"),
        (CaptionPart(tag="columns"), "pretty, many"),
        (CaptionPart(text="drawn, by hand"), "drawn, by hand"),
        (CaptionPart(tags="artist", prefix="by "), "by some one"),
        (CaptionPart(tags="character", max_tags=1, fixed=True), "hatsune miku"),
    ],
)
def test_each_kind_of_part(part: CaptionPart, expected: str) -> None:
    columns = [ColumnRule("aesthetic", "pretty", 0.5), ColumnRule("votes", "many", 1)]
    if part.column == "votes":
        columns = []
    elif part.column == "aesthetic":
        columns = columns[:1]
    ready = rules(part, shuffle=False, columns=columns)
    assert draw_sample_caption(POST, 0, 42, ready) == expected


def test_columns_with_a_part_of_their_own_stand_there_alone() -> None:
    columns = [ColumnRule("aesthetic", "pretty", 0.5), ColumnRule("votes", "many", 1)]
    ready = rules(CaptionPart(column="votes", fixed=True), CaptionPart(tag="columns", fixed=True), columns=columns)
    assert draw_sample_caption(POST, 0, 42, ready) == "many, pretty"


def test_what_is_fixed_keeps_its_place_on_both_sides_of_what_is_shuffled() -> None:
    ready = rules(*FOUR)
    assert compose_caption(POST, ready) == (
        "1girl, hatsune miku, kagamine rin, vocaloid, rating: sensitive ||| "
        "solo, long hair, smile, blue sky, highres, newest ||| best quality"
    )
    drawn = draws(ready)
    assert {tuple(tags[:5]) for tags in drawn} == {("1girl", "hatsune miku", "kagamine rin", "vocaloid",
                                                    "rating: sensitive")}  # fmt: skip
    assert {tags[-1] for tags in drawn} == {"best quality"}
    assert len({tuple(tags) for tags in drawn}) > 150  # of 720 orders


def test_stretches_between_fixed_parts_are_shuffled_apart() -> None:
    parts = [CaptionPart(tags="general"), CaptionPart(tag="rating", fixed=True), CaptionPart(tags="character")]
    drawn = draws(rules(*parts))
    assert all(set(tags[-2:]) == {"hatsune miku", "kagamine rin"} and tags[5] == "rating: sensitive" for tags in drawn)
    alone = draws(rules(*parts[:2]))
    assert [tags[:6] for tags in drawn] == alone  # the second stretch moves no draw of the first
    assert len({tuple(tags[-2:]) for tags in drawn}) == 2


def test_a_part_is_left_out_with_its_own_probability() -> None:
    ready = rules(CaptionPart(tags="character", dropout=0.25), CaptionPart(tags="general"), shuffle=False)
    drawn = draws(ready, 2000)
    with_characters = [tags for tags in drawn if "hatsune miku" in tags]
    assert all(("kagamine rin" in tags) == ("hatsune miku" in tags) and tags[-5:] == drawn[0][-5:] for tags in drawn)
    assert abs(len(with_characters) / 2000 - 0.75) < 4 * (0.25 * 0.75 / 2000) ** 0.5


def test_tags_of_a_part_are_left_out_one_by_one() -> None:
    ready = rules(CaptionPart(tags="character", tag_dropout=0.3, fixed=True), CaptionPart(tags="artist", fixed=True))
    counts = Counter(tag for tags in draws(ready, 2000) for tag in tags)
    assert counts["some one"] == 2000
    for name in ("hatsune miku", "kagamine rin"):
        assert abs(counts[name] / 2000 - 0.7) < 4 * (0.3 * 0.7 / 2000) ** 0.5


def test_so_many_tags_at_most_are_drawn_anew_where_they_are_shuffled() -> None:
    drawn = draws(rules(CaptionPart(tags="general", max_tags=2)))
    assert all(len(tags) == 2 for tags in drawn) and len({frozenset(tags) for tags in drawn}) == 10


def test_frequent_tags_have_a_probability_of_their_own() -> None:
    parts = [CaptionPart(tags="general"), CaptionPart(tag="rating")]
    ready = rules(*parts, frequent=("long_hair", "solo"), frequent_tag_dropout=0.5, frequent_tag_share=0.1)
    counts = Counter(tag for tags in draws(ready, 2000) for tag in tags)
    for tag, share in (("long hair", 0.5), ("solo", 0.5), ("smile", 1.0), ("rating: sensitive", 1.0)):
        assert abs(counts[tag] / 2000 - share) <= 4 * (share * (1 - share) / 2000) ** 0.5


def test_protected_tags_stay_whatever_leaves_tags_out() -> None:
    parts = [CaptionPart(tags="general", dropout=1.0, tag_dropout=1.0, max_tags=1), CaptionPart(tag="quality")]
    ready = rules(*parts, frequent=("solo",), frequent_tag_dropout=1.0, frequent_tag_share=0.1, tag_dropout=1.0,
                  protected_tags=["solo", "blue_sky", "best quality"])  # fmt: skip
    for tags in draws(ready, 20):
        assert sorted(tags) == ["best quality", "blue sky", "solo"]
    # of a finished caption as well; whole captions are left out all the same
    assert {tuple(sorted(tags)) for tags in draws(ready, 20, caption="a, solo, b")} == {("solo",)}
    nothing = dataclasses.replace(ready, config=dataclasses.replace(ready.config, caption_dropout=1.0))
    assert draws(nothing, 5) == [[]] * 5


def test_turning_one_option_moves_no_other_draw() -> None:
    """Each option alone, and all together: what each leaves out is the same, and so is the order."""
    plain = [CaptionPart(tags="character"), CaptionPart(tags="general"), CaptionPart(tags="artist")]
    turned = [
        {0: {"dropout": 0.5}}, {0: {"tag_dropout": 0.5}}, {1: {"tag_dropout": 0.5}}, {2: {"dropout": 0.5}},
    ]  # fmt: skip

    def change(options: list[dict[int, dict[str, float]]]) -> CaptionRules:
        parts = list(plain)
        for option in options:
            for place, values in option.items():
                parts[place] = dataclasses.replace(parts[place], **values)  # type: ignore[arg-type]
        return rules(*parts)

    before = draws(rules(*plain), 60)
    each = [draws(change([option]), 60) for option in turned]
    together = draws(change(turned), 60)
    for number, whole in enumerate(before):
        lost = set().union(*(set(whole) - set(one[number]) for one in each))
        assert together[number] == [tag for tag in whole if tag not in lost]
        assert all(one[number] == [tag for tag in whole if tag in one[number]] for one in each)


def test_the_posts_own_caption_as_a_part_of_the_template() -> None:
    parts = [CaptionPart(tags="people", fixed=True), CaptionPart(caption="natural", fixed=True, prefix="It shows: "),
             CaptionPart(tags="artist", fixed=True)]  # fmt: skip
    ready = rules(*parts)
    assert ready.uses_caption
    own = "A girl, who smiles, stands there."
    assert draw_sample_caption(POST | {"caption": own}, 0, 42, ready) == f"1girl, It shows: {own} some one"
    assert draw_sample_caption(POST, 0, 42, ready) == "1girl, some one"
    variants = {draw_sample_caption(POST | {"caption": "a\x1eb"}, pass_, 42, ready) for pass_ in range(30)}
    assert variants == {"1girl, It shows: a, some one", "1girl, It shows: b, some one"}


def test_each_part_says_what_of_it_was_left_out() -> None:
    parts = [CaptionPart(tags="character", fixed=True, tag_dropout=0.5), CaptionPart(tags="general", tag_dropout=0.5),
             CaptionPart(tag="year"), CaptionPart(tags="meta", dropout=1.0), CaptionPart(column="nothing")]  # fmt: skip
    ready = rules(*parts)
    for pass_ in range(20):
        drawn = draw_record(POST, pass_, 42, ready)
        found = explain_parts(drawn)
        assert [part["part"] for part in found] == ["tags: character", "tags: general", "tag: year", "tags: meta"]
        assert Counter(tag for part in found for tag in part["tags"]) == Counter(join_drawn(drawn).split(", "))
        assert found[3] == {"part": "tags: meta", "tags": [], "left_out": ["highres"]}
        assert sorted(found[0]["tags"] + found[0]["left_out"]) == ["hatsune miku", "kagamine rin"]


def test_quality_by_rating_reaches_its_part() -> None:
    quality = [QualityRule("fine", 100, rating="s"), QualityRule("bad", rating="g")]
    assert draws(rules(CaptionPart(tag="quality"), quality=quality), 1) == [["fine"]]
    assert draws(rules(CaptionPart(tag="quality"), quality=quality), 1, rating="g") == [["bad"]]


@pytest.mark.parametrize(
    ("column", "said"), [("score", "120"), ("year", "2022"), ("rating", "s"), ("source_kind", "anime"), ("odd", "")]
)
def test_a_part_may_be_a_column_of_the_index(column: str, said: str) -> None:
    assert compose_caption(POST, rules(CaptionPart(column=column, fixed=True))).rstrip(" |") == said


def test_a_field_of_the_post_comes_before_the_column_of_its_name() -> None:
    post = POST | {"source": "posts", "extra": json.dumps({"source": "a drawing"})}
    assert compose_caption(post, rules(CaptionPart(column="source", fixed=True))).startswith("a drawing")
