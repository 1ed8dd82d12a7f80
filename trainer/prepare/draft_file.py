"""The file of a first config: its keys with their reasons, as YAML that reads back as it was meant."""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer.config.schema import Config, SourceConfig

LINE = 120  # characters


class Written(str):
    """YAML as it is written."""


@dataclass
class Draft:
    """A config in the making: by section the keys, their YAML and why; and what is to be said on the screen."""

    sections: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def add(self, section: str, key: str, value: Any, why: str = "") -> None:
        """A key with its value; text that is YAML already comes as :class:`Written`."""
        text = value if isinstance(value, Written) else as_yaml(value)
        self.sections.setdefault(section, []).append((key, text, why))


def write_draft(draft: Draft, extended: str, looked_at: str) -> str:
    """The config as a text; ``looked_at`` is where the data lie."""
    head = [
        f"# Written by scripts/new_run.py after a look at {oneline(looked_at)}: change what you like.",
        "# Every field: docs/config.md, or --help-config. Paths are relative to the folder in which commands start;",
        "# what extends names is looked for beside this file first, then there, then in the program's own folder.",
        f"extends: {extended}",
    ]
    order = [name for name in Config.__dataclass_fields__ if name in draft.sections]
    return "\n".join(
        [*head, *(line for name in order for line in ["", f"{name}:", *write_keys(draft.sections[name])]), ""]
    )


def write_keys(keys: list[tuple[str, str, str]]) -> Iterator[str]:
    """The lines of a section: a comment stands beside its key, or above where it is long."""
    for key, text, why in keys:
        line = f"  {key}:{'' if text.startswith(chr(10)) else ' '}{text}"
        comment = f"  # {oneline(why)}" if why else ""
        if comment and ("\n" in text or len(line + comment) > LINE):
            yield from textwrap.wrap(oneline(why), LINE, initial_indent="  # ", subsequent_indent="  # ")
            comment = ""
        yield line + comment


def oneline(text: str) -> str:
    """A text in a comment: without line breaks, which would end it."""
    return " ".join(text.split())


def as_yaml(value: Any) -> str:
    """A value as YAML on one line, in quotes where it needs them; ``${`` in a text is no interpolation."""
    if isinstance(value, str):
        value = value.replace("${", "\\${")
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def read_name(file: Path) -> str:
    """The run's name from a file's: letters, digits, . _ and - stay."""
    name = "".join(sign if sign.isascii() and (sign.isalnum() or sign in "._-") else "_" for sign in file.stem)
    return name.lstrip(".-") or "run"


def write_source(source: SourceConfig) -> str:
    """An entry of data.sources, in lines."""
    lines = [f"- kind: {source.kind}", f"  path: {as_yaml(source.path)}"]
    lines += [f"  images: {as_yaml(source.images)}"] if source.images is not None else []
    return "".join(f"\n    {line}" for line in lines)
