"""What all pages share: templates, numbers and times as people read them, and that nothing else is written over.

A page is one file that asks for nothing on the network. What users and their files say is escaped by the templates, and
a page runs no script but its own: its policy names that by hash.
"""

import base64
import datetime
import functools
import hashlib
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trainer.core.errors import UserError
from trainer.core.files import write_text

SCRIPT_FILE = "page.js"
GENERATOR_BYTES = 1000  # within which a page of ours says what made it


def render(template: str, **values: Any) -> str:
    """A page, or a part of one, as HTML."""
    return environment().get_template(template).render(**values)


@functools.cache
def environment() -> Environment:
    """The templates, read once a process, with what they call."""
    made = Environment(
        loader=PackageLoader("trainer.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"percent": percent, "percentile": np.percentile, "figure": figure, "moment": moment}
    made.filters |= {"number": thousands, "duration": describe_seconds}
    assert made.loader is not None
    script = made.loader.get_source(made, SCRIPT_FILE)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made.globals |= {"script": Markup(script), "script_hash": f"sha256-{digest}"}
    return made


def check_page_path(path: Path, generator: str) -> None:
    """Refuse to write over anything but an earlier page of the same kind.

    Raises:
        UserError: naming the path.
    """
    if path.is_file():
        with path.open("rb") as file:
            if f'content="{generator}"'.encode() in file.read(GENERATOR_BYTES):
                return
    if path.exists() or path.is_symlink():
        made_by = generator.split()[-1]
        raise UserError(
            f"{path} is there and is no page of {made_by}: move it away, or have the page written elsewhere"
        )


def write_html(path: Path, page: str, generator: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        UserError: when something else lies there, or nothing can be written.
    """
    check_page_path(path, generator)
    try:
        write_text(path, page)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): have the page written elsewhere") from error


def link_from(page: Path, target: Path) -> str:
    """A relative URL from a page to a file or folder near it."""
    return quote(Path(os.path.relpath(target.resolve(), page.parent.resolve())).as_posix())


def thousands(value: float, digits: int = 0) -> str:
    """1,271,990."""
    return f"{value:,.{digits}f}"


def percent(part: float, whole: float) -> str:
    """A share, with enough digits to differ from none and from all."""
    if not whole:
        return "-"
    share = 100 * part / whole
    if 0 < share < 0.05 or 99.95 < share < 100:
        return f"{share:.3f}%"
    return f"{share:.1f}%"


def figure(value: float | None) -> str:
    """A measured number with four digits: 0.08123, 7.5e-6, 65,536; "-" where there is none."""
    if value is None or not np.isfinite(value):
        return "-"
    if value and not 1e-3 <= abs(value) < 1e9:
        return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def short_figure(value: float) -> str:
    """A round number for the edge of a drawing: 65.5k, 10M."""
    for letter, scale in (("M", 1e6), ("k", 1e3)):
        if max(scale, 1e4) <= abs(value) < 1e9:
            return f"{value / scale:g}{letter}"
    return figure(value)


def describe_seconds(seconds: float) -> str:
    """A time span in its two largest units: 2 d 4 h, 3 h 20 min, 12 min 5 s, 0.4 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    first = next(place for place, (_, length) in enumerate(units) if seconds >= length)
    smallest = units[min(first + 1, 3)][1]
    whole, parts = round(seconds / smallest) * smallest, []
    for name, length in units[: first + 2]:
        count, whole = divmod(whole, length)
        parts += [f"{count} {name}"] if count else []
    return " ".join(parts)


def moment(seconds: float) -> str:
    """A time, in seconds since 1970, as the clock here says."""
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
