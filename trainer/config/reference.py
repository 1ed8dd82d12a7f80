"""What every field of a config means, read from the schema: for --help-config on a screen, and for docs/config.md."""

import ast
import dataclasses
import difflib
import inspect
import io
import re
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from typing import Any, Literal

import yaml

from trainer.config import caption_fields, schema
from trainer.config.other_names import explain_unknown
from trainer.config.schema import FREE, Config
from trainer.config.yaml_text import UNIONS, bare, entry_hint, field_types, is_place
from trainer.core.errors import UserError

WIDTH = 80  # columns of a screen
KINDS_OF_VALUE = {int: "whole number", float: "number", str: "text", bool: "true or false"}
RESUME = {"free": "may change when the run resumes", "length": "may change when the run resumes at a constant rate"}
FIXED = "fixed for the run"


@dataclasses.dataclass(frozen=True)
class FieldHelp:
    """One field, in words."""

    key: str  # dotted, of an entry of a list without a number: data.sources.kind
    meaning: str
    kind: str  # in words
    default: str  # as YAML; empty: it must be given
    resume: str


@dataclasses.dataclass(frozen=True)
class SectionHelp:
    """One section, or what lies in it: a section of its own, or an entry of one of its lists."""

    key: str
    meaning: str
    fields: list[FieldHelp]
    within: Literal["", "section", "entry"] = ""  # what it is in another section

    @property
    def heading(self) -> str:
        return f"an entry of {self.key}" if self.within == "entry" else self.key


def read_reference() -> list[SectionHelp]:
    """Every section, each followed by the entries of its lists."""
    comments: dict[str, str] = {}
    for module in (schema, caption_fields):
        comments |= read_comments(inspect.getsource(module))
    free = {item.name for item in dataclasses.fields(Config) if item.metadata == FREE}
    return [
        section
        for name, hint in field_types(Config).items()
        for section in read_section(name, hint, comments, name in free)
    ]


def read_section(
    key: str, section: Any, comments: dict[str, str], is_free: bool, within: Literal["", "section", "entry"] = ""
) -> Iterator[SectionHelp]:
    """One section, the sections in it, and what its lists consist of."""
    hints = field_types(section)
    items = [item for item in dataclasses.fields(section) if item.name in hints]
    fields = [
        FieldHelp(
            f"{key}.{item.name}",
            next((said for of in section.__mro__ if (said := comments.get(f"{of.__name__}.{item.name}"))), ""),
            describe_kind(hints[item.name]),
            describe_default(item),
            RESUME.get("free" if is_free or item.metadata == FREE else item.metadata.get("resume", ""), FIXED),
        )
        for item in items
    ]
    yield SectionHelp(key, comments.get(section.__name__, ""), fields, within)
    for item in items:
        inner, entry = bare(hints[item.name]), entry_hint(hints[item.name])
        if dataclasses.is_dataclass(entry):
            free = is_free or item.metadata == FREE
            yield from read_section(f"{key}.{item.name}", entry, comments, free, "entry")
        elif dataclasses.is_dataclass(inner):
            yield from read_section(f"{key}.{item.name}", inner, comments, is_free, "section")


def read_comments(source: str) -> dict[str, str]:
    """``Class`` -> its docstring, ``Class.field`` -> the comments before the field and beside it, on one line each."""
    beside: dict[int, str] = {}
    above: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            place = above if token.line.lstrip().startswith("#") else beside
            place[token.start[0]] = token.string.lstrip("# ").strip()
    said = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            said[node.name] = " ".join((ast.get_docstring(node) or "").split())
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    first = field.lineno
                    while first - 1 in above:
                        first -= 1
                    lines = [above.get(line) or beside.get(line) for line in range(first, (field.end_lineno or 0) + 1)]
                    said[f"{node.name}.{ast.unparse(field.target)}"] = " ".join(filter(None, lines))
    return said


def describe_kind(hint: Any) -> str:
    """What may be written for a field, in words."""
    kind = bare(hint)
    null = " or null" if type(None) in typing.get_args(hint) and typing.get_origin(hint) in UNIONS else ""
    if is_place(hint):
        return f"path{null}"
    if typing.get_origin(kind) is Literal:
        words = [str(word) for word in typing.get_args(kind)]
        return f"{', '.join(words[:-1])} or {words[-1]}{', or null' if null else ''}"
    if typing.get_origin(kind) is dict:
        return f"mapping of {' to '.join(map(describe_kind, typing.get_args(kind)))}{null}"
    if dataclasses.is_dataclass(kind):
        return f"section{null}"
    if (entry := entry_hint(hint)) is not None:
        return f"list of {'sections' if dataclasses.is_dataclass(entry) else describe_kind(entry)}{null}"
    return KINDS_OF_VALUE[kind] + null


