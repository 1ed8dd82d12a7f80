"""What the card says of the special tags, from the rules that made the captions."""

import math
from typing import Any

from trainer.config.schema import CaptionsConfig

RATING_WORDS = {"g": "general", "s": "sensitive", "q": "questionable", "e": "explicit"}


def best_quality(captions: CaptionsConfig) -> list[str]:
    """The two highest quality tags, with which prompts begin."""
    return list(dict.fromkeys(tag for tag, *_ in quality_rows(captions)))[:2]


def caution(captions: CaptionsConfig) -> dict[str, list[str]]:
    """What the card of Animagine XL 3.0 says of its quality tags, in the tags of these captions.

    ``best`` go by scores, which many posts have that are not safe for work: ``general`` tags belong into the prompt,
    ``unsafe`` ones into the negative prompt.
    """
    tags = {rating: captions.ratings[rating].split(", ") for rating in RATING_WORDS if captions.ratings.get(rating)}
    unsafe = [tag for tag in tags.get("q", []) if tag in tags.get("e", [])] + tags.get("s", [])
    return {"best": best_quality(captions), "general": tags.get("g", []), "unsafe": unsafe}


def describe_tags(captions: CaptionsConfig) -> dict[str, Any]:
    """Rows of the tables of quality, rating and year tags, and of those from other numbers of the posts."""
    by_rating = any(rule.rating for rule in captions.quality)
    return {
        "quality": {
            "by_rating": by_rating,
            "rows": [row if by_rating else row[:2] for row in quality_rows(captions)],
        },
        "ratings": [[RATING_WORDS[key], tag] for key, tag in captions.ratings.items()],
        "years": [[rule.tag, f"{rule.first} to {rule.last}"] for rule in captions.years],
        "columns": [
            [rule.tag, rule.column, "the rest" if rule.above is None else f"above {rule.above:g}"]
            for rule in captions.columns
        ],
    }


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
                words = [
                    f"above that of {limit:g}%" if limit is not None else "",
                    f"up to {higher:g}%" if higher else "",
                ]
                scores = ", ".join(word for word in words if word) + " of the posts of its rating"
            elif higher is None:
                scores = "all" if limit is None else f"{limit} and above"
            else:
                scores = f"below {higher}" if limit is None else f"{limit} to {int(higher) - 1}"
            rows.append([tag, scores, RATING_WORDS.get(str(rating), str(rating or "all"))])
            higher = limit
    return rows
