"""Rules by percentile over any column: per rating, aged where they have a half-life, recorded like those of scores."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.posts_on_disk import rows_to_table
from support.set_on_disk import row, write_set
from trainer.config.caption_fields import ColumnRule
from trainer.config.schema import CaptionsConfig, Config
from trainer.core.errors import UserError
from trainer.data.captions import column_tags
from trainer.data.percentiles import choose_thresholds, resolve_anew
from trainer.report.data_page import make_report
from trainer.report.thresholds import find_caption_rules


def rules_of(*rules: ColumnRule) -> CaptionsConfig:
    return CaptionsConfig(columns=list(rules), quality=[])


def favourites(count: int, rating: str = "g", year: int | None = 2020, **more: Any) -> dict[str, Any]:
    return {"extra": json.dumps({"fav_count": count}), "rating": rating, "year": year, **more}


def tags_of(rows: list[dict[str, Any]], rules: CaptionsConfig) -> list[list[str]]:
    table = rows_to_table([row(f"{number:04}", **each) for number, each in enumerate(rows)])
    captions = resolve_anew(rules, table, "").captions
    return [column_tags(each, captions) for each in table.to_pylist()]


BEST = ColumnRule("fav_count", "best", above_percentile=90)
REST = ColumnRule("fav_count", "rest")


def test_percentiles_are_those_of_each_rating() -> None:
    rows = [favourites(number) for number in range(10)] + [favourites(100 * number, "e") for number in range(10)]
    found = tags_of([*rows, favourites(5, "q"), {"extra": None, "rating": "g"}, {"extra": '{"fav_count": "9"}'}],
                    rules_of(BEST, REST))  # fmt: skip
    assert [place for place, tags in enumerate(found) if tags == ["best"]] == [9, 19]
    assert found[20:] == [["rest"], [], []]  # one alone is above nothing; no number, no tag
    only = ColumnRule("fav_count", "best", above_percentile=50, rating="e")
    assert [tags == ["best"] for tags in tags_of(rows, rules_of(only))] == [False] * 15 + [True] * 5


def test_a_column_of_the_index_and_floats() -> None:
    rows = [{"score": number, "extra": json.dumps({"looks": number / 7}), "rating": "s"} for number in range(-5, 5)]
    rules = rules_of(ColumnRule("score", "high", above_percentile=70), ColumnRule("looks", "fine", above_percentile=50))
    expected = [[tag for tag, from_ in (("high", 7), ("fine", 5)) if place >= from_] for place in range(10)]
    assert tags_of(rows, rules) == expected


def test_age_lets_old_posts_count_less() -> None:
    rows = [favourites(80, year=2010), favourites(30, year=2020), favourites(16, year=2019), favourites(21, year=None)]
    plain = rules_of(ColumnRule("fav_count", "best", above_percentile=60), REST)
    aged = rules_of(ColumnRule("fav_count", "best", above_percentile=60, half_life=5), REST)
    # by 2020: 80 of 2010 count 20, 30 count 30, 16 of 2019 count 13.9
    assert tags_of(rows, plain) == [["best"], ["rest"], ["rest"], ["rest"]]
    assert tags_of(rows, aged) == [["rest"], ["best"], ["rest"], []]
    # which year is looked from changes nothing: a set of another decade has the same order
    later = [each | {"year": None if each["year"] is None else each["year"] - 40} for each in rows]
    assert tags_of(later, aged) == tags_of(rows, aged)


def test_a_value_at_the_limit_is_not_above_it_in_any_year() -> None:
    generator = np.random.default_rng(3)
    rows = [
        favourites(int(count), year=int(year)) for count, year in generator.integers((1, 1990), (900, 2030), (400, 2))
    ]
    found = tags_of(rows, rules_of(ColumnRule("fav_count", "best", above_percentile=50, half_life=3.7), REST))
    assert sum(tags == ["best"] for tags in found) == 200  # all differ


def test_thresholds_are_recorded_and_taken_over() -> None:
    rules = rules_of(BEST, REST)
    whole = rows_to_table([row(str(number), **favourites(number)) for number in range(100)])
    few = rows_to_table([row(str(number), **favourites(number)) for number in range(95, 100)])
    first = choose_thresholds(rules, whole)
    recorded = json.loads(json.dumps(first.thresholds))
    second = choose_thresholds(rules, few, base=recorded)
    assert second.source == "the base's lineage" and second.captions == first.captions
    assert [column_tags(each, second.captions) for each in few.to_pylist()] == [["best"]] * 5
    other = rules_of(ColumnRule("fav_count", "best", above_percentile=80), REST)
    assert choose_thresholds(other, few, base=recorded).source != second.source
    assert choose_thresholds(other, few, base={"rules": [], "resolved": []}).source != second.source
    for change in ({"tag": 5}, {"above": "7"}, {"above_percentile": 5.0}, {"column": None}, {"rating": "x"}):
        rows = [each | change for each in recorded["columns"]["resolved"]]
        with pytest.raises(UserError, match="rules of columns that the base's lineage records are damaged"):
            choose_thresholds(rules, few, base=recorded | {"columns": recorded["columns"] | {"resolved": rows}})
    # sets without a column by percentile record what they did before
    assert "columns" not in (resolve_anew(CaptionsConfig(), whole, "").thresholds or {})


def test_the_page_counts_them(make_config: Callable[..., Config], tmp_path: Path) -> None:
    rows = [row(str(number), **favourites(number, score=number)) for number in range(10)]
    shards = write_set(tmp_path / "set", rows)
    words = ["captions.quality=[]", f"data.shards={shards}", "captions.columns=[{column: fav_count, tag: best, "
             "above_percentile: 70}, {column: fav_count, tag: rest}, {column: score, tag: high, above: 7}]",
             ]  # fmt: skip
    config = make_config(*words)
    assert dict(make_report(config).rules.columns) == {"best": 3, "rest": 7, "high": 2, "": 8}
    rules = find_caption_rules(config, rows_to_table([row("1", **favourites(5))]))
    assert [rule.above_percentile for rule in rules.config.columns] == [None] * 3
