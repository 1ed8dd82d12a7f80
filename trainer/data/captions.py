"""The words of one post: its tags as a caption spells them, and the tags that rules make of its numbers.

What is made of them, in which order, says ``template``; what a pass sees of that, ``caption_draws``. The index stores
the post's fields, not the caption, so rules can change without encoding an image again.
"""

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trainer.config.schema import CaptionsConfig

# between the variants of one caption, of which each draw takes one: ASCII's own record separator, which no text has
VARIANT_SEPARATOR = "\x1e"
BASE_YEAR = 2000  # of which a value counts once


def split_tags(tags: str | None, rules: CaptionsConfig) -> list[str]:
    """Tags at spaces, as they are spelt in captions."""
    return spell_tags((tags or "").split(), rules)


def spell_tags(tags: Iterable[str], rules: CaptionsConfig) -> list[str]:
    """ "_" becomes " " only in tags longer than ``keep_underscore_max_length`` (``^_^`` stays)."""
    longest, separator = rules.keep_underscore_max_length, rules.keep_tokens_separator
    words = [tag if len(tag) <= longest else tag.replace("_", " ") for tag in tags]
    return [tag if separator not in tag else hide_separator(tag, separator) for tag in words]


def hide_separator(tag: str, separator: str) -> str:
    """A tag that holds the separator, which would cut the caption there: spaces go between the separator's characters.

    Where that does not part them, as with a separator of one character, no tag is left.
    """
    hidden = " ".join(tag.replace(separator, f" {' '.join(separator)} ").split())
    return hidden if separator not in hidden else ""


def year_tag(year: int | None, rules: CaptionsConfig) -> str:
    """The period's tag; none where the year is missing or outside all periods."""
    if year is None:
        return ""
    return next((rule.tag for rule in rules.years if rule.first <= year <= rule.last), "")


def quality_tag(score: int | None, rules: CaptionsConfig, rating: str | None = None) -> str:
    """The tag of the highest of the rating's rules that the score reaches; none without a score."""
    if score is None:
        return ""
    own = rating or "none"
    best, tag = -math.inf, ""
    for rule in rules.quality:
        least = -math.inf if rule.min_score is None else rule.min_score
        if least <= score and (best < least or not tag) and (rule.rating is None or rule.rating == own):
            best, tag = least, rule.tag
    return tag


def column_tags(record: Mapping[str, Any], rules: CaptionsConfig, columns: Sequence[str] | None = None) -> list[str]:
    """For each column that has rules, the tag of the highest that the post's number is above; none without a number.

    Args:
        record: has ``extra``, and of the index's other columns those that rules are about.
        columns: those that are looked at; None: all.
    """
    extra = record["extra"]
    values = json.loads(extra) if extra and rules.columns else {}
    rating = record.get("rating") or "none"
    tags = []
    for column in dict.fromkeys(rule.column for rule in rules.columns) if columns is None else columns:
        value = record.get(column)
        value = value if isinstance(value, int) else values.get(column)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        own = [
            rule
            for rule in rules.columns
            if rule.column == column
            and rule.rating in (None, rating)
            and holds_of(value, record.get("year"), rule.above, rule.half_life)
        ]
        if own:
            tags.append(max(own, key=lambda rule: -math.inf if rule.above is None else rule.above).tag)
    return tags


def holds_of(value: float, year: int | None, above: float | None, half_life: float | None) -> bool:
    """Whether a number, aged where it is to be, is above a limit."""
    if half_life is None:
        return above is None or value > above
    return year is not None and (above is None or value * age_factor(year, half_life) > above)


@functools.lru_cache(maxsize=1024)
def age_factor(year: int, half_life: float) -> float:
    """What a value of a year counts beside one of 2000: twice as much for each half-life that it is younger.

    Which year is 1 changes no order, so that none has to be recorded. Rounded to fp32, because last bits of a power are
    not the same on every machine.
    """
    return float(np.float32(2.0 ** ((year - BASE_YEAR) / half_life)))


def column_text(record: Mapping[str, Any], column: str) -> str:
    """What another field of the post, or a column of the index, says as it is; of true and false nothing."""
    value = json.loads(record["extra"]).get(column) if record["extra"] else None
    value = record.get(column) if value is None else value
    return "" if value is None or isinstance(value, bool) else str(value)


def split_caption(text: str) -> list[str]:
    """Tags at every comma, so that ``rating: explicit`` and ``nsfw`` move apart, as in the original."""
    return [tag for part in text.split(",") if (tag := part.strip())]
