"""The recipe's section 2: what a post's caption is, and what a draw of it may and may not change."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from support.captions import compose_caption, draw_caption
from trainer.config.caption_fields import QualityRule, YearRule
from trainer.config.schema import CaptionsConfig
from trainer.core.rng import rng
from trainer.data.captions import quality_tag, split_tags, year_tag
from trainer.data.post import ImagePlace, read_post
from trainer.data.template import ready_rules

RECIPE = CaptionsConfig()
EMPTY: dict[str, Any] = dict.fromkeys(
    ("caption", "rating", "score", "year", "tags_general", "tags_character", "tags_copyright", "tags_artist",
     "tags_meta", "extra")
)  # fmt: skip


def compose(rules: CaptionsConfig = RECIPE, **fields: Any) -> str:
    assert fields.keys() <= EMPTY.keys()
    return compose_caption(EMPTY | fields, ready_rules(rules))


def draw(caption: str, rules: CaptionsConfig = RECIPE, *, seed: int = 42, pass_: int = 0, key: str = "7") -> str:
    return draw_caption(caption, ready_rules(rules), rng("caption", seed, pass_, key))


def with_rules(**changes: Any) -> CaptionsConfig:
    return dataclasses.replace(RECIPE, **changes)


# --- composing


@pytest.mark.parametrize(
    ("fields", "caption"),
    [
        (
            {
                "tags_general": "solo multiple_girls long_hair 1boy ^_^ 2girls looking_at_viewer male_focus o_o",
                "tags_character": "hatsune_miku kagamine_rin_(append)", "tags_copyright": "vocaloid",
                "tags_artist": "some_one", "tags_meta": "highres absurdres", "rating": "e", "score": 151, "year": 2022,
            },
            "multiple girls, 1boy, 2girls, male focus, hatsune miku, kagamine rin (append), vocaloid, some one ||| "
            "rating: explicit, nsfw, solo, long hair, ^_^, looking at viewer, o_o, newest, highres, absurdres, "
            "masterpiece",
        ),
        # people in the order in which they stand, not in the list's
        (
            {"tags_general": "1boy 1girl", "rating": "g", "score": 0},
            "1boy, 1girl ||| rating: general, normal quality",
        ),
        # parts that are empty leave no stray commas
        ({"tags_general": "1girl"}, "1girl |||"),
        ({"tags_general": "solo", "tags_copyright": ""}, "||| solo"),
        ({"tags_character": "a", "tags_artist": "b"}, "a, b |||"),
        ({"rating": "q"}, "||| rating: questionable, nsfw"),
        ({"score": -6, "year": 1999, "tags_general": "  solo   smile "}, "||| solo, smile, worst quality"),
        ({}, "|||"),
    ],
)  # fmt: skip
def test_golden_captions(fields: dict[str, Any], caption: str) -> None:
    assert compose(**fields) == caption


def test_a_post_becomes_the_recipes_caption() -> None:
    """From the site's own record to what the model may see of it."""
    record = {
        "id": 5, "rating": "s", "score": 100, "created_at": "2010-12-31", "tag_string_meta": "highres",
        "media_asset": {"created_at": "2011-01-01T00:00:00.000-05:00"}, "tag_string_general": "6+girls blue_eyes",
        "tag_string_character": "", "tag_string_copyright": "touhou", "tag_string_artist": "zun",
    }  # fmt: skip
    row = dataclasses.asdict(read_post(record, source="s", image=ImagePlace(Path("5.png"))))
    caption = compose_caption(row, ready_rules(RECIPE))
    assert caption == "6+girls, touhou, zun ||| rating: sensitive, blue eyes, early, highres, best quality"
    assert sorted(draw(caption).split(", ")[3:]) == ["best quality", "blue eyes", "early", "highres",
                                                     "rating: sensitive"]  # fmt: skip


@pytest.mark.parametrize("count", ["1girl", "2girls", "3girls", "4girls", "5girls", "6+girls", "multiple_girls",
                                   "1boy", "2boys", "3boys", "4boys", "5boys", "6+boys", "multiple_boys",
                                   "male_focus"])  # fmt: skip
def test_every_people_tag_goes_to_the_front(count: str) -> None:
    assert compose(tags_general=f"smile {count}") == f"{count.replace('_', ' ')} ||| smile"


