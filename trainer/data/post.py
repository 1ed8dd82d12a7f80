"""Post: one Danbooru-like record, as the site's JSON or gallery-dl spells it. Nothing in it is repaired.

Where its image lies is a small value that pickles: a file, a stretch of a tar, or a cell of an Arrow file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

Scalar = str | int | float | bool
SCALARS = (str, int, float, bool)  # a tuple: isinstance takes three times as long over a union

TAG_CATEGORIES = ("general", "character", "copyright", "artist", "meta")
TAG_FIELDS = [f"{stem}_{category}" for stem in ("tag_string", "tags") for category in TAG_CATEGORIES]
RATINGS = {"general": "g", "sensitive": "s", "questionable": "q", "explicit": "e"}
MAX_EXTRA_LENGTH = 200  # characters of a text kept in `extra`; longer ones are prose, which no rule of ours reads
# fields that have a place of their own in Post, or repeat one
TOLD_ELSEWHERE = {"caption", "rating", "score", "image_width", "image_height", "file", "tags", "tag_string"}
INT32 = range(-(2**31), 2**31)  # what the index's columns hold


@dataclass(frozen=True)
class TarMember:
    """A member of a tar file: the image's bytes are ``length`` bytes from ``offset`` on."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class TableCell:
    """A cell of an Arrow file in the IPC stream format, of which a dataset of Hugging Face's is made."""

    path: Path
    row: int
    column: str


ImagePlace = Path | TarMember | TableCell


class Note(NamedTuple):
    """What of a record could not be taken as it is, and did not cost the post."""

    kind: str  # a few words to count by, the same for all posts with this fault: "unreadable score"
    detail: str  # field and value


@dataclass(frozen=True)
class Post:
    """One image's record. Tags are the source's own strings: separated by spaces, underscores kept."""

    key: str  # the post's id, or its relative path, percent-encoded and without dots
    source: str = ""  # what its source is called
    caption: str | None = None  # a finished caption, which wins over everything composed
    rating: str | None = None  # g, s, q or e
    score: int | None = None
    year: int | None = None  # of the upload
    tags_general: str | None = None
    tags_character: str | None = None
    tags_copyright: str | None = None
    tags_artist: str | None = None
    tags_meta: str | None = None
    stated_width: int | None = None  # what the record says; the file has the last word
    stated_height: int | None = None
    extra: dict[str, Scalar] = field(default_factory=dict)  # the record's other small fields
    image: ImagePlace = Path()
    origin: str = ""  # file and line, for messages only
    notes: tuple[Note, ...] = ()  # counted by source and kind; no part of what is prepared


def read_post(
    record: Any, *, source: str, image: ImagePlace, origin: str = "", key: str | None = None, caption: str | None = None
) -> Post:
    """The Post of one decoded JSON record.

    Args:
        key: used where the record has no id.
        caption: a finished one from a sidecar; it wins over the record's own ``caption``.

    Raises:
        ValueError: when a field has the wrong type or value; the caller sets the post aside.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a post must be a JSON object, not {type(record).__name__}")
    own_key = read_key(record) or key
    if own_key is None:
        raise ValueError("neither id nor file: nothing to call this post by")
    tags: dict[str, Any] = {f"tags_{category}": read_tags(record, category) for category in TAG_CATEGORIES}
    return Post(
        key=own_key,
        source=check_text("source", source),
        caption=caption if caption is not None else read_text(record, "caption"),
        rating=read_rating(record.get("rating")),
        score=read_int(record, "score"),
        year=read_year(record),
        **tags,
        stated_width=read_side(record, "image_width"),
        stated_height=read_side(record, "image_height"),
        extra=read_extra(record),
        image=image,
        origin=origin or source,
    )


def read_key(record: Mapping[str, Any]) -> str | None:
    """The key of a record's ``id``, or None where it has none.

    Raises:
        ValueError: when the id is neither a whole number nor text.
    """
    post_id = record.get("id")
    if post_id is None:
        return None
    if isinstance(post_id, bool) or not isinstance(post_id, int | str) or post_id == "":
        raise ValueError(f"id must be a whole number or text, not {post_id!r}")
    return encode_key(check_text("id", str(post_id)))


def encode_key(name: str | bytes) -> str:
    """Percent-encode a name so that it can be a tar member's stem.

    webdataset's key is all up to the first dot, and a slash would make a folder: neither is left. Injective.
    """
    if isinstance(name, str) and name.isascii() and name.isalnum():
        return name  # as most ids are: nothing to encode
    return quote(name, safe="").replace(".", "%2E")


def read_rating(value: Any) -> str | None:
    """g, s, q or e from a letter or a word; None stays None."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"rating must be text, not {value!r}")
    letter = RATINGS.get(value, value)
    if letter not in RATINGS.values():
        raise ValueError(f"rating {value!r} is none of {', '.join(RATINGS.values())} or {', '.join(RATINGS)}")
    return letter


