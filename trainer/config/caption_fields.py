"""What the lists of the section captions hold, and how they are in the recipe. Comments are as in ``schema``."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class QualityRule:
    """A tag from a post's score. Of several rules that hold the highest wins."""

    tag: str  # the tag that the rule adds
    min_score: int | None = None  # the tag of scores from here up to the next rule's; null: all below
    above_percentile: float | None = None  # instead: scores above that of so many percent of the posts of its rating
    rating: Literal["g", "s", "q", "e", "none"] | None = None  # only posts of this rating, or without one; null: all


@dataclass(frozen=True)
class ColumnRule:
    """A tag from a number of a post, such as an aesthetic score. Of a column's rules that hold the highest wins."""

    column: str  # a number of the index (score, year, ...), or another field of the post, which it keeps in `extra`
    tag: str  # the tag that the rule adds
    above: float | None = None  # the tag of values above this up to the next rule's of the column; null: all below
    above_percentile: float | None = None  # instead: values above that of so many percent of the posts of its rating
    rating: Literal["g", "s", "q", "e", "none"] | None = None  # only posts of this rating, or without one; null: all
    # years: what a value counts halves with each so many years of the post's age before percentiles are found, so that
    # old posts, which had more time to collect, do not stand first; a post without a year gets no tag then
    half_life: float | None = None


@dataclass(frozen=True)
class CaptionPart:
    """A part of a caption. Exactly one of tags, tag, column, text and caption says of what."""

    # the post's tags of a category: people are those of captions.people, which general has where no part has them
    tags: Literal["people", "general", "character", "copyright", "artist", "meta"] | None = None
    # what captions.ratings, quality and years make of the post; columns: what captions.columns make of those numbers
    # that have no part of their own
    tag: Literal["rating", "quality", "year", "columns"] | None = None
    # another field of the post: the tag of its rules in captions.columns, or where it has none its value as it is
    column: str | None = None
    text: str | None = None  # this text, in every caption
    caption: Literal["natural"] | None = None  # the post's own caption, undivided; one of its variants in each pass
    fixed: bool = False  # keeps its place; parts beside each other that are not fixed are shuffled together
    prefix: str = ""  # stands before each of its tags: "by " makes "by someone" of an artist
    dropout: float = 0.0  # probability of the whole part to be left out
    tag_dropout: float = 0.0  # probability of each of its tags to be left out
    max_tags: int | None = None  # so many of its tags at most: the first where fixed, else drawn in every pass again


@dataclass(frozen=True)
class MixConfig:
    """Probabilities of what a caption is made of; all 0: the post's own caption where it has one, else its tags."""

    tags: float = 0.0  # the template alone
    natural: float = 0.0  # the post's own caption alone
    tags_natural: float = 0.0  # the template, then the post's own caption
    natural_tags: float = 0.0  # the post's own caption, then the template


@dataclass(frozen=True)
class YearRule:
    """A tag from the year of a post's upload."""

    first: int  # the first year of the tag
    last: int  # the last year of the tag
    tag: str  # the tag that the rule adds


def default_quality() -> list[QualityRule]:
    """The recipe's table, section 2.3: s > 150 is masterpiece, so its least score is 151."""
    table = [
        (151, "masterpiece"),
        (100, "best quality"),
        (75, "high quality"),
        (25, "medium quality"),
        (0, "normal quality"),
        (-5, "low quality"),
    ]
    return [QualityRule(tag, score) for score, tag in table] + [QualityRule("worst quality")]


def default_years() -> list[YearRule]:
    """The recipe's table, section 2.2."""
    return [
        YearRule(2005, 2010, "oldest"),
        YearRule(2011, 2014, "early"),
        YearRule(2015, 2018, "mid"),
        YearRule(2019, 2021, "late"),
        YearRule(2022, 2023, "newest"),
    ]


def default_ratings() -> dict[str, str]:
    """The recipe's table, section 2.4."""
    return {
        "g": "rating: general",
        "s": "rating: sensitive",
        "q": "rating: questionable, nsfw",
        "e": "rating: explicit, nsfw",
    }


def default_people() -> list[str]:
    """The recipe's list, section 2.5."""
    counts = ["1", "2", "3", "4", "5", "6+"]
    girls = [f"{count}girl" + ("" if count == "1" else "s") for count in counts]
    boys = [f"{count}boy" + ("" if count == "1" else "s") for count in counts]
    return [*girls, "multiple girls", *boys, "multiple boys", "male focus"]


def default_template() -> list[CaptionPart]:
    """The recipe's order, section 2.6."""
    fixed = [CaptionPart(tags=category, fixed=True) for category in ("people", "character", "copyright", "artist")]
    rating, year, quality, columns = (CaptionPart(tag=tag) for tag in ("rating", "year", "quality", "columns"))
    return [*fixed, rating, CaptionPart(tags="general"), year, CaptionPart(tags="meta"), quality, columns]