def test_the_people_list_is_the_recipes() -> None:
    assert len(RECIPE.people) == len(set(RECIPE.people)) == 15
    assert compose(tags_general="7girls 1girls 1other female_focus") == "||| 7girls, 1girls, 1other, female focus"


@pytest.mark.parametrize(
    ("score", "tag"),
    [
        (10_000, "masterpiece"), (151, "masterpiece"), (150, "best quality"), (101, "best quality"),
        (100, "best quality"), (99, "high quality"), (75, "high quality"), (74, "medium quality"),
        (25, "medium quality"), (24, "normal quality"), (0, "normal quality"), (-1, "low quality"),
        (-5, "low quality"), (-6, "worst quality"), (-10_000, "worst quality"), (None, ""),
    ],
)  # fmt: skip
def test_quality_at_every_edge(score: int | None, tag: str) -> None:
    assert quality_tag(score, RECIPE) == tag


@pytest.mark.parametrize(
    ("year", "tag"),
    [
        (2004, ""), (2005, "oldest"), (2010, "oldest"), (2011, "early"), (2014, "early"), (2015, "mid"), (2018, "mid"),
        (2019, "late"), (2021, "late"), (2022, "newest"), (2023, "newest"), (2024, ""), (None, ""),
    ],
)  # fmt: skip
def test_years_at_both_edges(year: int | None, tag: str) -> None:
    assert year_tag(year, RECIPE) == tag
    assert "unknown" not in compose(year=year)  # the original's word for years outside


@pytest.mark.parametrize(
    ("rating", "text"),
    [("g", "rating: general"), ("s", "rating: sensitive"), ("q", "rating: questionable, nsfw"),
     ("e", "rating: explicit, nsfw"), (None, "")],
)  # fmt: skip
def test_ratings(rating: str | None, text: str) -> None:
    assert compose(rating=rating) == f"||| {text}".strip()


def test_underscores_and_parentheses() -> None:
    tags = "^_^ o_o >_< _ a_b a_bc looking_at_viewer saber_(fate) :d \\(^o^)/"
    assert split_tags(tags, RECIPE) == [
        "^_^", "o_o", ">_<", "_", "a_b", "a bc", "looking at viewer", "saber (fate)", ":d", "\\(^o^)/"]  # fmt: skip
    assert split_tags("a_b", with_rules(keep_underscore_max_length=2)) == ["a b"]
    assert split_tags("a_bc", with_rules(keep_underscore_max_length=4)) == ["a_bc"]
    assert split_tags(None, RECIPE) == split_tags("", RECIPE) == []


@pytest.mark.parametrize(
    ("separator", "tag", "shown"),
    [
        ("|||", "a|||b", "a | | | b"), ("|||", "|||", "| | |"), ("|||", "|||||", "| | | ||"), ("|||", ":|", ":|"),
        ("<sep>", "a_<sep>_b", "a < s e p > b"), ("|", "sad_:|", ""), ("a b", "x_a_b", ""), (" | ", "a_|_b", ""),
    ],
)  # fmt: skip
def test_a_separator_inside_a_tag_does_not_cut_the_caption(separator: str, tag: str, shown: str) -> None:
    rules = with_rules(keep_tokens_separator=separator, shuffle=False)
    for field in ("tags_character", "tags_general"):
        caption = compose(rules, **{"tags_artist": "zun", "tags_meta": "highres", field: tag})
        assert caption.count(separator) == 1
        drawn = draw(caption, rules).split(", ")
        own = [shown] if shown else []
        assert drawn == ([*own, "zun", "highres"] if field == "tags_character" else ["zun", *own, "highres"])


@pytest.mark.parametrize("finished", ["a cat, on a mat", "x ||| y ||| z", ""])
def test_a_finished_caption_wins(finished: str) -> None:
    assert compose(caption=finished, tags_general="1girl", rating="e", score=5) == finished


