"""Post: one record of Danbooru or another site, as the site's JSON, a dump or gallery-dl spells it.

Tags, caption and rating decide under which words an image is learnt: where one of them cannot be read, the post is set
aside. Score, dates, sizes and all other fields are optional: where one cannot be read, it is left out and noted.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pyarrow as pa

from trainer.data.fields import (
    Note,
    check_text,
    holds_html,
    is_missing,
    is_nan,
    is_unicode,
    parse_int32,
    parse_side,
    parse_year,
    read_optional,
    read_text,
    show_text,
    show_value,
)
from trainer.data.sites import Site, find_site, read_own_id, read_rating
from trainer.data.tag_fields import read_tags

Scalar = str | int | float | bool
SCALARS = (str, int, float, bool)  # a tuple: isinstance takes three times as long over a union

MAX_EXTRA_LENGTH = 200  # characters of a text kept in `extra`; longer ones are prose, which no rule of ours reads
# fields that have a place of their own in Post, or repeat one that has
OWN_PLACES = {"caption", "rating", "score", "image_width", "image_height", "file", "tags", "tag_string"}
DATE_FIELDS = ("created_at", "create_date", "date")  # Danbooru's and others'; pixiv's; gallery-dl's own


class ImagePlace(NamedTuple):
    """Where an image lies: a whole file, a member of a tar (offset, length), or a cell of a table (row, column)."""

    path: Path  # of the file, the tar, or the Arrow file in the IPC stream format that a dataset is made of
    offset: int | None = None  # of the first byte
    length: int | None = None  # in bytes
    row: int | None = None
    column: str | None = None


NOWHERE = ImagePlace(Path())


def column(kind: pa.DataType, index: bool = True) -> Any:
    """A field that may be missing, and the type of its column in Arrow tables, of the index too unless it says no."""
    return field(default=None, metadata={"arrow": kind, "index": index})


@dataclass(frozen=True)
class Post:
    """One image's record. Tags are the source's own strings: separated by spaces, underscores kept.

    The one description of a post's columns: those of the index, of a preparation's table and of the tars' JSON.
    """

    key: str  # the post's id, or its relative path, percent-encoded and without dots
    source: str = ""  # what its source is called
    caption: str | None = column(pa.string())  # a finished caption, which wins over everything composed
    rating: str | None = column(pa.string())  # g, s, q or e
    score: int | None = column(pa.int32())
    year: int | None = column(pa.int32())  # of the upload
    tags_general: str | None = column(pa.string())
    tags_character: str | None = column(pa.string())
    tags_copyright: str | None = column(pa.string())
    tags_artist: str | None = column(pa.string())
    tags_meta: str | None = column(pa.string())
    extra: dict[str, Scalar] = field(default_factory=dict)  # the record's other small fields
    stated_width: int | None = column(pa.int32(), index=False)  # what the record says; the file has the last word
    stated_height: int | None = column(pa.int32(), index=False)
    image: ImagePlace = NOWHERE
    origin: str = ""  # file and line, for messages only
    notes: tuple[Note, ...] = ()  # counted by source and kind; no part of what is prepared


COLUMNS = {each.name: each.metadata for each in fields(Post) if each.metadata}
# the index's columns of a post, after its key; `extra` is JSON there
POST_FIELDS = [
    pa.field("source", pa.string(), nullable=False),
    *(pa.field(name, what["arrow"]) for name, what in COLUMNS.items() if what["index"]),
    pa.field("extra", pa.string()),
]
# what else of a post a preparation's table holds
STATED_FIELDS = [pa.field(name, what["arrow"]) for name, what in COLUMNS.items() if not what["index"]]


def read_post(
    record: Any, *, source: str, image: ImagePlace, origin: str = "", key: str | None = None, caption: str | None = None
) -> Post:
    """The Post of one decoded JSON record.

    Args:
        key: used where the record has no id of its own.
        caption: a finished one from a sidecar; it wins over the record's own ``caption``.

    Raises:
        ValueError: when there is nothing to call it by, or tags, caption or rating cannot be read; the caller sets the
            post aside.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a post must be a JSON object, not {type(record).__name__}")
    own_key = read_key(record) or key
    if own_key is None:
        raise ValueError("neither id nor file: nothing to call this post by")
    site = find_site(record)
    notes: list[Note] = []
    tags: dict[str, Any] = {f"tags_{category}": value for category, value in read_tags(record, notes).items()}
    return Post(
        key=own_key,
        source=check_text("source", source),
        caption=caption if caption is not None else read_caption(record, site, notes),
        rating=read_rating(record),
        score=read_score(record, site, notes),
        year=read_year(record, notes),
        **tags,
        stated_width=read_side(record, "width", notes),
        stated_height=read_side(record, "height", notes),
        extra=read_extra(record, notes),
        image=image,
        origin=origin or source,
        notes=tuple(notes),
    )


