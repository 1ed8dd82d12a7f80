"""Read configs: YAML files and what they extend, later over earlier, then ``key=value`` words; check; build.

OmegaConf stops at the first unknown key and coerces silently ("12" to 12, a bare ``no`` to "False"), so keys
and types are compared here first, and all problems are reported together.
"""

import dataclasses
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.environment import uses_environment
from trainer.config.extends import read_with_extended
from trainer.config.other_names import explain_unknown
from trainer.config.retired import ONLY_VALUES, carry_over
from trainer.config.rules import find_broken_rules
from trainer.config.schema import Config
from trainer.config.yaml_text import bare, field_types, is_place, read_override, wrap_lists
from trainer.core.console import log
from trainer.core.errors import UserError
from trainer.core.files import expand_home, home_path
from trainer.core.progress import format_count

KeyPath = tuple[str, ...]
Layer = dict[str, Any]  # of a config: what one file, or one word, says
SECTIONS = frozenset(field_types(Config))
COMMAND_LINE = "the command line"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config, by its dotted key."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


def load_config(
    files: Sequence[str | Path], overrides: Sequence[str] = (), *, preparing: bool = False, values: Layer | None = None
) -> Config:
    """Defaults, then ``values`` (a checkpoint's config, as it was written), the files in order, ``key=value`` words.

    ``preparing`` asks for nothing that only a training needs: its length and its rates.

    Raises:
        UserError: with all problems, each by its dotted name.
    """
    layers = [("the checkpoint", values)] if values else []
    layers += [layer for file in files for layer in read_with_extended(home_path(str(file)))]
    layers += [(COMMAND_LINE, read_override(word)) for word in overrides]
    carried = [(where, *carry_over(layer)) for where, layer in layers]
    for note in dict.fromkeys(note for _, _, notes in carried for note in notes):
        log.warning("note: %s", note)
    layers = [(where, layer) for where, layer, _ in carried]
    try:
        merged = OmegaConf.merge(*(OmegaConf.create(layer) for _, layer in layers))
        written = cast(Layer, OmegaConf.to_container(merged, resolve=False))
        resolved = wrap_lists(cast(Layer, OmegaConf.to_container(merged, resolve=True)), Config)
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None) or "config"
        raise UserError(f"{key}: {str(error).splitlines()[0]}{say_where(key, layers)}") from error
    if problems := sorted([*find_config_problems(resolved, preparing), *find_hidden_names(written)], key=str):
        listed = "\n".join(f"  {problem}{say_where(problem.key, layers)}" for problem in problems)
        raise UserError(
            f"{format_count(len(problems), 'problem')} in {', '.join(map(str, files)) or 'the config'}:\n{listed}"
        )
    config = build_dataclass(Config, resolved)
    return dataclasses.replace(config, written=fill_in(written, dataclasses.asdict(config)))


def say_where(key: str, layers: Sequence[tuple[str, Layer]]) -> str:
    """In which of several files a key stands, for messages; nothing where there is one file, or the key in none."""
    if len({where for where, _ in layers} - {COMMAND_LINE}) < 2:
        return ""
    # an entry that lacks something stands where its list does
    known = re.match(r"(.*\.\d+)\.", key)
    for sought in (key, known[1] if known else key):
        if found := [where for where, layer in layers if holds_key(layer, sought.split("."))]:
            return f" (in {found[-1]})" if found[-1] != COMMAND_LINE else f" (on {COMMAND_LINE})"
    return ""


def holds_key(value: Any, path: Sequence[str]) -> bool:
    """Whether a layer says something about a dotted key."""
    if not path:
        return True
    if isinstance(value, list):
        return path[0].isdigit() and int(path[0]) < len(value) and holds_key(value[int(path[0])], path[1:])
    return isinstance(value, dict) and path[0] in value and holds_key(value[path[0]], path[1:])


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
        if isinstance(run, dict) and uses_environment(str(run.get(name)), written):
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
            yield Problem(".".join((*path, str(name))), f"unknown key{explain_unknown(str(name), hints)}")
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
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
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
        filled[name] = fill_in(words, value) if isinstance(words, dict) and isinstance(value, dict) else words
    return filled


def resolved_values(config: Config) -> dict[str, Any]:
    """The config as plain values with interpolations resolved, to compare and to hash; never written to a file."""
    values = dataclasses.asdict(config)
    del values["written"]
    return values
