"""Finished captions under the names that people give them: a field of a record, or a column of a table.

``caption`` is what a Post calls it. Where a record has neither that nor tags, one of a few other names will do; where
it is not clear which, nobody guesses. Hugging Face's own data sets have ``text``, generators' ``prompt``, webdataset
``txt``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from trainer.core.errors import UserError
from trainer.data.fields import is_nan, show_text
from trainer.data.post import Note, Post, read_post

CAPTION = "caption"
NAMES = (CAPTION, "captions", "text", "txt", "prompt")  # in lower case
# texts that are no captions
OTHER_TEXTS = {"id", "md5", "rating", "file", "file_name", "file_ext", "source", "category", "subcategory"}
UNREAD = "text beside tags, which make the caption"
NO_CAPTION = "neither caption nor tags, but other text"
NO_FIELD = "no field of caption_column"


def read_captioned(record: dict[str, Any], column: str | None = None, **more: Any) -> Post:
    """The Post of a record, whose caption may have another name.

    Args:
        column: the field of captions that the source names.
        more: what ``read_post`` takes beside the record.

    Raises:
        ValueError: as ``read_post``, and when it is not clear which field is the caption.
    """
    notes: list[Note] = []
    name = column if column is not None else None if more.get(CAPTION) is not None else find_caption(record, notes)
    if column is not None and column not in record:
        notes.append(Note(NO_FIELD, f"the record has no {column}"))
    if name is not None:
        record = {field: value for field, value in record.items() if field != name} | {CAPTION: record.get(name)}
    if isinstance(record.get(CAPTION), list):
        record = record | {CAPTION: join_captions(record[CAPTION])}
    post = read_post(record, **more)
    return dataclasses.replace(post, notes=(*post.notes, *notes)) if notes else post


def find_caption(record: Mapping[str, Any], notes: list[Note]) -> str | None:
    """The field that holds a record's caption; None where tags make it, or nothing does.

    Raises:
        ValueError: when several may.
    """
    if has_text(record.get(CAPTION)):
        return CAPTION
    if any(value and not is_nan(value) and is_tags(name) for name, value in record.items()):
        if beside := [name for name in NAMES if has_text(record.get(name))]:
            notes.append(Note(UNREAD, f"{', '.join(beside)}; caption_column would make it the caption"))
        return None
    texts = [name for name, value in record.items() if has_text(value)]
    known = [name for name in texts if name.lower() in NAMES]
    if len(known) > 1:
        raise ValueError(f"{', '.join(known)} may each be the caption: set caption_column to one of them")
    if not known and (others := [name for name in texts if is_other(name)]):
        notes.append(Note(NO_CAPTION, f"the record has text in {show_text(', '.join(others))}"))
    return known[0] if known else None


def join_captions(value: Any) -> Any:
    """Several captions of one image as the lines of one text, None where they are empty; anything else as it is."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return "\n".join(line for each in value if (line := " ".join(each.split()))) or None
    return value


def has_text(value: Any) -> bool:
    """Whether a value is a text, or a list of some."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, str) for each in value) and any(each.strip() for each in value)
    return isinstance(value, str) and bool(value.strip())


def is_tags(name: str) -> bool:
    return name.startswith("tag") and (name in ("tags", "tag_string") or name.startswith(("tag_string_", "tags_")))


def is_other(name: str) -> bool:
    """Whether a field of text may be a caption that nobody has recognised."""
    return not is_tags(name) and name not in OTHER_TEXTS and not name.endswith(("_url", "_at", "__"))


def check_columns(schema: pa.Schema, column: str | None, where: str) -> None:
    """Refuse a table of which it is not clear which column holds the captions.

    Raises:
        UserError: with the columns that there are.
    """
    listed = show_text(", ".join(schema.names))
    if column is not None and column not in schema.names:
        raise UserError(f"{where} has no column {column}, only {listed}")
    if column is not None or CAPTION in schema.names or any(is_tags(name) for name in schema.names):
        return
    texts = [field.name for field in schema if holds_text(field.type)]
    known = [name for name in texts if name.lower() in NAMES]
    if len(known) > 1:
        raise UserError(f"{where} has several columns of captions ({', '.join(known)}): set its caption_column to one")
    if not known and any(is_other(name) for name in texts):
        raise UserError(
            f"{where} has no column of tags, and none that is called {', '.join(NAMES)}: set its caption_column to one "
            f"of {listed}"
        )


def holds_text(kind: pa.DataType) -> bool:
    """Whether cells of this type are texts or lists of texts."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        return holds_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
