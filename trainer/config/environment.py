"""What comes from environment variables must not lie in files: records, pages and pictures have their names instead."""

import os
import re
from collections.abc import Mapping
from typing import Any

VARIABLE = re.compile(r"\$\{\s*oc\.env:\s*\\?['\"]?(\w+)\\?['\"]?\s*(?:,([^{}]*))?")  # its name may be quoted
REFERENCE = re.compile(r"\$\{\s*(\w+(?:\.\w+)*)\s*\}")  # to another field
SHORTEST = 4  # characters: a shorter value hides nothing, and would be found in any word


def hide_environment(text: str, written: Mapping[str, Any]) -> str:
    """A text with ``${oc.env:NAME}`` in place of the values that a config, as written, takes from the environment.

    Also where a value came by way of another field.
    """
    values = {}
    for name, default in VARIABLE.findall(str(written)):
        value = os.environ.get(name, default.strip(" \\'\""))
        if len(value) >= SHORTEST:
            values[value] = f"${{oc.env:{name}}}"
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, values[value])
    return text


def uses_environment(text: str, written: Mapping[str, Any], seen: frozenset[str] = frozenset()) -> bool:
    """Whether a value, as it is written, takes something from the environment, by way of other fields too."""
    if "oc.env" in text:
        return True
    names = set(REFERENCE.findall(text)) - seen
    return any(uses_environment(str(find_key(written, name)), written, seen | names) for name in names)


def find_key(written: Any, name: str) -> Any:
    """What is written under a dotted key; None where nothing is."""
    for part in name.split("."):
        written = written.get(part) if isinstance(written, Mapping) else None
    return written