def read_year(record: Mapping[str, Any]) -> int | None:
    """The year of ``media_asset.created_at``, else of ``created_at``; None where neither is a date."""
    asset = record.get("media_asset")
    if asset is not None and not isinstance(asset, Mapping):
        raise ValueError(f"media_asset must be an object, not {asset!r}")
    for name, holder in (("media_asset.created_at", asset or {}), ("created_at", record)):
        text = holder.get("created_at")
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{name} must be text, not {text!r}")
        try:
            return datetime.fromisoformat((text or "").removesuffix(" UTC")).year
        except ValueError:
            continue
    return None


def read_tags(record: Mapping[str, Any], category: str) -> str | None:
    """One category's tags as a string: Danbooru's ``tag_string_*``, or gallery-dl's ``tags_*`` lists.

    A record without any category has its uncategorised tags read as general ones.
    """
    names = [f"tag_string_{category}", f"tags_{category}"]
    if category == "general" and not any(record.get(name) for name in TAG_FIELDS):
        names += ["tag_string", "tags"]
    for name in names:
        value = record.get(name)
        if isinstance(value, list):
            return join_tags(name, value)
        if value is not None:
            return read_text(record, name)
    return None


def join_tags(name: str, tags: list[Any]) -> str:
    """A list of tags as Danbooru's string, each tag one word."""
    for tag in tags:
        if not isinstance(tag, str) or not tag or " " in tag:
            raise ValueError(f"{name} must be a list of words (spaces written as _), but holds {tag!r}")
    return check_text(name, " ".join(tags))


def read_text(record: Mapping[str, Any], name: str) -> str | None:
    """A text field, or None."""
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {value!r}")
    return None if value is None else check_text(name, value)


def check_text(name: str, text: str) -> str:
    """The same text, if UTF-8 can hold it: JSON can spell half a surrogate pair, Arrow and tar cannot."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} is not valid Unicode: {text!r}") from error
    return text


def read_int(record: Mapping[str, Any], name: str) -> int | None:
    """A whole number that an int32 column holds, or None."""
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value not in INT32:
        raise ValueError(f"{name} must be a whole number of 32 bits, not {value!r}")
    return value


def read_side(record: Mapping[str, Any], name: str) -> int | None:
    """A stated width or height in pixels, or None."""
    side = read_int(record, name)
    if side is not None and side <= 0:
        raise ValueError(f"{name} must be above 0, not {side}")
    return side


def read_extra(record: Mapping[str, Any]) -> dict[str, Scalar]:
    """The small scalar fields that have no place of their own, by name in sorted order; links are left out."""
    extra: dict[str, Scalar] = {}
    for name in sorted(record):
        value = record[name]
        if not isinstance(value, SCALARS) or is_told_elsewhere(name) or len(str(value)) > MAX_EXTRA_LENGTH:
            continue
        extra[check_text("a field's name", name)] = check_text(name, value) if isinstance(value, str) else value
    return extra


@lru_cache(maxsize=1024)  # records of one source have the same names
def is_told_elsewhere(name: str) -> bool:
    """Whether a field has a place of its own in Post, repeats one, or is a link."""
    return name in TOLD_ELSEWHERE or name.startswith(("tag_string_", "tags_")) or name.endswith("_url")
