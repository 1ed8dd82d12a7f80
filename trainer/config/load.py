"""Read configs: YAML files, later over earlier, then ``key=value`` words; check them; build the dataclasses.

OmegaConf stops at the first unknown key and coerces silently ("12" to 12, a bare ``no`` to "False"), so keys
and types are compared here first, and all problems are reported together.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.retired import ONLY_VALUES, carry_over
from trainer.config.rules import find_broken_rules
from trainer.config.schema import Config
from trainer.config.yaml_text import bare, field_types, is_place, read_override, read_yaml
from trainer.core.errors import UserError
from trainer.core.files import expand_home, home_path

KeyPath = tuple[str, ...]
Layer = dict[str, Any]  # of a config: what one file, or one word, says
SECTIONS = frozenset(field_types(Config))


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config, by its dotted key."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


def parse_command_line(description: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    """``--config FILE...`` and ``key=value`` words, as every command that reads a config takes them."""
    return finish_command_line(config_parser(description), words)


def config_parser(description: str) -> argparse.ArgumentParser:
    """The parser of those words; a command adds its own options to it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", action="append", nargs="+", required=True, metavar="FILE",
                        help="YAML file; later ones override earlier ones")  # fmt: skip
    return parser


def finish_command_line(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse; ``key=value`` words may stand anywhere, even between files, and keep their order."""
    given = sys.argv[1:] if words is None else list(words)
    arguments, rest = parser.parse_known_args(given)
    named = [word for group in arguments.config for word in group]
    arguments.overrides = [word for word in given if is_override(word) and word in (*named, *rest)]
    arguments.config = [word for word in named if word not in arguments.overrides]
    if strange := [word for word in rest if word not in arguments.overrides]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if not arguments.config:
        parser.error("--config names no file")
    return arguments


def is_override(word: str) -> bool:
    """Whether a word is ``key=value`` and not a config file whose name holds "="."""
    key, equals, _ = word.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        return False
    looks, lies_here = word.endswith((".yaml", ".yml")), home_path(word).is_file()
    is_file = looks and lies_here if key.partition(".")[0] in SECTIONS else looks or lies_here
    return not is_file


def load_config(
    files: Sequence[str | Path], overrides: Sequence[str] = (), *, preparing: bool = False, values: Layer | None = None
) -> Config:
    """Defaults, then ``values`` (a checkpoint's config, as it was written), the files in order, ``key=value`` words.

    ``preparing`` asks for nothing that only a training needs: its length and its rates.

    Raises:
        UserError: with all problems, each by its dotted name.
    """
    read = [values] if values else []
    read += [read_yaml(home_path(str(file))) for file in files] + [read_override(word) for word in overrides]
    layers, notes = zip(*map(carry_over, read), strict=True) if read else ((), ())
    if os.environ.get("RANK", "0") == "0":
        for note in dict.fromkeys(chain.from_iterable(notes)):
            print(f"note: {note}", file=sys.stderr)
    try:
        merged = OmegaConf.merge(*map(OmegaConf.create, layers))
        written = cast(dict[str, Any], OmegaConf.to_container(merged, resolve=False))
        resolved = cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from error
    if problems := sorted([*find_config_problems(resolved, preparing), *find_hidden_names(written)], key=str):
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(f"{len(problems)} problem(s) in {', '.join(map(str, files)) or 'the config'}:\n{listed}")
    config = build_dataclass(Config, resolved)
    return dataclasses.replace(config, written=fill_in(written, dataclasses.asdict(config)))


def find_config_problems(resolved: dict[str, Any], preparing: bool = False) -> Iterator[Problem]:
    """All that is wrong with a resolved config: unknown and missing keys, wrong types, broken rules."""
    shape_problems = list(check_value(resolved, Config, ()))
    yield from shape_problems
    wrong_keys = [problem.key for problem in shape_problems]
    # rules judge the rest: what has a wrong shape is left at its default, and rules about it stay silent
    config = build_dataclass(Config, resolved, lenient=True)
    for keys, message in find_broken_rules(config, preparing):
        if not any(key == wrong or key.startswith(f"{wrong}.") for key in keys for wrong in wrong_keys):
            yield Problem(keys[0], message)


def find_hidden_names(written: dict[str, Any]) -> Iterator[Problem]:
    """Names that come from the environment: they are written to files, where no environment variable's value may go."""
    run = written.get("run")
    for name in ("name", "stage"):
        if isinstance(run, dict) and "oc.env" in str(run.get(name)):
            yield Problem(f"run.{name}", "must not come from an environment variable, because it is written to files")


def check_value(value: Any, hint: Any, path: KeyPath) -> Iterator[Problem]:
    """Problems of the shape of ``value``: it must be what the annotation ``hint`` says, to the last leaf."""
    key, kind = ".".join(path), bare(hint)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if value == "???":  # OmegaConf's way to say that a value must be given
        yield Problem(key, "missing")
    elif value is None and type(None) in typing.get_args(hint):
        return
    elif dataclasses.is_dataclass(kind):
        yield from check_section(value, kind, path)
    elif origin is Literal:
        # by type too: 225.0 == 225, and 1 == True
        if not any(value == known and type(value) is type(known) for known in arguments):
            yield Problem(key, f"must be one of {', '.join(map(str, arguments))}, not {value!r}")
    elif origin in (list, dict):
        if not isinstance(value, origin):
            yield Problem(key, f"must be a {'list' if origin is list else 'mapping'}, not {value!r}")
            return
        for name, item in value.items() if origin is dict else enumerate(value):
            yield from check_value(item, arguments[-1], (*path, str(name)))
    elif not has_type(value, kind):
        names = {int: "a whole number", float: "a number", str: "text (in quotes)", bool: "true or false"}
        yield Problem(key, f"must be {names[kind]}, not {value!r}")
    elif is_place(hint):
        try:
            expand_home(value)
        except UserError as error:
            yield Problem(key, str(error))


def check_section(value: Any, section: Any, path: KeyPath) -> Iterator[Problem]:
    """Problems of one section: unknown keys (with the nearest known one), missing keys, and those of its fields."""
    if not isinstance(value, dict):
        yield Problem(".".join(path), f"must be a section of key: value lines, not {value!r}")
        return
    hints = field_types(section)
    for name in value:
        if only := ONLY_VALUES.get(".".join((*path, str(name)))):
            yield Problem(".".join((*path, str(name))), f"can only be {only}, which needs not be said: leave it out")
        elif name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            yield Problem(".".join((*path, str(name))), "unknown key" + (f", did you mean {near[0]}?" if near else ""))
    for item in dataclasses.fields(section):
        if item.name not in hints:
            continue
        if item.name in value:
            yield from check_value(value[item.name], hints[item.name], (*path, item.name))
        elif is_required(item):
            # a missing section is reported by its required keys, so that the user sees all that must be written
            if dataclasses.is_dataclass(hints[item.name]):
                yield from check_section({}, hints[item.name], (*path, item.name))
            else:
                yield Problem(".".join((*path, item.name)), "missing")


def is_required(item: "dataclasses.Field[Any]") -> bool:
    """Whether a field has no default."""
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def has_type(value: Any, hint: type) -> bool:
    """Whether a YAML scalar is an int, a finite float (a whole number will do), str or bool."""
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, hint)


def build_dataclass(section: Any, value: Any, *, lenient: bool = False) -> Any:
    """The frozen dataclass ``section`` from a resolved mapping; ``lenient`` puts defaults where the shape is wrong."""
    hints = field_types(section)
    given = value if isinstance(value, dict) else {}
    fields: dict[str, Any] = {}
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            fields[name] = build_dataclass(hint, given.get(name), lenient=lenient)
        elif name in given and not (lenient and any(check_value(given[name], hint, ()))):
            fields[name] = build_value(given[name], hint)
        elif is_required(section.__dataclass_fields__[name]):
            assert lenient, f"{name} is missing"
            fields[name] = "missing"
    return section(**fields)


def build_value(value: Any, hint: Any) -> Any:
    """A checked YAML value as the annotation wants it: lists of dataclasses built, whole numbers made floats."""
    kind = bare(hint)
    if dataclasses.is_dataclass(kind):
        return build_dataclass(kind, value)
    if value is None:
        return None
    if typing.get_origin(kind) is list:
        return [build_value(item, typing.get_args(kind)[0]) for item in value]
    if is_place(hint):
        return expand_home(value)
    return float(value) if kind is float else value


def fill_in(written: dict[str, Any], complete: dict[str, Any]) -> dict[str, Any]:
    """``complete`` with the user's own words, interpolations unresolved, wherever the user wrote some."""
    filled: dict[str, Any] = {}
    for name, value in complete.items():
        if name == "written":
            continue
        words = written.get(name, value)
        is_section = name in Config.__dataclass_fields__ and isinstance(words, dict)
        filled[name] = fill_in(words, value) if is_section else words
    return filled


def resolved_values(config: Config) -> dict[str, Any]:
    """The config as plain values with interpolations resolved, to compare and to hash; never written to a file."""
    values = dataclasses.asdict(config)
    del values["written"]
    return values
