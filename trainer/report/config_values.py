"""Configs as they were written, value by value: what one changes of the recipe, and where several differ."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from trainer.config.extends import PROGRAM_FOLDER
from trainer.config.fixed import default_value, fixed_fields
from trainer.config.load import load_config
from trainer.config.retired import carry_over
from trainer.config.schema import Config
from trainer.config.yaml_text import bare, entry_hint, field_types, wrap_lists
from trainer.core.errors import UserError

RECIPES = "configs/stage*.yaml"
OWN_NAMES = {"run.name", "run.stage", "run.output_dir"}  # no two runs have the same
PARTS = ("model.train_unet", "model.train_text_encoder_1", "model.train_text_encoder_2")
DEFAULTS = "the defaults of trainer/config/schema.py"

Values = dict[str, Any]  # dotted key -> what was written there


@dataclass(frozen=True)
class Difference:
    """A key whose values are not all the same, and whether they decide what is trained."""

    key: str
    values: list[str]
    decides: bool


def flatten_config(written: dict[str, Any]) -> Values:
    """Every field's value as it was written, its default where nothing was; entries of lists without their defaults."""
    layer: dict[str, Any] = wrap_lists(carry_over(written)[0], Config)
    flat = {}
    for section, kind in field_types(Config).items():
        given, hints = layer.get(section), field_types(kind)
        for item in dataclasses.fields(kind):
            fields = given if isinstance(given, dict) else {}
            value = fields[item.name] if item.name in fields else default_value(item)
            flat[f"{section}.{item.name}"] = leave_out_defaults(hints[item.name], value)
    return flat


def leave_out_defaults(hint: Any, value: Any) -> Any:
    """What an entry of a list, or a section within a section, says beyond its defaults; anything else as it is."""
    kind, entry = bare(hint), entry_hint(hint)
    if dataclasses.is_dataclass(entry) and isinstance(value, list):
        return [leave_out_defaults(entry, each) for each in value]
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        defaults = {item.name: item.default for item in dataclasses.fields(kind)}
        return {name: each for name, each in value.items() if name not in defaults or each != defaults[name]}
    return value


@functools.cache
def deciding_keys() -> frozenset[str]:
    """The keys that a resume may not change: samples, model and optimizer depend on them."""
    sections = fixed_fields(Config, {section: {} for section in field_types(Config)})
    return frozenset(f"{section}.{name}" for section, fields in sections.items() for name in fields)


@functools.cache
def read_recipes() -> dict[str, Values]:
    """The stages' own configs by path, where the repository lies beside the package."""
    recipes = {}
    for path in sorted(PROGRAM_FOLDER.glob(RECIPES)):
        try:
            config = load_config([path], preparing=True)
        except UserError:  # somebody works on it
            continue
        recipes[path.relative_to(PROGRAM_FOLDER).as_posix()] = flatten_config(config.written)
    return recipes


def find_recipe(values: Values) -> tuple[str, Values]:
    """The stage's config that a run follows: by the stage's name, else the first that trains the same parts."""
    recipes = read_recipes()
    for keys in (("run.stage",), PARTS):
        for path, recipe in recipes.items():
            if all(recipe[key] == values[key] for key in keys):
                return path, recipe
    return DEFAULTS, flatten_config({})


def find_differences(configs: Sequence[Values]) -> list[Difference]:
    """Keys that have several values, those first that decide what is trained, in the order of the schema."""
    found = [
        Difference(key, [say_value(values[key]) for values in configs], key in deciding_keys())
        for key in configs[0]
        if key not in OWN_NAMES and any(values[key] != configs[0][key] for values in configs)
    ]
    return sorted(found, key=lambda difference: not difference.decides)


def say_value(value: Any) -> str:
    """A value as YAML on one line, text without quotes."""
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9)
    return text.removesuffix("\n").removesuffix("...").strip()