def read_key(record: Mapping[str, Any]) -> str | None:
    """The key of a record's own id; None where it has none. Raises what ``read_own_id`` does."""
    own_id = read_own_id(record)
    return None if own_id is None else encode_key(own_id)


def encode_key(name: str | bytes) -> str:
    """Percent-encode a name so that it can be a tar member's stem.

    webdataset's key is all up to the first dot, and a slash would make a folder: neither is left. Injective.
    """
    if isinstance(name, str) and name.isascii() and name.isalnum():
        return name  # as most ids are: nothing to encode
    return quote(name, safe="").replace(".", "%2E")


def read_caption(record: Mapping[str, Any], site: Site, notes: list[Note]) -> str | None:
    """The record's finished caption; what an uploader wrote about the image is none."""
    text = read_text("caption", record.get("caption"))
    if text is None or not text.strip():
        return None  # as an empty cell of a table: the tags make it
    if not (site.caption_is_prose or holds_html(text)):
        return text
    kind = "HTML, which is no caption" if holds_html(text) else "uploader's text, which is no caption"
    notes.append(Note(kind, f"caption: {show_value(text)}"))
    return None


def read_score(record: Mapping[str, Any], site: Site, notes: list[Note]) -> int | None:
    """The score; of e621's, which has parts, the total, and of a site that has none what stands for it."""
    value = record.get("score")
    if isinstance(value, Mapping):
        return read_optional(parse_int32, "score.total", value.get("total"), notes)
    if is_missing(value) and site.score is not None and not is_missing(record.get(site.score)):
        notes.append(Note(f"{site.score} taken as score", f"{site.score}: {show_value(record[site.score])}"))
        return read_optional(parse_int32, site.score, record[site.score], notes)
    return read_optional(parse_int32, "score", value, notes)


def read_year(record: Mapping[str, Any], notes: list[Note]) -> int | None:
    """The year of ``media_asset.created_at``, else of the first of DATE_FIELDS that is a date; None where none is."""
    asset = record.get("media_asset")
    dates = (
        {"media_asset.created_at": asset.get("created_at")} if isinstance(asset, Mapping) else {"media_asset": asset}
    )
    dates |= {name: record.get(name) for name in DATE_FIELDS}
    for name, value in dates.items():
        if (year := read_optional(parse_year, name, value, notes)) is not None:
            return year
    return None


def read_side(record: Mapping[str, Any], side: str, notes: list[Note]) -> int | None:
    """A stated width or height in pixels: Danbooru's ``image_width``, others' ``width``, e621's ``file.width``."""
    for name in (f"image_{side}", side):
        if not is_missing(record.get(name)):
            return read_optional(parse_side, name, record[name], notes)
    file = record.get("file")
    return read_optional(parse_side, f"file.{side}", file.get(side), notes) if isinstance(file, Mapping) else None


def read_extra(record: Mapping[str, Any], notes: list[Note]) -> dict[str, Scalar]:
    """The small scalar fields that have no place of their own, by name in sorted order; links are left out."""
    extra: dict[str, Scalar] = {}
    for name in sorted(record):
        value = record[name]
        if not isinstance(value, SCALARS) or has_own_place(name) or len(str(value)) > MAX_EXTRA_LENGTH:
            continue
        if is_storable(name) and is_storable(value):
            extra[name] = value
        elif not is_nan(value):
            notes.append(Note(f"unreadable {show_text(name)}", f"{show_text(name)}: {show_value(value)}"))
    return extra


def is_storable(value: Scalar) -> bool:
    """Whether JSON and UTF-8 can hold a value."""
    if isinstance(value, str):
        return is_unicode(value)
    return not isinstance(value, float) or math.isfinite(value)


@lru_cache(maxsize=1024)  # records of one source have the same names
def has_own_place(name: str) -> bool:
    """Whether a field has a place of its own in Post, repeats one, or is a link."""
    return name in OWN_PLACES or name.startswith(("tag_string_", "tags_")) or name.endswith("_url")
