"""The card's tables of special tags, and what it says of them, from the rules that made the captions."""

import math
from collections.abc import Iterator

from trainer.config.schema import CaptionsConfig
from trainer.release.card_stages import table

RATINGS = {"g": "general", "s": "sensitive", "q": "questionable", "e": "explicit"}


def best_quality(captions: CaptionsConfig) -> list[str]:
    """The two highest quality tags, with which prompts begin."""
    return list(dict.fromkeys(tag for tag, *_ in quality_rows(captions)))[:2]


def caution(captions: CaptionsConfig) -> Iterator[str]:
    """What the card of Animagine XL 3.0 says of its quality tags, in the tags of these captions."""
    tags = {rating: captions.ratings[rating].split(", ") for rating in RATINGS if captions.ratings.get(rating)}
    unsafe = [tag for tag in tags.get("q", []) if tag in tags.get("e", [])] + tags.get("s", [])
    best, general = (", ".join(f"`{tag}`" for tag in some) for some in (best_quality(captions), tags.get("g", [])))
    if best and unsafe:
        yield (
            f"Be careful with {best}: they go by the scores of posts, and many posts of high score are not safe for "
            f"work. {f'Put {general} into the prompt, and' if general else 'Put'} "
            f"{', '.join(f'`{tag}`' for tag in unsafe)} into the negative prompt."
        )


def tag_tables(captions: CaptionsConfig) -> Iterator[str]:
    """Quality, rating and year tags, from the rules that made the captions."""
    yield "## Special tags"
    if captions.quality:
        by_rating = any(rule.rating for rule in captions.quality)
        rows = quality_rows(captions)
        yield table(["quality tag", "score of the post", *(["rating"] if by_rating else [])],
                    [row if by_rating else row[:2] for row in rows])  # fmt: skip
    if captions.ratings:
        yield table(["rating", "tags"], [[RATINGS[key], tag] for key, tag in captions.ratings.items()])
    if captions.years:
        yield table(["year tag", "years"], [[rule.tag, f"{rule.first} to {rule.last}"] for rule in captions.years])
    if captions.columns:
        yield table(["tag", "from the posts'", "numbers"], column_rows(captions))


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
            rows.append([tag, scores, RATINGS.get(str(rating), str(rating or "all"))])
            higher = limit
    return rows


def column_rows(captions: CaptionsConfig) -> list[list[str]]:
    """[tag, column, numbers] of each rule about a number that posts bring."""
    return [
        [rule.tag, rule.column, "the rest" if rule.above is None else f"above {rule.above:g}"]
        for rule in captions.columns
    ]
