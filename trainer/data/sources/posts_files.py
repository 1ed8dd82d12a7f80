"""Posts files, of text or Parquet, whose images lie in a folder: found by path, id, gallery-dl's filename or md5."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

from trainer.core.errors import UserError
from trainer.data.post import Post, encode_key, read_key
from trainer.data.sites import image_stems, read_site
from trainer.data.sources.folders import EXTENSIONS
from trainer.data.sources.image_folders import ImageFolder
from trainer.data.sources.image_names import md5_in, read_md5, site_in
from trainer.data.sources.record_files import iterate_records
from trainer.data.sources.records import (
    NO_FIELD,
    BadRecord,
    Item,
    Reject,
    lacks,
    parse_record,
    read_captioned,
    reject,
)

FILE_FIELDS = ("file", "file_name")  # the second as imagefolder's metadata.jsonl has it


def iterate_posts_file(
    file: Path, images: ImageFolder, source: str, column: str | None = None, others: Sequence[str] = ()
) -> Iterator[Item]:
    """The posts of one file, in order.

    Args:
        column: the field of finished captions that the source names.
        others: further ones, of which each is a variant.

    Raises:
        UserError: when the file cannot be read at all, a part of it costs the rest, or it is not clear which column
            holds the captions; after the last post, where none has a field that the source names.
    """
    posts, without = 0, Counter[str]()
    for where, record in iterate_records(file, column, others):
        item = read_record(record, source, f"{file.name} {where}", images, column, others)
        if isinstance(item, Post):
            posts += 1
            without.update(note.kind for note in item.notes if note.kind.startswith(NO_FIELD))
        yield item
    named = [("caption_column", column, NO_FIELD), *(("more_caption_columns", name, lacks(name)) for name in others)]
    for key, name, kind in named:
        if posts and posts == without[kind]:
            raise UserError(f"{key} {name} has no effect: no record of {file.name} has a field of that name")


def read_record(
    line: bytes | dict[str, Any] | BadRecord,
    source: str,
    origin: str,
    images: ImageFolder,
    column: str | None,
    others: Sequence[str] = (),
) -> Post | Reject:
    """One line or row of a posts file."""
    key = None
    try:
        if isinstance(line, BadRecord):
            raise line
        record = parse_record(line) if isinstance(line, bytes) else plain_value(line)
        key = read_key(record)
        name = find_image(record, images)
        image = images.place(name)
        # a file name is as good a key as an id, and the only one where several files are of one post
        own_key = key or encode_key(os.fsencode(name))
        return read_captioned(record, column, others, source=source, image=image, origin=origin, key=own_key)
    except ValueError as error:
        return reject(key, origin, error)


def find_image(record: Mapping[str, Any], images: ImageFolder) -> str:
    """The name of a record's image: by its ``file``, a path relative to the folder, else by its id or gallery-dl's
    filename, else by its md5.

    Raises:
        BadRecord: when there is none, more than one, or it lies outside the folder.
    """
    for name in FILE_FIELDS:
        file = record.get(name)
        if file is not None and not isinstance(file, Mapping):  # e621 has facts of the file there
            if not isinstance(file, str) or not file:
                raise BadRecord("bad_record", f"{name} must be a path as text, not {file!r}")
            return images.locate(file)
    stems, md5 = image_stems(record), read_md5(record)
    if not stems and md5 is None:
        there = ", ".join(record) or "none"
        raise BadRecord("bad_record", f"no id, file, file_name or md5 by which to find its image; its fields: {there}")
    matches = ([name for name in images.find(stem) if may_be_of(name, record, md5)] for stem in stems)
    found = next(filter(None, matches), [])
    if not found and md5 is not None:
        found = images.find(md5) or images.find_md5(md5)
    found = choose_image(found, record, md5) if len(found) > 1 else found
    called = " or ".join([*stems, *([] if md5 is None or md5 in stems else [md5])])
    if not found:
        raise BadRecord("image_missing", f"no image is called {called} and one of {', '.join(EXTENSIONS)}")
    if len(found) > 1:
        raise BadRecord("image_ambiguous", f"{called} has several images: {', '.join(sorted(found))}")
    return found[0]


def may_be_of(name: str, record: Mapping[str, Any], md5: str | None) -> bool:
    """Whether a file found by the id may be the post's: ids of different sites are different posts."""
    site, stated = site_in(name), md5_in(name)
    if site is None or (stated is not None and stated == md5):
        return True
    if (own := read_site(record)) is not None:
        return own == site
    # an image may have been replaced since, but of an unknown site only the sum tells that it is this post's
    return site == "danbooru" or md5 is None


def choose_image(found: list[str], record: Mapping[str, Any], md5: str | None) -> list[str]:
    """Of several images those that the record means: by its md5, by its site, or called by the id alone."""
    for fits in (
        lambda name: md5 is not None and md5_in(name) == md5,
        lambda name: site_in(name) is not None and site_in(name) == read_site(record),
        lambda name: site_in(name) is None,
    ):
        if some := [name for name in found if fits(name)]:
            return some
    return found


def plain_value(value: Any) -> Any:
    """A row of a table, or a value in it, as JSON would hold it: dates as ISO text, decimals as numbers."""
    match value:
        case date():  # a datetime is one
            return value.isoformat()
        case dict():
            return {name: plain_value(each) for name, each in value.items()}
        case Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
    return value
