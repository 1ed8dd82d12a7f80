"""Post -> ordered caption; caption -> this pass's draw (keep, shuffle, drop).

A composed caption reads ``fixed ||| free``: people, characters, copyrights and artists in order, then all that is
shuffled. The index stores the post's fields, not the caption, so rules can change without encoding an image again.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from trainer.config.schema import CaptionsConfig

# between the variants of one caption, of which each draw takes one: ASCII's own record separator, which no text has
VARIANT_SEPARATOR = "\x1e"


def compose_caption(record: Mapping[str, Any], rules: CaptionsConfig) -> str:
    """The caption of one sample, before any shuffling.

    ``record`` has the index's columns: ``caption`` (a finished one, which wins), ``tags_general`` ... ``tags_meta``
    (separated by spaces), ``rating``, ``score``, ``year``, ``extra``; each may be None. Rules by percentiles must have
    been resolved. Recipe, section 2.
    """
    if record["caption"] is not None:
        return record["caption"]
    general = split_tags(record["tags_general"], rules)
    counts = frozenset(rules.people)
    people = [tag for tag in general if tag in counts]
    fixed = people + [
        tag for name in ("character", "copyright", "artist") for tag in split_tags(record[f"tags_{name}"], rules)
    ]
    free = [
        rules.ratings.get(record["rating"], ""),
        *(tag for tag in general if tag not in counts),
        year_tag(record["year"], rules),
        *split_tags(record["tags_meta"], rules),
        quality_tag(record["score"], rules, record["rating"]),
        *column_tags(record["extra"], rules),
    ]
    # the separator stays even beside an empty part: without it the caption would count as one that has none
    parts = [join_tags(fixed), rules.keep_tokens_separator, join_tags(free)]
    return " ".join(part for part in parts if part)


def split_tags(tags: str | None, rules: CaptionsConfig) -> list[str]:
    """Tags at spaces; "_" becomes " " only in tags longer than ``keep_underscore_max_length`` (``^_^`` stays)."""
    longest, separator = rules.keep_underscore_max_length, rules.keep_tokens_separator
    words = [tag if len(tag) <= longest else tag.replace("_", " ") for tag in (tags or "").split()]
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


def column_tags(extra: str | None, rules: CaptionsConfig) -> list[str]:
    """For each column that has rules, the tag of the highest that the post's number is above; none without a number."""
    values = json.loads(extra) if extra and rules.columns else {}
    tags = []
    for column in dict.fromkeys(rule.column for rule in rules.columns):
        value = values.get(column)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        own = [rule for rule in rules.columns if rule.column == column and (rule.above is None or value > rule.above)]
        if own:
            tags.append(max(own, key=lambda rule: -math.inf if rule.above is None else rule.above).tag)
    return tags


def draw_caption(caption: str, rules: CaptionsConfig, generator: np.random.Generator) -> str:
    """What the model sees of a caption this time: one of its variants, free tags dropped and shuffled, no separator.

    Text after a second separator is a fixed tail. A caption without separator is free as a whole but for its
    ``keep_tokens`` leading tags. Recipe, section 2. Only a caption with variants has a draw for them.
    """
    # all is drawn always and in this order, so that turning one knob leaves the draws of the others as they were
    if generator.random() < rules.caption_dropout:
        return ""
    if VARIANT_SEPARATOR in caption:
        variants = caption.split(VARIANT_SEPARATOR)
        caption = variants[int(generator.integers(len(variants)))]
    parts = caption.split(rules.keep_tokens_separator)
    if len(parts) == 1:
        tags = split_caption(caption)
        head, free, tail = tags[: rules.keep_tokens], tags[rules.keep_tokens :], []
    else:
        head, free = split_caption(parts[0]), split_caption(parts[1])
        tail = [tag for part in parts[2:] for tag in split_caption(part)]
    order = generator.permutation(len(free))
    if not rules.shuffle:
        order = np.arange(len(free))
    if rules.tag_dropout:  # the last of the draws
        kept = generator.random(len(free)) >= rules.tag_dropout
        order = order[kept[order]]
    return join_tags([*head, *[free[i] for i in order.tolist()], *tail])


def split_caption(text: str) -> list[str]:
    """Tags at every comma, so that ``rating: explicit`` and ``nsfw`` move apart, as in the original."""
    return [tag for part in text.split(",") if (tag := part.strip())]


def join_tags(tags: Iterable[str]) -> str:
    """Tags joined by commas; empty ones leave no stray comma."""
    return ", ".join([tag for tag in tags if tag])
