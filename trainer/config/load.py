"""Read configs: YAML files, later over earlier, then ``key=value`` words; check them; build the dataclasses.

OmegaConf stops at the first unknown key and coerces silently ("12" to 12, a bare ``no`` to "False"), so keys
and types are compared here first, and all problems are told at once.
"""

import argparse
import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.rules import find_broken_rules
from trainer.config.schema import Config
from trainer.core.errors import UserError

KeyPath = tuple[str, ...]
UNIONS = (types.UnionType, typing.Union)  # of int | None, and of Literal[...] | None


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
                        help="YAML file; later ones lie over earlier ones")  # fmt: skip
    return parser


def finish_command_line(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse; ``key=value`` words are taken out first, so that they may stand anywhere, even between files."""
    given = sys.argv[1:] if words is None else list(words)
    overrides = [word for word in given if "=" in word and not word.startswith("-")]
    arguments = parser.parse_args([word for word in given if word not in overrides])
    arguments.config = [file for group in arguments.config for file in group]
    arguments.overrides = overrides
    return arguments


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the files in order, then ``key=value`` words.

    Raises:
        UserError: with all problems, each by its dotted name.
    """
    layers = [read_yaml(Path(file)) for file in files] + [read_override(word) for word in overrides]
    try:
        merged = OmegaConf.merge(*layers)
        written = cast(dict[str, Any], OmegaConf.to_container(merged, resolve=False))
        resolved = cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from error
    if problems := sorted([*find_problems(resolved), *find_hidden_names(written)], key=str):
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(f"{len(problems)} problem(s) in {', '.join(map(str, files)) or 'the config'}:\n{listed}")
    config = build_dataclass(Config, resolved)
    return dataclasses.replace(config, written=fill_in(written, dataclasses.asdict(config)))


def read_yaml(path: Path) -> Any:
    """One YAML file as an unresolved OmegaConf mapping."""
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} is not valid YAML: {error}") from error
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"config file {path} must hold sections (run:, model:, ...), not a list")
    return loaded


def read_override(word: str) -> Any:
    """One ``key=value`` word as an unresolved OmegaConf mapping; the value is YAML."""
    try:
        return OmegaConf.from_dotlist([word])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{word} is not key=value with a YAML value (text may need quotes): {reason}") from error


def find_problems(resolved: dict[str, Any]) -> Iterator[Problem]:
    """All that is wrong with a resolved config: unknown and missing keys, wrong types, broken rules."""
    shape_problems = list(check_value(resolved, Config, ()))
    yield from shape_problems
    wrong_keys = [problem.key for problem in shape_problems]
    # rules judge the rest: what has a wrong shape is left at its default, and rules about it stay silent
    config = build_dataclass(Config, resolved, lenient=True)
    for keys, message in find_broken_rules(config):
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
    key = ".".join(path)
    if value == "???":  # OmegaConf's way to say that a value must be given
        yield Problem(key, "missing")
        return
    if dataclasses.is_dataclass(hint):
        yield from check_section(value, hint, path)
        return
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in UNIONS:
        if value is None and type(None) in arguments:
            return
        yield from check_value(value, next(a for a in arguments if a is not type(None)), path)
    elif origin is Literal:
        # by type too: 225.0 == 225, and 1 == True
        if not any(value == known and type(value) is type(known) for known in arguments):
            yield Problem(key, f"must be one of {', '.join(map(str, arguments))}, not {value!r}")
    elif origin is list:
        if not isinstance(value, list):
            yield Problem(key, f"must be a list, not {value!r}")
            return
        for number, item in enumerate(value):
            yield from check_value(item, arguments[0], (*path, str(number)))
    elif origin is dict:
        if not isinstance(value, dict):
            yield Problem(key, f"must be a mapping, not {value!r}")
            return
        for name, item in value.items():
            yield from check_value(item, arguments[1], (*path, str(name)))
    elif not has_type(value, hint):
        names = {int: "a whole number", float: "a number", str: "text (in quotes)", bool: "true or false"}
        yield Problem(key, f"must be {names[hint]}, not {value!r}")


def check_section(value: Any, section: Any, path: KeyPath) -> Iterator[Problem]:
    """Problems of one section: unknown keys (with the nearest known one), missing keys, and those of its fields."""
    if not isinstance(value, dict):
        yield Problem(".".join(path), f"must be a section of key: value lines, not {value!r}")
        return
    hints = field_types(section)
    for name in value:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            yield Problem(".".join((*path, str(name))), "unknown key" + (f", did you mean {near[0]}?" if near else ""))
    for item in dataclasses.fields(section):
        if item.name not in hints:
            continue
        if item.name in value:
            yield from check_value(value[item.name], hints[item.name], (*path, item.name))
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            # a missing section is told by its required keys, so that the user sees all there is to write
            if dataclasses.is_dataclass(hints[item.name]):
                yield from check_section({}, hints[item.name], (*path, item.name))
            else:
                yield Problem(".".join((*path, item.name)), "missing")


def field_types(section: Any) -> dict[str, Any]:
    """Field name -> annotation, of what a user may write."""
    return {name: hint for name, hint in typing.get_type_hints(section).items() if name != "written"}


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
        default = section.__dataclass_fields__[name]
        required = default.default is dataclasses.MISSING and default.default_factory is dataclasses.MISSING
        if dataclasses.is_dataclass(hint):
            fields[name] = build_dataclass(hint, given.get(name), lenient=lenient)
        elif name in given and not (lenient and any(check_value(given[name], hint, ()))):
            fields[name] = build_value(given[name], hint)
        elif required:
            assert lenient, f"{name} is missing"
            fields[name] = "missing"
    return section(**fields)


def build_value(value: Any, hint: Any) -> Any:
    """A checked YAML value as the annotation wants it: lists of dataclasses built, whole numbers made floats."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in UNIONS:
        return None if value is None else build_value(value, arguments[0])
    if typing.get_origin(hint) is list:
        return [
            build_dataclass(arguments[0], item) if dataclasses.is_dataclass(arguments[0])
            else build_value(item, arguments[0])
            for item in value
        ]  # fmt: skip
    return float(value) if hint is float else value


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
