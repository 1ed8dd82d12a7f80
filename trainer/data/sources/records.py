"""What sources yield, and records -> posts. What cannot be a Post is a Reject, with a short reason to count by.

A finished caption stands under the names that people give it: a field of a record, or a column of a table. ``caption``
is what a Post calls it. Where a record has neither that nor tags, one of a few other names will do; where it is not
clear which, nobody guesses. Hugging Face's own data sets have ``text``, generators' ``prompt``, webdataset ``txt``.

Captions of several lines are the first line, all lines as tags, or one of them in each pass. sd-scripts trains on the
first unless enable_wildcard is set, and then on one at random (library/train_util.py, BaseDataset.process_caption);
tools that write one tag a line, such as gallery-dl, mean all of them.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from trainer.core.errors import UserError
from trainer.data.captions import VARIANT_SEPARATOR
from trainer.data.fields import Note, is_nan, read_text, show_text, show_value
from trainer.data.post import ImagePlace, Post, read_post

MAX_SIDECAR = 2**22  # bytes of a post or caption: more is none

CAPTION = "caption"
CAPTION_NAMES = (CAPTION, "captions", "text", "txt", "prompt")  # in lower case
# texts that are no captions
OTHER_TEXTS = {"id", "md5", "rating", "file", "file_name", "file_ext", "source", "category", "subcategory"}
TEXT_BESIDE_TAGS = "text beside tags, which make the caption"
NO_CAPTION = "neither caption nor tags, but other text"
NO_FIELD = "no field of caption_column"

Lines = Literal["first", "tags", "variants"]
LINE_END = re.compile(rf"[\r\n{VARIANT_SEPARATOR}]")


@dataclass(frozen=True)
class Reject:
    """One input that was set aside: a short reason to count by, and the details."""

    key: str | None  # None where the record did not get as far as having one
    origin: str  # file and line, or relative path
    reason: str
    detail: str


REASONS = {  # why inputs are set aside, as it follows a number of them
    "bad_json": "not valid JSON",
    "bad_record": "with a record or caption that cannot be read",
    "bad_sample": "whose parts in a tar do not belong together",
    "bad_tar": "damaged in their tar",
    "bomb": "too large to be opened safely",
    "caption_ambiguous": "with several captions",
    "empty": "of 0 bytes",
    "image_ambiguous": "with several images",
    "image_missing": "whose image is not there",
    "killed_decoder": "whose decoding ended its process",
    "missing": "whose image is gone",
    "no_image": "without an image",
    "no_sidecar": "without a caption",
    "non_finite_latents": "whose latents are not finite",
    "not_an_image": "not an image",
    "out_of_memory": "needing more memory than there is",
    "outside_folder": "outside the folder",
    "refused_member": "refused in their tar",
    "too_large": "of more bytes than are read",
    "too_narrow": "too narrow",
    "too_small": "smaller than buckets.min_side",
    "undecodable": "whose image cannot be decoded",
    "unreadable": "whose file cannot be read",
}


def explain_reason(reason: str) -> str:
    """A reason in words; one that has none here, of an older version, is shown as it is."""
    return REASONS.get(reason, reason)


@dataclass(frozen=True)
class Remark:
    """So many of a source's inputs that are neither a post nor set aside, such as files that no one reads.

    A source yields as many as it likes; they are summed by source and kind. They are no inputs: neither
    data.max_bad_fraction nor the number of inputs knows them.
    """

    source: str  # what its source is called
    kind: str  # a few words to count by, without names or numbers of single inputs
    count: int = 1
    origin: str = ""  # an example: file and line, or relative path
    detail: str = ""  # what is to be known of it
    key: str | None = None  # of the post, where it is one's


Item = Post | Reject | Remark  # what sources yield


class BadRecord(ValueError):
    """Why a record is set aside: (reason, detail)."""


def explain_error(error: ValueError) -> tuple[str, str]:
    """Reason and detail of a reject; what is no BadRecord says of a record itself that it cannot be read."""
    return error.args if isinstance(error, BadRecord) else ("bad_record", str(error))


def reject(key: str | None, origin: str, error: ValueError) -> Reject:
    """The input that is set aside with this error."""
    reason, detail = explain_error(error)
    return Reject(key, origin, reason, show_text(detail))


def parse_record(text: bytes) -> dict[str, Any]:
    """One JSON object. NaN, which Python and pandas write though JSON does not have it, is read as what is missing.

    Raises:
        BadRecord: when it is none.
    """
    try:
        record = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadRecord("bad_json", str(error)) from error
    if not isinstance(record, dict):
        raise not_an_object(record)
    return record


def not_an_object(record: Any) -> BadRecord:
    """The error of JSON that is no object."""
    return BadRecord("bad_record", f"a post must be a JSON object, not {type(record).__name__}")


class Sidecar(NamedTuple):
    """A file beside an image, or a member of a tar."""

    name: str
    content: bytes


def read_sidecars(
    caption: Sidecar | None, record: Sidecar | None, *, key: str, source: str, image: ImagePlace, origin: str
) -> Post:
    """The post of an image's sidecars: a finished caption, a post as JSON, or both, where the caption wins over tags.

    Raises:
        ValueError: where they are not such, naming the one; the caller sets the image aside.
    """
    text = None if caption is None else decode_caption(caption)
    more: dict[str, Any] = {"source": source, "image": image, "origin": origin, "key": key, "caption": text}
    if record is None:
        return read_captioned({}, **more)
    try:
        return read_captioned(parse_record(record.content), **more)
    except ValueError as error:
        reason, detail = explain_error(error)
        raise BadRecord(reason, f"{record.name}: {detail}") from error


def decode_caption(sidecar: Sidecar) -> str:
    """A caption's text, which must be UTF-8."""
    try:
        return sidecar.content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        seen = "UTF-16" if sidecar.content.startswith((b"\xff\xfe", b"\xfe\xff")) else "in another encoding"
        detail = f"{sidecar.name} is not UTF-8 but {seen} (byte {error.start}): save it as UTF-8"
        raise ValueError(detail) from error


