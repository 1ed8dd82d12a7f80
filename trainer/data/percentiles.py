"""Rules by percentile -> rules by value: the thresholds of each rating, from the numbers of a whole index.

A curated set has other scores than the one that taught the tags: by its own percentiles a tenth of masterpieces would
become "worst quality". So thresholds are recorded once they are resolved, and later stages take them over.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.config.caption_fields import ColumnRule, QualityRule
from trainer.config.schema import RATINGS, CaptionsConfig
from trainer.core.errors import UserError, shorten
from trainer.core.json_text import read_json
from trainer.core.layout import MANIFEST_FILE, RUN_FILE
from trainer.data.captions import age_factor
from trainer.data.conditions import read_numbers
from trainer.data.index import open_index

RATING_GROUPS = (*RATINGS, "none")  # posts without a rating are a group of their own

OWN_SCORES = "the scores of this set itself"

# JSON values. "rules": of quality, by percentile as configured; "resolved": the same by score; "columns": both of
# captions.columns, where one of those goes by percentile
Thresholds = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Caption rules by score, and where their thresholds come from."""

    captions: CaptionsConfig
    thresholds: Thresholds | None  # to record; None where no rule is by percentile
    source: str  # in words


def choose_thresholds(
    rules: CaptionsConfig, table: pa.Table, *, own: Thresholds | None = None, base: Thresholds | None = None
) -> Resolved:
    """Rules by score for rules by percentile.

    They are those that this run recorded, else those of ``captions.thresholds_from``, else those that the base was
    trained with, else those of this set's own scores.

    Args:
        own: what this run's checkpoint recorded.
        base: what the base's lineage records; of no use where its rules are other ones.

    Raises:
        UserError: where ``captions.thresholds_from`` has no thresholds for these rules, or others than the run's.
    """
    if not by_percentile(rules):
        return Resolved(rules, None, "")
    named = None if rules.thresholds_from is None else Path(rules.thresholds_from).expanduser()
    if own is not None:
        if named is not None and named.exists() and read_thresholds(rules, named).thresholds != own:
            raise UserError(
                f"captions.thresholds_from: {named} has other thresholds than this run began with; take it out"
            )
        return take_over(rules, own, "this run's records")
    if named is not None:
        return read_thresholds(rules, named)
    # a base whose set had no scores has no thresholds
    if isinstance(base, dict) and is_of(base, rules) and (base.get("resolved") or base.get("columns")):
        return take_over(rules, base, "the base's lineage")
    return resolve_anew(rules, table, OWN_SCORES)


def read_thresholds(rules: CaptionsConfig, folder: Path) -> Resolved:
    """The thresholds of another set of shards, by its scores, or of another run, as it recorded them."""
    if (folder / MANIFEST_FILE).is_file():
        return resolve_anew(rules, open_index(folder).table, f"the scores of {folder}")
    run = folder / RUN_FILE
    if not run.is_file():
        raise UserError(f"captions.thresholds_from: {folder} is neither a set of shards nor a run's folder")
    recorded: Any = read_json(run).get("thresholds")
    if not isinstance(recorded, dict) or not is_of(recorded, rules):
        reason = "has other rules by percentile" if recorded else "records no thresholds"
        raise UserError(f"captions.thresholds_from: {folder} {reason}; name the set of shards that it was trained on")
    return take_over(rules, recorded, f"the run {folder}")


def take_over(rules: CaptionsConfig, recorded: Thresholds, source: str) -> Resolved:
    """Rules by score as they were recorded.

    Raises:
        UserError: where they are no such rules: a base's lineage is somebody else's.
    """
    rows = recorded.get("resolved")
    if not isinstance(rows, list) or not all(is_rule(row) for row in rows):
        raise UserError(f"the quality rules by score that {source} records are damaged: {shorten(repr(rows), 120)}")
    captions = dataclasses.replace(rules, quality=[QualityRule(**row) for row in rows])
    if describe_columns(rules):
        rows = recorded["columns"].get("resolved")
        if not isinstance(rows, list) or not all(is_column_rule(row) for row in rows):
            raise UserError(f"the rules of columns that {source} records are damaged: {shorten(repr(rows), 120)}")
        captions = dataclasses.replace(captions, columns=[ColumnRule(**row) for row in rows])
    return Resolved(captions, recorded, source)


def is_of(recorded: Thresholds, rules: CaptionsConfig) -> bool:
    """Whether recorded thresholds are of these rules by percentile."""
    columns = recorded.get("columns")
    own = columns.get("rules") if isinstance(columns, dict) else None
    return recorded.get("rules") == describe_rules(rules) and (own or []) == describe_columns(rules)


def is_column_rule(row: Any) -> bool:
    """Whether a JSON value is a rule of a column by value, as ``describe_columns`` writes it."""
    if not isinstance(row, dict) or row.keys() != {field.name for field in dataclasses.fields(ColumnRule)}:
        return False
    numbers = (row["above"], row["half_life"])
    numeric = all(each is None or (isinstance(each, int | float) and not isinstance(each, bool)) for each in numbers)
    known = row["rating"] in (None, *RATING_GROUPS) and row["above_percentile"] is None
    return isinstance(row["column"], str) and isinstance(row["tag"], str) and numeric and known


