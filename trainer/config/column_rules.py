"""Rules between the values of ``captions.columns``: which tags exclude each other, and how their limits are found."""

from collections.abc import Iterator
from itertools import combinations

from trainer.config.caption_fields import ColumnRule
from trainer.config.schema import Config

LEAST_HALF_LIFE = 1  # years: with less, what a year counts would leave the numbers of fp32


def column_rules(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    columns = config.captions.columns
    for column in dict.fromkeys(rule.column for rule in columns):
        yield from ((("captions.columns",), said) for said in find_faults_of_column([
            rule for rule in columns if rule.column == column
        ]))  # fmt: skip


def find_faults_of_column(rules: list[ColumnRule]) -> Iterator[str]:
    """What is wrong with the rules of one column."""
    by_percentile = [rule for rule in rules if rule.above_percentile is not None]
    if by_percentile and any(rule.above is not None for rule in rules):
        yield "give either above or above_percentile for a column, not both"
    if any(not 0 < (rule.above_percentile or 0) < 100 for rule in by_percentile):
        yield "above_percentile must lie between 0 and 100"
    if any(
        (one.above, one.above_percentile) == (other.above, other.above_percentile)
        and (one.rating == other.rating or None in (one.rating, other.rating))  # a rule for all meets those of each
        for one, other in combinations(rules, 2)
    ):
        yield "two tags of a column have the same above or above_percentile"
    half_lives = {rule.half_life for rule in rules if rule.half_life is not None}
    if half_lives and not by_percentile:
        yield "half_life has no effect without above_percentile"
    if any(years < LEAST_HALF_LIFE for years in half_lives):
        yield f"half_life must be at least {LEAST_HALF_LIFE} year"
    if len(half_lives) > 1 or (half_lives and any(rule.half_life is None for rule in by_percentile)):
        yield "a column has one half_life: give it to each rule with above_percentile"
