"""Several captions a sample: which kind a pass draws, and what becomes of what a sample lacks."""

from collections import Counter
from typing import Any

import pytest

from trainer.config.caption_fields import MixConfig
from trainer.config.schema import CaptionsConfig
from trainer.data.caption_draws import draw_record, draw_sample_caption, join_drawn, list_words, share_out
from trainer.data.template import ready_rules

MIX = MixConfig(tags=0.4, natural=0.1, tags_natural=0.25, natural_tags=0.25)
POST: dict[str, Any] = {
    "key": "7", "caption": "A girl, who smiles.", "rating": "g", "score": None, "year": None, "extra": None,
    "tags_general": "1girl smile solo", "tags_character": "", "tags_copyright": None, "tags_artist": None,
    "tags_meta": None,
}  # fmt: skip
TAGS = {"caption": None}
TEXT = {"tags_general": "", "rating": None}
RULES = ready_rules(CaptionsConfig(mix=MIX))


def kinds(passes: int = 4000, **changes: Any) -> Counter[str]:
    return Counter(draw_record(POST | changes, pass_, 42, RULES).kind for pass_ in range(passes))


def test_kinds_come_with_their_probabilities() -> None:
    found = kinds()
    for kind in ("tags", "natural", "tags_natural", "natural_tags"):
        share = getattr(MIX, kind)
        assert abs(found[kind] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert found.total() == 4000


def test_what_each_kind_reads() -> None:
    seen: dict[str, str] = {}
    for pass_ in range(100):
        drawn = draw_record(POST, pass_, 42, RULES)
        seen[drawn.kind] = join_drawn(drawn)
        tags = [tag for part, tag in list_words(drawn) if part != "caption: natural"]
        assert drawn.kind == "natural" or (tags[0] == "1girl" and sorted(tags) == ["1girl", "rating: general", "smile",
                                                                                  "solo"])  # fmt: skip
    assert seen["natural"] == "A girl, who smiles."
    assert seen["natural_tags"].startswith("A girl, who smiles. 1girl, ")
    assert seen["tags_natural"].startswith("1girl, ") and seen["tags_natural"].endswith(", A girl, who smiles.")
    assert seen["tags"].count(", ") == 3


def test_what_a_sample_lacks_leaves_its_share_to_the_others() -> None:
    assert kinds(50, **TAGS) == {"tags": 50} and kinds(50, **TEXT) == {"natural": 50}
    assert kinds(20, **TAGS, **TEXT) == {"tags": 20}
    assert draw_sample_caption(POST | TAGS | TEXT, 0, 42, RULES) == ""
    assert share_out(MIX, True, True) == {"tags": 0.4, "natural": 0.1, "tags_natural": 0.25, "natural_tags": 0.25}
    both = MixConfig(tags_natural=0.5, natural_tags=0.5)
    assert share_out(both, True, False) == {"tags": 1.0} and share_out(both, False, True) == {"natural": 1.0}


@pytest.mark.parametrize("changes", [{}, {"caption": "one\x1etwo\x1ethree"}])
def test_a_mix_moves_no_draw_of_the_tags(changes: dict[str, Any]) -> None:
    alone = ready_rules(CaptionsConfig())
    for pass_ in range(60):
        drawn = draw_record(POST | changes, pass_, 42, RULES)
        if drawn.kind != "natural":
            tags = [tag for part, tag in list_words(drawn) if part != "caption: natural"]
            assert ", ".join(tags) == draw_sample_caption(POST | TAGS, pass_, 42, alone)


def test_a_pass_draws_one_variant_whatever_the_kind() -> None:
    text = "one\x1etwo\x1ethree ||| four, five"
    only = ready_rules(CaptionsConfig(mix=MixConfig(natural=1.0)))
    drawn = [draw_sample_caption(POST | {"caption": text}, pass_, 42, only) for pass_ in range(200)]
    assert set(drawn) == {"one", "two", "three, four, five"}  # no separator reaches the tokenizer
    for pass_, own in enumerate(drawn):
        mixed = draw_record(POST | {"caption": text}, pass_, 42, RULES)
        assert mixed.own_caption == own


def test_whole_captions_are_left_out_as_ever() -> None:
    rules = ready_rules(CaptionsConfig(mix=MIX, caption_dropout=0.2))
    plain = ready_rules(CaptionsConfig(caption_dropout=0.2))
    empty = [pass_ for pass_ in range(300) if draw_record(POST, pass_, 42, rules).kind == "empty"]
    assert empty == [pass_ for pass_ in range(300) if not draw_sample_caption(POST | TAGS, pass_, 42, plain)]
    assert 30 < len(empty) < 95


def test_without_a_mix_the_posts_own_caption_wins() -> None:
    drawn = draw_record(POST, 0, 42, ready_rules(CaptionsConfig(shuffle=False)))
    assert drawn.kind == "finished" and join_drawn(drawn) == "A girl, who smiles."