def read_captioned(record: dict[str, Any], column: str | None = None, others: Sequence[str] = (), **more: Any) -> Post:
    """The Post of a record, whose caption may have another name.

    Args:
        column: the field of captions that the source names.
        others: further ones, whose captions are variants of it.
        more: what ``read_post`` takes beside the record.

    Raises:
        ValueError: as ``read_post``, and when it is not clear which field is the caption.
    """
    notes: list[Note] = []
    rest = {name: value for name, value in record.items() if name not in others}
    name = column if column is not None else None if more.get(CAPTION) is not None else find_caption(rest, notes)
    if column is not None and column not in record:
        notes.append(Note(NO_FIELD, f"the record has no {column}"))
    if name is not None:
        record = {field: value for field, value in record.items() if field != name} | {CAPTION: record.get(name)}
    if isinstance(record.get(CAPTION), list):
        record = record | {CAPTION: join_captions(record[CAPTION])}
    if others:
        notes += [Note(lacks(other), f"the record has no {other}") for other in others if other not in record]
        record = record | {CAPTION: join_columns([record.get(CAPTION), *(record.get(other) for other in others)])}
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
        if beside := [name for name in CAPTION_NAMES if has_text(record.get(name))]:
            notes.append(Note(TEXT_BESIDE_TAGS, f"{', '.join(beside)}; caption_column would make it the caption"))
        return None
    texts = [name for name, value in record.items() if has_text(value)]
    known = [name for name in texts if name.lower() in CAPTION_NAMES]
    if len(known) > 1:
        raise ValueError(f"{', '.join(known)} may each be the caption: set caption_column to one of them")
    if not known and (others := [name for name in texts if is_other(name)]):
        notes.append(Note(NO_CAPTION, f"the record has text in {show_text(', '.join(others))}"))
    return known[0] if known else None


def lacks(name: str) -> str:
    """The kind of note of a record without a field of ``more_caption_columns``."""
    return f"{NO_FIELD}: {name}"


def join_columns(values: list[Any]) -> str | None:
    """The captions of several fields as variants of one, each of which may have several lines; None without any.

    Raises:
        ValueError: when one is neither text nor a list of texts.
    """
    texts = [read_text("a caption", join_captions(value)) for value in values]
    return VARIANT_SEPARATOR.join(text.replace(VARIANT_SEPARATOR, "\n") for text in texts if text) or None


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


def check_columns(schema: pa.Schema, column: str | None, where: str, others: Sequence[str] = ()) -> None:
    """Refuse a table of which it is not clear which column holds the captions.

    Raises:
        UserError: with the columns that there are.
    """
    listed = show_text(", ".join(schema.names))
    for name in (column, *others):
        if name is not None and name not in schema.names:
            raise UserError(f"{where} has no column {name}, only {listed}")
    if column is not None or others or CAPTION in schema.names or any(is_tags(name) for name in schema.names):
        return
    texts = [field.name for field in schema if holds_text(field.type)]
    known = [name for name in texts if name.lower() in CAPTION_NAMES]
    if len(known) > 1:
        raise UserError(f"{where} has several columns of captions ({', '.join(known)}): set its caption_column to one")
    if not known and any(is_other(name) for name in texts):
        names = ", ".join(CAPTION_NAMES)
        advice = f"set its caption_column to one of {listed}"
        raise UserError(f"{where} has no column of tags, and none that is called {names}: {advice}")


def holds_text(kind: pa.DataType) -> bool:
    """Whether cells of this type are texts or lists of texts."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        return holds_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def settle_caption(post: Post, lines: Lines, columns: bool = False) -> Post:
    """A post whose caption is one text or variants of one, as the config wants them; of several lines, with a note.

    ``columns``: its caption holds those of several, each of which has lines of its own.
    """
    caption = post.caption or ""
    if columns and VARIANT_SEPARATOR in caption:
        each = [settle_caption(dataclasses.replace(post, caption=text, notes=()), lines)
                for text in caption.split(VARIANT_SEPARATOR)]  # fmt: skip
        text = VARIANT_SEPARATOR.join(one.caption for one in each if one.caption)
        return dataclasses.replace(
            post, caption=text, notes=(*post.notes, *(note for one in each for note in one.notes))
        )
    if not LINE_END.search(caption):
        return post
    parts = [part for line in LINE_END.split(caption) if (part := line.strip())]
    if len(parts) < 2:  # only blank lines beside it: the text stays as it is
        return dataclasses.replace(post, caption=caption.replace(VARIANT_SEPARATOR, " "))
    detail = f"{len(parts)} lines"
    match lines:
        case "first":
            text, how = parts[0], "of which the first is read"
            detail = f"not read: {show_value(parts[1])}; lines: tags or variants reads all"
        case "tags":
            text, how = ", ".join(part.strip(", ") for part in parts), "read as tags"
        case "variants":
            text, how = VARIANT_SEPARATOR.join(parts), "read as variants"
    note = Note(f"captions of several lines, {how}", detail)
    return dataclasses.replace(post, caption=text, notes=(*post.notes, note))
