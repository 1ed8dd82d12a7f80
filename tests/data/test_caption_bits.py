"""The default's captions and draws, bit for bit: hashes of 10,000, recorded before captions had a template."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from support.captions import compose_caption, draw_caption
from support.paths import REPOSITORY
from trainer.config.load import load_config
from trainer.config.schema import CaptionsConfig
from trainer.core.rng import rng
from trainer.data.caption_draws import draw_sample_caption
from trainer.data.template import ready_rules

POSTS, PASSES = 2500, 4
GENERAL = [
    "solo", "long_hair", "^_^", "o_o", "looking_at_viewer", "smile", "1girl", "2girls", "multiple_girls", "1boy",
    "male_focus", "sky", "a|||b", "sad_:|", "saber_(fate)", "one,two", "_hidden", "____", "blue_eyes", "\u30cf",
]  # fmt: skip
NAMES = ["hatsune_miku", "kagamine_rin_(append)", "reimu", "a_b", "love_live!"]
META = ["highres", "absurdres", "commentary"]
FINISHED = [
    "a cat, on a mat",
    "x ||| y, z, w ||| tail, end",
    "",
    "one\x1etwo, three\x1e|||four, five",
    "1girl, solo,, smile",
]


def draw_tags(words: Sequence[str], most: int, draw: np.random.Generator) -> str | None:
    chosen = draw.permutation(len(words))[: int(draw.integers(0, most + 1))]
    return " ".join(words[place] for place in chosen.tolist()) or (None if draw.random() < 0.5 else "")


def make_record(number: int) -> dict[str, Any]:
    """A post of all categories, ratings, scores and years, any of which it may lack; some bring a finished caption."""
    draw = rng("caption bits", number)
    return {
        "key": str(number),
        "tags_general": draw_tags(GENERAL, 18, draw),
        "tags_character": draw_tags(NAMES, 3, draw),
        "tags_copyright": draw_tags(NAMES[::-1], 2, draw),
        "tags_artist": draw_tags(["some_one", "b__c"], 1, draw),
        "tags_meta": draw_tags(META, 3, draw),
        "rating": [None, *"gsqe"][int(draw.integers(5))],
        "score": None if draw.random() < 0.1 else int(draw.integers(-20, 250)),
        "year": None if draw.random() < 0.1 else int(draw.integers(2002, 2026)),
        "extra": json.dumps({"aesthetic_score": round(float(draw.random()), 3)}) if draw.random() < 0.8 else None,
        "caption": FINISHED[number % len(FINISHED)] if draw.random() < 0.2 else None,
    }


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return [make_record(number) for number in range(POSTS)]


STAGE_1, DEMO = ["stage1_feature_alignment.yaml"], ["demo.yaml", "demo_stage1.yaml"]
COLUMNS = "[{column: aesthetic_score, tag: pretty, above: 0.5}, {column: aesthetic_score, tag: plain}]"
DEFAULT = "cab8d5687ce1c18ebc6d0c742e9baebbea0d60f583ea10b0b6db400fccbb1930"
CASES: dict[str, tuple[list[str], list[str], str]] = {
    "the demo's": (DEMO, [], DEFAULT),
    "stage 1's": (STAGE_1, [], DEFAULT),
    "with dropout": (
        STAGE_1,
        ["captions.tag_dropout=0.3", "captions.caption_dropout=0.1"],
        "15d2ed46a135275ab1b839acedb3634100053f46b4cb9b6844a260a7536e81a2",
    ),
    "unshuffled": (
        STAGE_1,
        ["captions.shuffle=false", "captions.tag_dropout=0.2"],
        "d892139f304b5c2d264020a2c0d00b86ecf8bae0aa3e799a91782d1026aa9472",
    ),
    "with kept tokens": (
        STAGE_1,
        ["captions.keep_tokens=2"],
        "5704e8a4521351fa636a19134b386e8774a89775f4a5489d27861690f5efa2c6",
    ),
    "another separator": (
        STAGE_1,
        ["captions.keep_tokens_separator='<sep>'"],
        "4f0297fb5a9132a131157eac1dbcc9bf3e9569ac3bbab2647d0bd4dfe36ca835",
    ),
    "with columns": (
        STAGE_1,
        [f"captions.columns={COLUMNS}"],
        "ab1e06233de2bc43a2c165e9eefb09ce46d36d7020cc63638f54460e9b059403",
    ),
}


def load_rules(files: Sequence[str], words: Sequence[str]) -> CaptionsConfig:
    return load_config([REPOSITORY / "configs" / name for name in files], words).captions


@pytest.mark.parametrize("name", CASES)
def test_captions_and_draws_are_those_of_0_2_0(name: str, records: list[dict[str, Any]]) -> None:
    files, words, expected = CASES[name]
    rules = ready_rules(load_rules(files, words))
    digest = hashlib.sha256()
    for pass_ in range(PASSES):
        for record in records:
            digest.update(draw_sample_caption(record, pass_, 42, rules).encode() + b"\n")
    assert digest.hexdigest() == expected


def test_what_is_shown_as_composed_draws_the_same(records: list[dict[str, Any]]) -> None:
    """A composed caption, read as a finished one, is the default template."""
    rules = ready_rules(CaptionsConfig(tag_dropout=0.2))
    for record in records[:500]:
        composed = compose_caption(record, rules)
        drawn = draw_caption(composed, rules, rng("caption", 42, 0, record["key"]))
        assert draw_sample_caption(record, 0, 42, rules) == drawn
