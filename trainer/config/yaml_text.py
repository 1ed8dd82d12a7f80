"""YAML files and ``key=value`` words as plain mappings in which text fields hold what was written.

YAML makes 202401 of 2024_01, False of no and 750 of 12:30. A field that the schema declares as text gets the characters
that the user wrote instead, in a file and on the command line alike.
"""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.schema import Config, Place
from trainer.core.errors import UserError

UNIONS = (types.UnionType, typing.Union)  # of int | None, and of Literal[...] | None
MERGE = "tag:yaml.org,2002:merge"  # of the key <<
YAML_ENDINGS = (".yaml", ".yml")  # of config files
# what PyYAML and OmegaConf raise over texts: of numbers and dates that are none, of tags, of deep nesting
YAML_ERRORS = (
    yaml.YAMLError, OmegaConfBaseException, ValueError, LookupError, AttributeError, TypeError, RecursionError,
)  # fmt: skip
NULLS = ("", "~", "null", "Null", "NULL")  # YAML's ways to say nothing


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML file as an unresolved mapping."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if isinstance(node, yaml.ScalarNode):
            raise UserError(f"config file {path} is not a mapping of sections (run:, model:, ...): it holds only text")
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror or error}") from error
    except YAML_ERRORS as error:
        raise UserError(f"config file {path} is not valid YAML: {error}") from error
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"config file {path} must hold sections (run:, model:, ...), not a list")
    return wrap_lists(restore_text(OmegaConf.to_container(loaded, resolve=False), node, Config), Config)


def read_override(word: str) -> dict[str, Any]:
    """One ``key=value`` word as an unresolved mapping.

    The value of a field of text, or of a list of text, is text as it stands, unless it is in quotes, null, or a list or
    mapping in brackets; any other field's value is YAML.
    """
    key, _, text = word.partition("=")
    hint, text = hint_of(key), text.strip()
    try:
        if (is_text(hint) or is_text(entry_hint(hint))) and text[:1] not in tuple("'\"[{"):
            value: Any = None if text in NULLS and not is_home(text, hint) else text
            for part in reversed(key.split(".")):
                value = {part: value}
            return wrap_lists(value, Config)
        mapping = OmegaConf.from_dotlist([word])
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        for part in reversed(key.split(".")):
            node = yaml.MappingNode("", [(yaml.ScalarNode("", part), node)])
        return wrap_lists(restore_text(OmegaConf.to_container(mapping, resolve=False), node, Config), Config)
    except YAML_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{word} is not key=value with a YAML value (text may need quotes): {reason}") from error


def restore_text(value: Any, node: yaml.Node | None, hint: Any) -> Any:
    """``value``, which YAML made of ``node``, with the written characters wherever the annotation asks for text."""
    if is_text(hint):
        if not isinstance(node, yaml.ScalarNode) or node.style is not None:  # in quotes
            return value
        changed = isinstance(value, bool | int | float) or (value is None and is_home(node.value, hint))
        return node.value if changed else value
    inner, hint = entry_hint(hint), bare(hint)
    if isinstance(value, list) and isinstance(node, yaml.SequenceNode) and inner is not None:
        return [restore_text(item, below, inner) for item, below in zip(value, node.value, strict=True)]
    if is_text(inner) and value is not None:
        return restore_text(value, node, inner)
    if isinstance(value, dict) and isinstance(node, yaml.MappingNode):
        nodes = nodes_by_key(node)
        return {key: restore_text(item, nodes.get(key), inner_hint(hint, key)) for key, item in value.items()}
    return value


def wrap_lists(value: Any, hint: Any) -> Any:
    """``value`` with each text that stands for a list of text as a list of one; what an interpolation gives is awaited.

    So a path needs no brackets, which zsh takes for a pattern.
    """
    inner, hint = entry_hint(hint), bare(hint)
    if isinstance(value, str) and is_text(inner) and "${" not in value and value != "???":
        return [value]
    if isinstance(value, list) and inner is not None:
        return [wrap_lists(item, inner) for item in value]
    if isinstance(value, dict):
        return {key: wrap_lists(item, inner_hint(hint, key)) for key, item in value.items()}
    return value


def nodes_by_key(node: yaml.MappingNode) -> dict[str, yaml.Node]:
    """The values of a mapping under the keys as written; those that << merges in too, which its own override."""
    merged: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if key.tag == MERGE:
            for merged_in in reversed(value.value if isinstance(value, yaml.SequenceNode) else [value]):
                merged |= nodes_by_key(merged_in)
    return merged | {key.value: value for key, value in node.value if key.tag != MERGE}


def hint_of(key: str) -> Any:
    """The annotation of the field that a dotted key names; None where there is none."""
    hint: Any = Config
    for part in key.split("."):
        hint = inner_hint(bare(hint), part)
    return hint


def inner_hint(hint: Any, key: Any) -> Any:
    """The annotation of what lies under a key of a section or of a mapping."""
    if dataclasses.is_dataclass(hint):
        return field_types(hint).get(key)
    return typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None


def entry_hint(hint: Any) -> Any:
    """The annotation of a list's entries; None of what is no list."""
    hint = bare(hint)
    return typing.get_args(hint)[0] if typing.get_origin(hint) is list else None


def field_types(section: Any) -> dict[str, Any]:
    """Field name -> annotation, of what a user may write."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "written"}


def bare(hint: Any) -> Any:
    """An annotation without ``| None`` and without what Annotated says."""
    if typing.get_origin(hint) in UNIONS:
        hint = next(argument for argument in typing.get_args(hint) if argument is not type(None))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def is_place(hint: Any) -> bool:
    """Whether an annotation is of a path, perhaps an optional one."""
    return Place in (hint, *typing.get_args(hint))


def is_home(text: str, hint: Any) -> bool:
    """Whether YAML's ~ means the home folder, in a path that cannot be null."""
    return text == "~" and hint == Place


def is_text(hint: Any) -> bool:
    """Whether an annotation asks for text: any, or one of some words."""
    hint = bare(hint)
    words = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    return hint is str or (bool(words) and all(isinstance(word, str) for word in words))
