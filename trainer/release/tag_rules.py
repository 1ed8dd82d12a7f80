"""The tags that the rules of captions gave: which of them there were samples for, and the card's tables of them."""

import dataclasses
import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from trainer.config.caption_fields import CaptionPart, ColumnRule, default_template
from trainer.config.schema import CaptionsConfig

RATING_WORDS = {"g": "general", "s": "sensitive", "q": "questionable", "e": "explicit"}


PART_WORDS = {
    ("tags", "people"): "who", ("tags", "character"): "characters", ("tags", "copyright"): "series",
    ("tags", "artist"): "artists", ("tags", "general"): "everything else", ("tags", "meta"): "tags of the file",
    ("tag", "rating"): "rating", ("tag", "quality"): "quality", ("tag", "year"): "year",
    ("tag", "columns"): "tags from numbers", ("caption", "natural"): "a description",
}  # fmt: skip
MIX_WORDS = {
    "tags": "tags alone",
    "natural": "a description alone",
    "tags_natural": "tags, then a description",
    "natural_tags": "a description, then tags",
}


def keep_asked(captions: CaptionsConfig) -> CaptionsConfig:
    """Rules of captions without those that no part of the template asks for."""
    asked = {part.tag for part in captions.template}
    people = any(part.tags == "people" for part in captions.template)
    return dataclasses.replace(
        captions,
        people=captions.people if people else [],
        quality=captions.quality if "quality" in asked else [],
        ratings=captions.ratings if "rating" in asked else {},
        years=captions.years if "year" in asked else [],
    )


def describe_order(captions: CaptionsConfig) -> list[str]:
    """The parts of a caption in words, those that are shuffled together as one; empty for the recipe's order."""
    if captions.template == default_template():
        return []
    order: list[str] = []
    for fixed, parts in groupby(captions.template, key=lambda part: part.fixed or not captions.shuffle):
        names = [name_part(part) for part in parts]
        alone = fixed or len(names) == 1
        order += names if alone else [f"{', '.join(names[:-1])} and {names[-1]} in any order"]
    return order


def name_part(part: CaptionPart) -> str:
    """One part of a caption in words."""
    for kind in ("tags", "tag", "caption"):
        if (what := getattr(part, kind)) is not None:
            return PART_WORDS[kind, what]
    return part.column or f'"{part.text}"'


def describe_mix(captions: CaptionsConfig) -> list[str]:
    """The kinds of captions with their shares, in words; empty where samples had one each."""
    shares = {words: getattr(captions.mix, kind) for kind, words in MIX_WORDS.items()}
    return [f"{words} ({share:.0%})" for words, share in shares.items() if share]


def ends_with_quality(captions: CaptionsConfig) -> bool:
    """Whether the quality tag has a fixed place after the general tags."""
    template = captions.template
    quality = [place for place, part in enumerate(template) if part.tag == "quality" and part.fixed]
    general = [place for place, part in enumerate(template) if part.tags == "general"]
    return bool(quality and general) and quality[0] > general[0]


def keep_taught(captions: CaptionsConfig, taught: Mapping[str, int] | None) -> CaptionsConfig:
    """Rules of captions without those that gave no sample a tag, as far as what samples had is known."""
    captions = keep_asked(captions)
    if taught is None:
        return captions
    return dataclasses.replace(
        captions,
        people=captions.people if taught.get("tags_general") else [],
        quality=captions.quality if taught.get("score") else [],
        ratings=captions.ratings if taught.get("rating") else {},
        years=captions.years if taught.get("year") else [],
        columns=[rule for rule in captions.columns if taught.get(f"extra.{rule.column}")],
    )


def count_captions(taught: Mapping[str, int] | None) -> tuple[int, int]:
    """Finished captions, and how often something else had a part in one; two zeros where that is not known."""
    counts = taught or {}
    return counts.get("caption", 0), sum(count for name, count in counts.items() if name != "caption")


def list_categories(taught: Mapping[str, int] | None) -> list[str]:
    """What stands between the people and everything else in composed captions, as the card calls it."""
    names = {"character": "characters", "copyright": "series", "artist": "artists"}
    return [name for key, name in names.items() if taught is None or taught.get(f"tags_{key}")]


def best_tags(captions: CaptionsConfig) -> list[str]:
    """The two tags of the highest scores; fewer where there are no more."""
    return list(dict.fromkeys(tag for tag, *_ in quality_rows(captions)))[:2]


def special_tags(captions: CaptionsConfig) -> list[str]:
    """All tags of quality, rating, years and numbers, of which none says what is in an image."""
    ratings = [tag for tags in captions.ratings.values() for tag in tags.split(", ")]
    quality, years = [rule.tag for rule in captions.quality], [rule.tag for rule in captions.years]
    return quality + years + [rule.tag for rule in captions.columns] + ratings


def caution(captions: CaptionsConfig) -> dict[str, list[str]]:
    """What the card of Animagine XL 3.0 says of its quality tags, in the tags of these captions.

    The best ones go by scores, which many posts have that are not safe for work: ``general`` tags belong into the
    prompt, ``unsafe`` ones into the negative prompt.
    """
    tags = {rating: captions.ratings[rating].split(", ") for rating in RATING_WORDS if captions.ratings.get(rating)}
    unsafe = [tag for tag in tags.get("q", []) if tag in tags.get("e", [])] + tags.get("s", [])
    return {"general": tags.get("g", []), "unsafe": unsafe}


def describe_tags(captions: CaptionsConfig) -> dict[str, Any]:
    """Rows of the tables of quality and rating tags."""
    by_rating = any(rule.rating for rule in captions.quality)
    return {
        "quality": {"by_rating": by_rating, "rows": [row[: 2 + by_rating] for row in quality_rows(captions)]},
        "ratings": [[RATING_WORDS[key], tag] for key, tag in captions.ratings.items()],
        "numbers": [[rule.tag, describe_column(rule)] for rule in captions.columns],
    }


def describe_column(rule: ColumnRule) -> str:
    """Of which numbers a rule's tag is, in words."""
    if rule.above_percentile is not None:
        limit = f" above that of {rule.above_percentile:g}% of the posts of its rating"
    else:
        limit = ", the rest" if rule.above is None else f" above {rule.above:g}"
    aged = f", which halves with each {rule.half_life:g} years of age" if rule.half_life is not None else ""
    only = f" ({RATING_WORDS.get(rule.rating, 'no rating')} only)" if rule.rating is not None else ""
    return f"{rule.column}{limit}{aged}{only}"


def quality_rows(captions: CaptionsConfig) -> list[list[str]]:
    """[tag, scores, rating] of each quality rule, from the highest to the lowest of each rating."""
    rows = []
    for rating in dict.fromkeys(rule.rating for rule in captions.quality):
        own = [rule for rule in captions.quality if rule.rating == rating]
        shares = any(rule.above_percentile is not None for rule in own)
        limits = [(rule.above_percentile if shares else rule.min_score, rule.tag) for rule in own]
        higher: float | None = None
        for limit, tag in sorted(limits, key=lambda item: -math.inf if item[0] is None else item[0], reverse=True):
            if shares:
                above = [f"above that of {limit:g}%"] if limit is not None else []
                up_to = [f"up to {higher:g}%"] if higher else []
                scores = ", ".join(above + up_to) + " of the posts of its rating"
            elif higher is None:
                scores = "all" if limit is None else f"{limit} and above"
            else:
                scores = f"below {higher}" if limit is None else f"{limit} to {int(higher) - 1}"
            rows.append([tag, scores, RATING_WORDS.get(str(rating), str(rating or "all"))])
            higher = limit
    return rows
