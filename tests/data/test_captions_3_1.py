"""The captions of the next version, by configuration alone: percentiles by rating, other names, tags from a number."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from support.captions import compose_caption
from support.paths import REPOSITORY
from trainer.config.caption_fields import ColumnRule, QualityRule
from trainer.config.load import load_config
from trainer.config.schema import CaptionsConfig
from trainer.data.captions import column_tags, quality_tag
from trainer.data.percentiles import resolve_percentiles
from trainer.data.shards import SCHEMA
from trainer.data.template import ready_rules
from trainer.report.survey import count_rules

BLANK: dict[str, Any] = dict.fromkeys(SCHEMA.names)


@pytest.fixture(scope="module")
def rules() -> CaptionsConfig:
    files = [REPOSITORY / "configs" / f"{name}.yaml" for name in ("stage1_feature_alignment", "captions_3_1")]
    return load_config(files).captions


def make_table(rows: list[dict[str, Any]]) -> pa.Table:
    schema = pa.schema([field.with_nullable(True) for field in SCHEMA])
    return pa.Table.from_pylist([BLANK | row for row in rows], schema=schema)


def posts(rating: str | None, scores: list[int | None]) -> list[dict[str, Any]]:
    return [{"rating": rating, "score": score} for score in scores]


def test_each_rating_has_its_own_thresholds(rules: CaptionsConfig) -> None:
    table = make_table(posts("g", list(range(1, 101))) + posts("e", list(range(1001, 1101))) + posts("s", [None]))
    resolved = resolve_percentiles(rules, table)
    edges = [(96, "masterpiece"), (95, "best quality"), (86, "best quality"), (85, "great quality"),
             (76, "great quality"), (75, "good quality"), (51, "good quality"), (50, "normal quality"),
             (26, "normal quality"), (25, "low quality"), (11, "low quality"), (10, "worst quality"),
             (-5, "worst quality")]  # fmt: skip
    for score, tag in edges:
        assert quality_tag(score, resolved, "g") == tag
        assert quality_tag(score + 1000, resolved, "e") == tag
    assert (
        quality_tag(1000, resolved, "s") == quality_tag(1000, resolved, None) == quality_tag(None, resolved, "g") == ""
    )
    assert resolve_percentiles(rules, table) == resolved
    counted = dict(count_rules(table, resolved).quality)
    assert counted == {"masterpiece": 10, "best quality": 20, "great quality": 20, "good quality": 50,
                       "normal quality": 50, "low quality": 30, "worst quality": 20, "": 1}  # fmt: skip


def test_posts_without_a_rating_are_a_group(rules: CaptionsConfig) -> None:
    resolved = resolve_percentiles(rules, make_table(posts(None, list(range(100))) + posts("q", [5, 5, 5])))
    assert [quality_tag(score, resolved, None) for score in (99, 94, 0)] == [
        "masterpiece", "best quality", "worst quality"]  # fmt: skip
    # all scores of a rating equal: none lies above any share, and a higher one, seen later, has the highest tag
    assert quality_tag(5, resolved, "q") == "worst quality" and quality_tag(6, resolved, "q") == "masterpiece"


def test_any_scores_give_the_shares(rules: CaptionsConfig) -> None:
    scores = np.random.default_rng(0).negative_binomial(1, 0.01, 20_000)
    table = make_table(posts("g", scores.tolist()))
    counted = dict(count_rules(table, resolve_percentiles(rules, table)).quality)
    shares = [counted[rule.tag] / 20_000 for rule in rules.quality]
    assert np.abs(np.array(shares) - [0.05, 0.10, 0.10, 0.25, 0.25, 0.15, 0.10]).max() < 0.01


def test_rules_by_score_and_rating_need_no_index() -> None:
    quality = [QualityRule("fine", 5, rating="g"), QualityRule("good", 50), QualityRule("bad", rating="none")]
    rules = CaptionsConfig(quality=quality)
    assert resolve_percentiles(rules, make_table([])) is rules
    assert [quality_tag(score, rules, "g") for score in (4, 5, 50)] == ["", "fine", "good"]
    assert [quality_tag(score, rules, rating) for score, rating in ((5, "s"), (5, None), (50, None))] == [
        "", "bad", "good"]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "tags"),
    [
        (0.72, ["very aesthetic"]), (0.71, ["aesthetic"]), (0.45, ["displeasing"]), (0.27, ["very displeasing"]),
        (1, ["very aesthetic"]), (-1, ["very displeasing"]), (True, []), ("0.9", []), (None, []),
    ],
)  # fmt: skip
def test_tags_from_a_column(rules: CaptionsConfig, value: Any, tags: list[str]) -> None:
    extra = json.dumps({"aesthetic_score": value, "other": 5})
    assert column_tags({"extra": extra}, rules) == tags
    assert column_tags({"extra": None}, rules) == column_tags({"extra": '{"other": 5}'}, rules) == []


def test_several_columns() -> None:
    rules = CaptionsConfig(
        columns=[ColumnRule("a", "high", 5), ColumnRule("b", "wide", 1), ColumnRule("b", "wider", 2)]
    )
    assert column_tags({"extra": '{"a": 6, "b": 3}'}, rules) == ["high", "wider"]
    assert column_tags({"extra": '{"a": 5, "b": 2}'}, rules) == ["wide"]
    counted = dict(count_rules(make_table([{"extra": '{"a": 6, "b": 3}'}, {"extra": None}]), rules).columns)
    assert counted == {"high": 1, "wide": 0, "wider": 1, "": 2}


def test_a_caption(rules: CaptionsConfig) -> None:
    table = make_table(posts("e", list(range(100))))
    record = BLANK | {"tags_general": "smile 1girl", "tags_character": "hatsune_miku", "rating": "e", "score": 99,
                      "year": 2019, "extra": '{"aesthetic_score": 0.5}'}  # fmt: skip
    assert compose_caption(record, ready_rules(resolve_percentiles(rules, table))) == (
        "1girl, hatsune miku ||| explicit, nsfw, smile, recent, masterpiece, aesthetic"
    )