def describe_default(item: "dataclasses.Field[Any]") -> str:
    """A field's default as YAML on one line; empty where it must be given."""
    if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
        return ""
    value: Any = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    if isinstance(value, list):
        value = [as_mapping(each) if dataclasses.is_dataclass(each) else each for each in value]
    elif dataclasses.is_dataclass(value):
        value = as_mapping(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def as_mapping(rule: Any) -> dict[str, Any]:
    """An entry of a list, or a section, without what is at its default."""
    defaults = {item.name: item.default for item in dataclasses.fields(rule)}
    return {name: value for name, value in dataclasses.asdict(rule).items() if value != defaults[name]}


# --- on a screen


def explain_config(names: list[str]) -> str:
    """What --help-config prints: the sections, or those fields that are asked for, at 80 columns.

    Raises:
        UserError: for a name that is neither a section nor a field, with the nearest.
    """
    sections = read_reference()
    if not names:
        shown = [f"{name_section(section)}\n{wrap(list_fields(section), 4)}" for section in sections]
        return "\n\n".join([*shown, wrap("One section or field: --help-config optim, --help-config optim.unet_lr", 0)])
    return "\n\n".join(part for name in names for part in explain_name(name, sections))


def explain_name(name: str, sections: list[SectionHelp]) -> list[str]:
    """The fields of a section and of its entries; or those that are called so, with or without their section."""
    if chosen := [section for section in sections if section.key == name and not section.within]:
        below = [section for section in sections if section.within and section.key.startswith(f"{name}.")]
        return [part for section in (*chosen, *below) for part in explain_section(section)]
    fields = [field for section in sections for field in section.fields]
    if found := [field for field in fields if name in (field.key, field.key.rpartition(".")[2])]:
        entries = [section for section in sections if section.within and section.key in [one.key for one in found]]
        return [*map(explain_field, found), *(part for section in entries for part in explain_section(section))]
    names = [*(section.key for section in sections), *(field.key for field in fields)]
    hint = explain_unknown(name.rpartition(".")[2], ())
    if not hint and (near := difflib.get_close_matches(name, names, n=1)):
        hint = f", did you mean {near[0]}?"
    listed = ", ".join(section.key for section in sections if not section.within)
    raise UserError(f"--help-config {name}: no section or field is called so{hint}\n  sections are: {listed}")


def explain_section(section: SectionHelp) -> list[str]:
    return [name_section(section), *map(explain_field, section.fields)]


def name_section(section: SectionHelp) -> str:
    return wrap(f"{section.heading}: {section.meaning}", 0)


def list_fields(section: SectionHelp) -> str:
    return ", ".join(field.key.rpartition(".")[2] for field in section.fields)


def explain_field(field: FieldHelp) -> str:
    default = f"default: {field.default}" if field.default else "must be given"
    lines = [f"  {field.key}", wrap(field.meaning, 6), wrap(f"{field.kind}; {default}; {field.resume}", 6)]
    return "\n".join(lines)


def wrap(text: str, indent: int) -> str:
    pad = " " * indent
    return textwrap.fill(text, WIDTH, initial_indent=pad, subsequent_indent=pad, break_on_hyphens=False)


# --- as a page

HEAD = """\
# Every field of a config

`python scripts/write_config_reference.py` writes this page from [the schema](../trainer/config/schema.py),
which says the same beside each field; on a screen `--help-config optim` prints a section. Do not edit this page.

A config is a YAML file of sections. `extends: configs/stage1_feature_alignment.yaml` lays it over another file, or over
several (`extends: [a.yaml, b.yaml]`, later over earlier); such a file is looked for beside the one that names it, then
in the working folder, then in the program's. Where the first two are there and differ, the path is written in full.
Values may also be set on the command line, as `section.field=value`. Paths are relative to the working folder, and `~`
is the home folder. A text in place of a list of texts is a list of one.

A field that is *fixed for the run* cannot change when the run resumes; `checkpoint.fork` begins another run with other
values.
"""


def write_reference() -> str:
    """The page docs/config.md."""
    sections = read_reference()
    links = [f"[{section.key}](#{section.key})" for section in sections if not section.within]
    return "\n".join([HEAD, f"Sections: {', '.join(links)}.", *map(write_section, sections)])


def write_section(section: SectionHelp) -> str:
    headings = {"": f"## {section.key}", "section": f"### `{section.key}`", "entry": f"### An entry of `{section.key}`"}
    heading = headings[section.within]
    return "\n".join(["", heading, "", section.meaning, "", *map(write_field, section.fields)])


def write_field(field: FieldHelp) -> str:
    default = f"default `{field.default}`" if field.default else "must be given"
    mark = f'<a id="{field.key}"></a>'
    name = field.key.rpartition(".")[2]
    return f"- {mark}**`{name}`**: {escape(field.meaning)}\\\n  {field.kind}; {default}; {field.resume}"


def escape(text: str) -> str:
    """A meaning as Markdown: what could be read as markup is shown as it is."""
    return re.sub(r"[*<>|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
