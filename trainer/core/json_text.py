"""JSON from files that others wrote: a value, or a message that names the file, whatever the text holds.

Python's own reader takes more than the format has, and ends in other errors than ValueError for texts that are nested
deeply. What it gives here can be walked by recursion and written again as JSON.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from trainer.core.errors import UserError, shorten
from trainer.core.files import read_regular

MAX_DEPTH = 100  # objects and lists within each other; a lineage of twenty stages has some 50
MAX_DIGITS = 40  # transformers writes 1e30, as a whole number, for "no limit"
MAX_JSON_BYTES = 2**28
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BrokenJson(ValueError):
    """Why a text is no JSON."""


def decode_json(text: str | bytes, *, infinity: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        infinity: whether Infinity and -Infinity pass, which diffusers writes into the configs of schedulers.

    Raises:
        BrokenJson: saying why it is none; also for NaN, which JSON has not, and for a key that an object has twice,
            of which readers take different ones.
    """

    def constant(name: str) -> float:
        if name == "NaN" or not infinity:
            raise BrokenJson(f"it holds {name}, which is no number of JSON")
        return float(name)

    try:
        text = text.decode() if isinstance(text, bytes) else text  # json.loads would guess at other encodings
        value = json.loads(text, object_pairs_hook=one_of_each, parse_int=whole, parse_float=finite,
                           parse_constant=constant)  # fmt: skip
    except RecursionError as error:
        raise BrokenJson(f"it is nested more than {MAX_DEPTH} levels deep") from error
    except UnicodeDecodeError as error:
        raise BrokenJson(f"it is not UTF-8 (byte {error.start})") from error
    check_depth(value)
    if SURROGATE.search(text):
        check_unicode(value)
    return value


def one_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each of whose keys is there once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, number in Counter(name for name, _ in pairs).items() if number > 1)
        raise BrokenJson(f"an object has the key {shorten(repr(twice), 80)} twice")
    return found


def whole(digits: str) -> int:
    """A whole number that a float can hold too."""
    if len(digits) > MAX_DIGITS:
        raise BrokenJson(f"it holds a number of {len(digits):,} digits")
    return int(digits)


def finite(text: str) -> float:
    """A number that is not too large for a float."""
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise BrokenJson(f"it holds the number {shorten(text, 40)}, which is too large")
    return value


def check_unicode(value: Any) -> None:
    """Refuse half a surrogate pair, which JSON can spell and UTF-8 cannot hold: it could not be written again."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BrokenJson("it holds half of a surrogate pair") from error


def check_depth(value: Any) -> None:
    """Refuse what no recursion should walk."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for each in level
            if isinstance(each, dict | list)
            for item in (each.values() if isinstance(each, dict) else each)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise BrokenJson(f"it is nested more than {MAX_DEPTH} levels deep")


def read_json(path: Path, *, infinity: bool = False) -> dict[str, Any]:
    """A JSON object from a file; see ``decode_json``.

    Raises:
        UserError: when it is none, naming the file.
    """
    try:
        value = decode_json(read_regular(path, MAX_JSON_BYTES), infinity=infinity)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    return check_object(value, str(path))


def check_object(value: Any, where: str) -> dict[str, Any]:
    """A value that must be an object."""
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold a JSON object")
    return value
