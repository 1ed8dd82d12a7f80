"""Markdown by Jinja2 templates, which see plain values only: what they print breaks neither a table nor the page.

Values come from prompts, tags and other people's lineages, and may hold anything that Markdown or HTML means something
by.
"""

import json
import re
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from trainer.core.errors import UserError

PHONE_COLUMNS = 40  # of code on a screen of 390 pixels
CODE_COLUMNS = 76
IDENTIFIER = re.compile(r"`[A-Za-z0-9.:…-]+`")  # nothing in it means anything to Markdown, wherever the code may end
# control characters, and those by which text runs from right to left though its letters do not
UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")
# what begins a heading, a quotation, a list or a line across, at the beginning of a text; of "1." the point is escaped
BLOCK_MARK = re.compile(r"^(\s*)(\d*)((?<!\d)[#>]|(?<!\d)[-+=](?=[-+=\s]|$)|(?<=\d)[.)](?=\s|$))")


def render_markdown(template: Path, data: Mapping[str, Any]) -> str:
    """The text of a Jinja2 template with ``data``, which must be plain values: of an object, a template sees methods.

    Raises:
        UserError: for a template that cannot be read or that fails, naming the file and the line.
    """
    # autoescape leaves what is Markup as it is, and finalize makes everything that is printed Markup
    environment = ImmutableSandboxedEnvironment(
        autoescape=True, finalize=cell, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    filters = (cell, plain, spans, brief, codes, fenced, string)
    environment.filters |= {each.__name__: each for each in filters}
    try:
        return environment.from_string(template.read_text(encoding="utf-8")).render(data)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the template {template} cannot be read: {error}") from error
    except Exception as error:  # a template may raise whatever Python does, an AttributeError of a filter too
        raise UserError(f"the template {template} fails in line {find_line(error)}: {error}") from error


def find_line(error: Exception) -> int | None:
    """The line of a template in which it failed, or cannot be parsed."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return lines[-1] if lines else getattr(error, "lineno", None)


def cell(value: object) -> Markup:
    """Text that breaks neither a table nor the page: no line breaks, bars, or tags; what is marked as safe stays."""
    if isinstance(value, Markup):
        return value
    return Markup(one_line(str(value)).replace("|", "\\|").replace("<", "&lt;"))


def one_line(text: str) -> str:
    """A text on one line, without what no page shows and what turns the order of letters around."""
    return UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", " ".join(text.split()))


def plain(text: object) -> Markup:
    """Text that Markdown shows as it is: prompts are full of its signs, as in ``saber \\(fate\\)`` and ``^_^``."""
    return text if isinstance(text, Markup) else cell(BLOCK_MARK.sub(r"\1\2\\\3", escape_signs(str(text))))


def escape_signs(text: str) -> str:
    """Backslashes before what means something to Markdown within a line."""
    return re.sub(r"([\\`*\[\]~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)  # a_b is safe


def spans(text: str) -> Markup:
    """The same for text in which identifiers stand in backticks, as in a lineage's rows: these stay code."""
    if isinstance(text, Markup):
        return text
    parts = re.split(f"({IDENTIFIER.pattern})", text)
    escaped = "".join(part if IDENTIFIER.fullmatch(part) else escape_signs(part) for part in parts)
    return cell(BLOCK_MARK.sub(r"\1\2\\\3", escaped))


def brief(text: str) -> str:
    """Hashes and commits in backticks cut to 12 letters; CHANGES.md has them whole."""
    short = re.sub(r"`([0-9a-f]{12})[0-9a-f]{4,}`", r"`\1…`", str(text))
    return Markup(short) if isinstance(text, Markup) else short


def codes(words: Sequence[str]) -> Markup:
    """Words as code, with commas between them."""
    return Markup(", ".join(map(code, words)))


def code(word: str) -> str:
    """A word as code, in as many backticks as it takes."""
    text, runs = one_line(word), re.findall(r"`+", word)
    fence, space = "`" * max([1, *(len(run) + 1 for run in runs)]), " " if runs else ""
    return f"{fence}{space}{text}{space}{fence}"


def fenced(text: str, columns: int = PHONE_COLUMNS) -> Markup:
    """A code block that nothing in it can close, in lines of ``columns`` where there are spaces to break at.

    CLIP's tokenizers take a line break for a space, so that a prompt that is copied from here is the same.
    """
    lines = textwrap.wrap(one_line(text), columns, break_long_words=False, break_on_hyphens=False)
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
    return Markup("\n".join([fence, *lines, fence]))


def string(text: str) -> Markup:
    """A text as a string of Python, in parts of several lines where it is long; JSON's escapes are Python's too."""
    pieces = re.findall(rf".{{1,{CODE_COLUMNS - 8}}}(?:\s+|$)|\S+\s*", one_line(text)) or [""]
    literals = [json.dumps(piece, ensure_ascii=False) for piece in pieces]
    if len(literals) == 1:
        return Markup(literals[0])
    return Markup("\n".join(["(", *(f"    {literal}" for literal in literals), ")"]))