def is_rule(row: Any) -> bool:
    """Whether a JSON value is a quality rule by score, as ``describe_rules`` writes it."""
    if not isinstance(row, dict) or row.keys() != {field.name for field in dataclasses.fields(QualityRule)}:
        return False
    known = row["rating"] in (None, *RATING_GROUPS) and row["above_percentile"] is None
    scored = row["min_score"] is None or (isinstance(row["min_score"], int) and not isinstance(row["min_score"], bool))
    return isinstance(row["tag"], str) and scored and known


def resolve_anew(rules: CaptionsConfig, table: pa.Table, source: str) -> Resolved:
    """Rules by score from the scores of an index, with what is to be recorded of them."""
    captions = resolve_percentiles(rules, table)
    recorded: Thresholds = {"rules": describe_rules(rules), "resolved": describe_rules(captions)}
    if described := describe_columns(rules):
        captions = dataclasses.replace(captions, columns=resolve_columns(rules.columns, table))
        recorded["columns"] = {"rules": described, "resolved": list(map(dataclasses.asdict, captions.columns))}
    return Resolved(captions, recorded, source)


def by_percentile(rules: CaptionsConfig) -> bool:
    """Whether some rule goes by percentile."""
    return quality_by_percentile(rules) or bool(describe_columns(rules))


def quality_by_percentile(rules: CaptionsConfig) -> bool:
    """Whether some quality rule does."""
    return any(rule.above_percentile is not None for rule in rules.quality)


def describe_columns(rules: CaptionsConfig) -> list[Mapping[str, Any]]:
    """Rules of columns as JSON values; none where no column goes by percentile."""
    if all(rule.above_percentile is None for rule in rules.columns):
        return []
    return [dataclasses.asdict(rule) for rule in rules.columns]


def describe_rules(rules: CaptionsConfig) -> list[Mapping[str, Any]]:
    """Quality rules as JSON values."""
    return [dataclasses.asdict(rule) for rule in rules.quality]


def resolve_percentiles(rules: CaptionsConfig, table: pa.Table) -> CaptionsConfig:
    """The same rules with scores for percentiles, the same for the same index; unchanged where there are none.

    A score is above p percent when more than that share of its rating's posts have scores below its own: it lies above
    the least score s at which p percent of them have s or less. Source: the card of Animagine XL 3.1, whose quality
    tags consider "both scores and post ratings".
    """
    if not quality_by_percentile(rules):
        return rules
    ratings = pc.fill_null(table["rating"], "none").to_numpy(zero_copy_only=False)
    has_score = pc.is_valid(table["score"]).to_numpy(zero_copy_only=False)
    scores = pc.fill_null(table["score"], 0).to_numpy()
    resolved: list[QualityRule] = []
    # the highest first: where few scores make two thresholds equal, the higher rule counts
    for rule in sorted(rules.quality, key=lambda rule: -(rule.above_percentile or 0)):
        for rating in RATING_GROUPS if rule.rating is None else (rule.rating,):
            own = scores[has_score & (ratings == rating)]
            if not len(own):
                continue
            least = rule.min_score
            if rule.above_percentile is not None:
                least = int(np.percentile(own, rule.above_percentile, method="inverted_cdf")) + 1
            resolved.append(QualityRule(rule.tag, least, rating=cast(Any, rating)))
    return dataclasses.replace(rules, quality=resolved)


def resolve_columns(rules: list[ColumnRule], table: pa.Table) -> list[ColumnRule]:
    """The rules of columns with values for percentiles, as with scores; a column without percentiles as it is."""
    ratings = pc.fill_null(table["rating"], "none").to_numpy(zero_copy_only=False)
    resolved: list[ColumnRule] = []
    for column in dict.fromkeys(rule.column for rule in rules):
        own_rules = [rule for rule in rules if rule.column == column]
        if all(rule.above_percentile is None for rule in own_rules):
            resolved += own_rules
            continue
        half_life = next((rule.half_life for rule in own_rules if rule.half_life is not None), None)
        numbers = read_aged(table, column, half_life)
        for rule in sorted(own_rules, key=lambda rule: -(rule.above_percentile or 0)):
            for rating in RATING_GROUPS if rule.rating is None else (rule.rating,):
                own = numbers[~np.isnan(numbers) & (ratings == rating)]
                if not len(own):
                    continue
                above = None
                if rule.above_percentile is not None:
                    above = float(np.percentile(own, rule.above_percentile, method="inverted_cdf"))
                resolved.append(ColumnRule(column, rule.tag, above, rating=cast(Any, rating), half_life=half_life))
    return resolved


def read_aged(table: pa.Table, column: str, half_life: float | None) -> np.ndarray:
    """A column's numbers, times what their years count where they have a half-life; NaN for none. float64 (n,)."""
    numbers = read_numbers(table, column)
    if half_life is None:
        return numbers
    years = table["year"].to_pylist()
    return numbers * np.array([np.nan if year is None else age_factor(year, half_life) for year in years])
