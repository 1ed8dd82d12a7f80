"""Single values as sites, dumps and tables write them: numbers, dates, text. What is missing is None.

An unreadable value of an optional field costs no post: it is None as well, and noted.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple, TypeVar

Value = TypeVar("Value")

INT32 = range(-(2**31), 2**31)  # what the index's columns hold
MISSING_WORDS = {"", "nan", "none", "null"}  # how tables write a missing number or date as text
WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+(\.0*)?")
NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE]\+?[0-9]+)?")  # of an epoch: BigQuery writes 1.65E9
# gelbooru's "Sat Apr 17 11:59:39 -0500 2021"
GELBOORU_DATE = re.compile(r"[A-Z][a-z]{2} [A-Z][a-z]{2} +[0-9]{1,2} [0-9:]{8} (?:[+-][0-9]{4}|[A-Z]{3,4}) ([0-9]{4})")
EPOCH_UNITS = (1, 10**3, 10**6, 10**9)  # seconds, and their parts down to nanoseconds
EPOCH_SECONDS = (10**8, 10**10)  # 1973 to 2286, so that no number can be two units' date
HTML = re.compile(r"</?(?:a|br|p|div|span|strong|em|b|i|u|s|ul|ol|li|h[1-6]|img|font|blockquote)(?:\s[^<>]*)?/?>", re.I)
MAX_SHOWN = 80  # characters of a value in a note


class Note(NamedTuple):
    """What of a record could not be taken as it is, and did not cost the post."""

    kind: str  # a few words to count by, the same for all posts with this fault: "unreadable score"
    detail: str  # field and value


def is_missing(value: Any) -> bool:
    """Whether a number or a date is not there: null, NaN, or what tables write for them as text."""
    if isinstance(value, str):
        return value.strip().lower() in MISSING_WORDS
    return value is None or is_nan(value)


def is_absent(value: Any) -> bool:
    """Whether a text is not there: null, or NaN, which tables have for what is missing, also among texts."""
    return value is None or is_nan(value)


def is_nan(value: Any) -> bool:
    """Whether a value is the number NaN."""
    return isinstance(value, float | Decimal) and math.isnan(value)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_optional(parse: Callable[[Any], Value], name: str, value: Any, notes: list[Note]) -> Value | None:
    """A value that a post may lack; one that ``parse`` refuses with a ValueError is noted by its field's name."""
    if is_missing(value):
        return None
    try:
        return parse(value)
    except (ValueError, OverflowError):  # the second of a whole number that is no float
        notes.append(Note(f"unreadable {name}", f"{name}: {show_value(value)}"))
        return None


def show_value(value: Any) -> str:
    """A value as text that any report can hold, not too long."""
    text = show_text(repr(value))
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def show_text(text: str) -> str:
    """Text with what UTF-8 cannot hold written as escapes: a file's name need not be Unicode."""
    try:
        return os.fsencode(text).decode(errors="backslashreplace")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return text.encode(errors="backslashreplace").decode()


def parse_whole(value: Any) -> int:
    """A whole number: an integer, a float or decimal without a fraction as tables of pandas have it, or text of one.

    Raises:
        ValueError: when it is none.
    """
    if isinstance(value, str) and WHOLE_NUMBER.fullmatch(value.strip()):
        return int(value.strip().partition(".")[0])
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return int(value)
    raise ValueError(f"no whole number: {show_value(value)}")


def parse_int32(value: Any) -> int:
    """A whole number that the index's columns hold."""
    number = parse_whole(value)
    if number not in INT32:
        raise ValueError(f"more than 32 bits: {number}")
    return number


def parse_side(value: Any) -> int:
    """A stated width or height in pixels."""
    if (side := parse_int32(value)) <= 0:
        raise ValueError(f"not above 0: {side}")
    return side


def parse_year(value: Any) -> int:
    """The year of a date: ISO 8601 as Danbooru, pixiv, gallery-dl and tables write it, gelbooru's form, or an epoch.

    The year is that of the stated time zone; an epoch, in seconds or 10**3, 10**6 or 10**9 parts of them, is in UTC.

    Raises:
        ValueError: when it is none.
    """
    if isinstance(value, Mapping):  # Danbooru 1 and its heirs: {"json_class": "Time", "s": 1220000000, "n": 0}
        value = value.get("s")
    if isinstance(value, str):
        text = value.strip().removesuffix(" UTC")
        # 20210417 is a date; more digits are none, though ISO 8601 could read 13 of them as the year 1612
        if NUMBER.fullmatch(text) and not (text.isdecimal() and len(text) <= 8):
            return epoch_year(float(text))
        if found := GELBOORU_DATE.fullmatch(text):
            return int(found[1])
        return datetime.fromisoformat(text).year
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return epoch_year(float(value))
    raise ValueError(f"no date: {show_value(value)}")


def epoch_year(number: float) -> int:
    """The year of a time since 1970, whatever its unit."""
    for unit in EPOCH_UNITS:
        if EPOCH_SECONDS[0] <= number / unit < EPOCH_SECONDS[1]:
            return datetime.fromtimestamp(number / unit, UTC).year
    raise ValueError(f"no time since 1970 in any unit: {number}")


def read_text(name: str, value: Any) -> str | None:
    """A text field, or None.

    Raises:
        ValueError: when it is no text.
    """
    if is_absent(value):
        return None
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {show_value(value)}")
    return check_text(name, value)


def check_text(name: str, text: str) -> str:
    """The same text, if UTF-8 can hold it: JSON can spell half a surrogate pair, Arrow and tar cannot."""
    if not is_unicode(text):
        raise ValueError(f"{name} is not valid Unicode: {show_value(text)}")
    return text


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return True


def holds_html(text: str) -> bool:
    """Whether a text has markup of HTML in it, as a site's descriptions have and no caption does."""
    return "<" in text and HTML.search(text) is not None
