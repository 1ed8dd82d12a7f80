"""Markdown from a template that may be a stranger's: sandboxed, all that it prints escaped, errors by file and line."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from trainer.core.errors import UserError


def cell(value: object) -> Markup:
    """Text that breaks neither a table nor the page: no line breaks, bars, or tags; what is marked as safe stays."""
    if isinstance(value, Markup):
        return value
    return Markup(" ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;"))


def plain(text: str) -> str:
    """Text that Markdown shows as it is: prompts are full of its signs, as in ``saber \\(fate\\)`` and ``^_^``."""
    return re.sub(r"([\\`*_\[\]])", r"\\\1", text)


def codes(words: Sequence[str]) -> Markup:
    """Words as code, with commas between them."""
    return Markup(", ".join(f"`{word}`" for word in words))


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
    environment.filters |= {"cell": cell, "plain": plain, "codes": codes}
    try:
        return environment.from_string(template.read_text(encoding="utf-8")).render(data)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the template {template} cannot be read: {error}") from error
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the template {template} fails in line {find_line(error)}: {error}") from error


def find_line(error: Exception) -> int | None:
    """The line of a template in which it failed, or cannot be parsed."""
    line, frame = getattr(error, "lineno", None), error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return line