def test_other_names_and_thresholds_by_configuration() -> None:
    """Names and ranges as 3.1 has them; the order in which quality rules stand does not matter."""
    rules = with_rules(
        quality=[QualityRule("low quality"), QualityRule("great quality", 90), QualityRule("masterpiece", 95),
                 QualityRule("good quality", 40)],
        years=[YearRule(2005, 2010, "oldest"), YearRule(2011, 2015, "early"), YearRule(2016, 2024, "modern")],
        ratings={"g": "safe", "e": "explicit, nsfw"}, people=["solo"], keep_tokens_separator="<sep>",
    )  # fmt: skip
    assert [quality_tag(score, rules) for score in (96, 95, 94, 90, 89, 40, 39, -9)] == [
        "masterpiece", "masterpiece", "great quality", "great quality", "good quality", "good quality", "low quality",
        "low quality"]  # fmt: skip
    assert compose(rules, tags_general="1girl solo", rating="g", score=95, year=2024) == (
        "solo <sep> safe, 1girl, modern, masterpiece"
    )
    assert compose(rules, tags_general="1girl", rating="q") == "<sep> 1girl"  # a rating without text has no tag
    floor = with_rules(quality=[QualityRule("good", 10)])
    assert (quality_tag(10, floor), quality_tag(9, floor)) == ("good", "")


# --- drawing

CAPTION = "1girl, hatsune miku, vocaloid ||| rating: explicit, nsfw, solo, smile, sky, newest, masterpiece"
FIXED = ["1girl", "hatsune miku", "vocaloid"]
FREE = ["rating: explicit", "nsfw", "solo", "smile", "sky", "newest", "masterpiece"]
UNSHUFFLED = with_rules(shuffle=False)

tag = st.text("ab_^():!'|", min_size=1, max_size=6).map(str.strip).filter(lambda text: text and "|||" not in text)
tags = st.lists(tag, max_size=6)


def test_fixed_tags_stay_and_free_ones_are_shuffled_apart() -> None:
    apart, orders = 0, set()
    for key in range(300):
        drawn = draw(CAPTION, key=str(key)).split(", ")
        assert drawn[:3] == FIXED
        assert sorted(drawn[3:]) == sorted(FREE)
        orders.add(tuple(drawn))
        apart += abs(drawn.index("rating: explicit") - drawn.index("nsfw")) > 1
    assert len(orders) > 280  # of 5,040
    assert 180 < apart < 250  # they are neighbours in 2 of 7 orders


def test_each_order_is_as_likely_as_any_other() -> None:
    orders = Counter(draw("||| a, b, c", key=str(key)) for key in range(3000))
    assert len(orders) == 6
    assert all(400 < count < 600 for count in orders.values())


@given(fixed=tags, free=tags, tail=tags, shuffle=st.booleans(), dropout=st.sampled_from([0.0, 0.5, 1.0]))
@example(fixed=["|", "||"], free=["|", "||"], tail=["|"], shuffle=False, dropout=0.0)
def test_a_draw_keeps_moves_and_drops_what_it_should(
    fixed: list[str], free: list[str], tail: list[str], shuffle: bool, dropout: float
) -> None:
    caption = f"{', '.join(fixed)} ||| {', '.join(free)} ||| {', '.join(tail)}"
    if caption.count("|||") != 2:
        return  # tags of bars that make a third separator together
    drawn = draw(caption, with_rules(shuffle=shuffle, tag_dropout=dropout))
    assert "|||" not in drawn
    seen = drawn.split(", ") if drawn else []
    assert seen[: len(fixed)] == fixed
    assert seen[len(seen) - len(tail) :] == tail
    kept = Counter(seen[len(fixed) : len(seen) - len(tail)])
    assert kept <= Counter(free)
    if dropout == 0:
        assert kept == Counter(free)
    if dropout == 1:
        assert not kept
    if not shuffle and dropout == 0:
        assert seen == [*fixed, *free, *tail]


@given(st.text("ab,| ", max_size=30), st.booleans(), st.integers(0, 3), st.floats(0, 1))
@example("|||", True, 0, 0.0)
@example("||||, a |||| b", False, 0, 0.0)
@example(",|||,", True, 1, 0.0)
def test_the_separator_never_appears_and_no_comma_is_stray(
    caption: str, shuffle: bool, keep_tokens: int, dropout: float
) -> None:
    drawn = draw(caption, with_rules(shuffle=shuffle, keep_tokens=keep_tokens, tag_dropout=dropout))
    assert "|||" not in drawn
    assert drawn == "" or all(part and part == part.strip() for part in drawn.split(", "))


