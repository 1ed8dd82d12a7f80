"""What comes from environment variables must not lie in files: records, pages and pictures have their names instead."""

import os
import re
from collections.abc import Mapping
from typing import Any

VARIABLE = re.compile(r"\$\{\s*oc\.env:\s*\\?['\"]?(\w+)\\?['\"]?\s*(?:,([^{}]*))?")  # its name may be quoted
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
