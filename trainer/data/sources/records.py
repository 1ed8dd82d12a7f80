"""What sources yield, and records -> posts. What cannot be a Post is a Reject, with a short reason to count by."""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from trainer.data.fields import show_text
from trainer.data.post import ImagePlace, Post
from trainer.data.sources.caption_fields import read_captioned

MAX_SIDECAR = 2**22  # bytes of a post or caption: more is none


@dataclass(frozen=True)
class Reject:
    """One input that was set aside: a short reason to count by, and the details."""

    key: str | None  # None where the record did not get as far as having one
    origin: str  # file and line, or relative path
    reason: str
    detail: str


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
        raise BadRecord("bad_record", f"a post must be a JSON object, not {type(record).__name__}")
    return record


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