def test_without_shuffling_all_stays_but_the_separators() -> None:
    assert draw(CAPTION, UNSHUFFLED) == ", ".join(FIXED + FREE)
    assert draw("a,b ||| c |||d ||| e", UNSHUFFLED) == "a, b, c, d, e"


def test_text_behind_a_second_separator_is_a_fixed_tail() -> None:
    rules = with_rules(tag_dropout=0.5)
    drawn = [draw("a ||| b, c, d ||| y, x ||| w", rules, key=str(key)).split(", ") for key in range(400)]
    assert all(parts[0] == "a" and parts[-3:] == ["y", "x", "w"] for parts in drawn)
    assert len({tuple(parts) for parts in drawn}) == 16  # all ordered subsets of three


def test_a_caption_without_separator_is_shuffled_but_for_keep_tokens() -> None:
    drawn = [draw("a, b, c, d", key=str(key)) for key in range(200)]
    assert len(set(drawn)) == 24
    kept = [draw("a, b, c, d", with_rules(keep_tokens=2), key=str(key)) for key in range(50)]
    assert set(kept) == {"a, b, c, d", "a, b, d, c"}
    assert draw("a, b", with_rules(keep_tokens=5)) == "a, b"
    # empty places between commas are no tags, and keep nothing from moving
    assert {draw(", ,a, b, c", with_rules(keep_tokens=1), key=str(key)) for key in range(50)} == {"a, b, c", "a, c, b"}
    # where there is a separator, it says what stays
    behind = {draw("a ||| b, c", with_rules(keep_tokens=2), key=str(key)) for key in range(50)}
    assert behind == {"a, b, c", "a, c, b"}


def test_another_separator() -> None:
    rules = with_rules(keep_tokens_separator="<sep>", shuffle=False)
    assert draw("a <sep> b, |||, c", rules) == "a, b, |||, c"


def test_tag_dropout_is_a_rate_of_the_free_part_only() -> None:
    rules = with_rules(tag_dropout=0.3)
    kept: Counter[str] = Counter()
    for key in range(2000):
        drawn = draw(CAPTION, rules, key=str(key)).split(", ")
        assert drawn[:3] == FIXED
        kept.update(drawn[3:])
    spread = 4 * (0.3 * 0.7 / 2000) ** 0.5
    assert all(abs(kept[tag] / 2000 - 0.7) < spread for tag in FREE)


def test_caption_dropout_is_a_rate_of_whole_captions() -> None:
    drawn = [draw(CAPTION, with_rules(caption_dropout=0.1), key=str(key)) for key in range(4000)]
    empty = [index for index, text in enumerate(drawn) if not text]
    assert abs(len(empty) / 4000 - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5
    assert all(text.startswith("1girl, hatsune miku") for text in drawn if text)
    assert {draw(CAPTION, with_rules(caption_dropout=1.0), key=str(key)) for key in range(50)} == {""}


def test_the_same_seed_pass_and_key_draw_the_same_and_others_do_not() -> None:
    first = draw(CAPTION)
    assert draw(CAPTION) == first
    numbers = range(20)
    assert len({draw(CAPTION, seed=number) for number in numbers}) > 15
    assert len({draw(CAPTION, pass_=number) for number in numbers}) > 15
    assert len({draw(CAPTION, key=str(number)) for number in numbers}) > 15


def test_turning_one_knob_leaves_the_draws_of_the_others() -> None:
    for key in map(str, range(100)):
        plain = draw(CAPTION, key=key).split(", ")
        half = with_rules(tag_dropout=0.5)
        dropped = draw(CAPTION, half, key=key).split(", ")
        assert dropped == [part for part in plain if part in dropped]  # the order that remains is the same
        unshuffled = draw(CAPTION, dataclasses.replace(half, shuffle=False), key=key).split(", ")
        assert sorted(unshuffled) == sorted(dropped)
        rarely = draw(CAPTION, dataclasses.replace(half, caption_dropout=0.2), key=key)
        assert rarely in ("", ", ".join(dropped))


def test_a_golden_draw() -> None:
    """If this changes, every run sees its captions in other orders."""
    assert draw(CAPTION) == (
        "1girl, hatsune miku, vocaloid, smile, solo, sky, nsfw, rating: explicit, newest, masterpiece"
    )
