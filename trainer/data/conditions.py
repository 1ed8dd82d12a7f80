"""Which rows of an index have a tag, a number in a column, a rare artist: what rules ask, for all rows at once.

A million rows take a second or two a question: text is searched by Arrow, and only what may match is looked at in
Python.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.config.schema import CaptionsConfig, ImageRule
from trainer.data.captions import VARIANT_SEPARATOR, quality_tag, year_tag
from trainer.data.shards import SCHEMA
from trainer.data.sites import TAG_CATEGORIES


def find_images_of(table: pa.Table, rule: ImageRule, captions: CaptionsConfig) -> np.ndarray:
    """The rows of which a rule holds, bool (n,)."""
    holds = np.ones(len(table), dtype=bool)
    if rule.tag is not None:
        holds &= find_tag(table, rule.tag, captions)
    if rule.rating is not None:
        holds &= find_rating(table, rule.rating)
    if rule.column is not None and rule.equals is not None:
        holds &= find_equal(table, rule.column, rule.equals)
    elif rule.column is not None:
        numbers = read_numbers(table, rule.column)  # NaN is neither above nor below anything
        holds &= ~np.isnan(numbers)
        holds &= numbers > (-np.inf if rule.above is None else rule.above)
        holds &= numbers < (np.inf if rule.below is None else rule.below)
    for category in ("artist", "character", "copyright"):
        below = getattr(rule, f"{category}_count_below")
        if below is not None:
            rarest = count_rarest(table, category)
            holds &= (rarest > 0) & (rarest < below)
    return holds


def find_tag(table: pa.Table, tag: str, rules: CaptionsConfig) -> np.ndarray:
    """Rows that have a tag: of the post, in its finished caption, or one that its score or year gives. Bool (n,).

    "_" and " " are the same.
    """
    words = tag.strip().replace("_", " ")
    found = find_written(table, words, rules.keep_tokens_separator)
    if words in [rule.tag for rule in rules.quality]:
        given = ("score", "rating")
        found |= find_given(table, given, lambda row: quality_tag(row["score"], rules, row["rating"]) == words)
    if words in [rule.tag for rule in rules.years]:
        found |= find_given(table, ("year",), lambda row: year_tag(row["year"], rules) == words)
    return found


def find_written(table: pa.Table, words: str, separator: str) -> np.ndarray:
    """Rows whose post has a tag, or whose finished caption has it between commas or separators; bool (n,)."""
    found = np.zeros(len(table), dtype=bool)
    word = words.replace(" ", "_")
    for category in TAG_CATEGORIES:
        column = table[f"tags_{category}"]
        places = find_text(column, word)
        whole = pc.match_substring_regex(column.take(places), rf"(^|\s){re.escape(word)}(\s|$)")
        found[places[whole.to_numpy()]] = True
    anywhere = pc.match_substring_regex(table["caption"], "[ _]".join(map(re.escape, words.split(" "))))
    for place in np.flatnonzero(to_mask(anywhere)).tolist():
        caption = table["caption"][place].as_py().replace("_", " ")
        pieces = caption.replace(VARIANT_SEPARATOR, ",").replace(separator, ",").split(",")
        found[place] = found[place] or words in [piece.strip() for piece in pieces]
    return found


def find_text(column: pa.ChunkedArray, text: str) -> np.ndarray:
    """The rows of a column that hold some text, int64."""
    return np.flatnonzero(to_mask(pc.match_substring(column, text)))


def find_given(table: pa.Table, columns: tuple[str, ...], holds: Any) -> np.ndarray:
    """Rows of whose values in some columns something holds, which is asked once for each that occur; bool (n,)."""
    codes = [table[name].combine_chunks().dictionary_encode(null_encoding="encode") for name in columns]
    numbers = np.zeros(len(table), dtype=np.int64)
    for each in codes:
        numbers = numbers * len(each.dictionary) + each.indices.to_numpy()
    _, firsts, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    some = table.select(columns).take(firsts).to_pylist()
    return np.array([bool(holds(row)) for row in some], dtype=bool)[inverse]


def find_rating(table: pa.Table, rating: str) -> np.ndarray:
    """Rows of a rating, or of none; bool (n,)."""
    return to_mask(pc.equal(pc.fill_null(table["rating"], "none"), rating))


def find_equal(table: pa.Table, column: str, text: str) -> np.ndarray:
    """Rows whose value in a column is this text, or the number that it spells; bool (n,)."""
    if column in SCHEMA.names and pa.types.is_string(SCHEMA.field(column).type):
        return to_mask(pc.equal(table[column], text))
    try:
        found = read_numbers(table, column) == float(text)
    except ValueError:
        found = np.zeros(len(table), dtype=bool)
    if column not in SCHEMA.names:
        for place, value in iterate_extra(table, column):
            found[place] |= value == text
    return found


def read_numbers(table: pa.Table, column: str) -> np.ndarray:
    """A column's numbers, or those of another field of the posts; NaN where there is none. float64 (n,)."""
    if column in SCHEMA.names:
        if not pa.types.is_integer(SCHEMA.field(column).type):
            return np.full(len(table), np.nan)
        return pc.fill_null(table[column].cast(pa.float64()), np.nan).to_numpy()
    numbers = np.full(len(table), np.nan)
    for place, value in iterate_extra(table, column):
        if isinstance(value, int | float) and not isinstance(value, bool):
            numbers[place] = value
    return numbers


def iterate_extra(table: pa.Table, name: str) -> Iterator[tuple[int, Any]]:
    """(row, value) of the posts that have a field beside the index's columns."""
    places = find_text(table["extra"], json.dumps(name, ensure_ascii=False))
    for place, text in zip(places.tolist(), table["extra"].take(places), strict=True):
        value = json.loads(text.as_py()).get(name)
        if value is not None:
            yield place, value


def count_rarest(table: pa.Table, category: str) -> np.ndarray:
    """How many rows have the rarest of a row's tags of a category; 0 where it has none. int64 (n,)."""
    column = pc.utf8_trim_whitespace(table[f"tags_{category}"].combine_chunks())
    lists = pc.utf8_split_whitespace(pc.if_else(pc.equal(column, ""), None, column))
    words = lists.flatten().dictionary_encode().indices.to_numpy()
    rarest = np.zeros(len(table), dtype=np.int64)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    filled = lengths > 0
    if filled.any():
        starts = (np.cumsum(lengths) - lengths)[filled]
        rarest[filled] = np.minimum.reduceat(np.bincount(words)[words], starts)
    return rarest


def to_mask(values: pa.ChunkedArray) -> np.ndarray:
    """Arrow's answers as bool (n,), null as no."""
    return pc.fill_null(values, False).to_numpy()
