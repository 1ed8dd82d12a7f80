"""What of a config must stay the same when a run resumes: each field says so beside itself, in the schema."""

import dataclasses
import typing
from typing import Any

from trainer.config.load import resolved_values
from trainer.config.schema import FREE, LENGTH, Config, ScheduleConfig
from trainer.config.yaml_text import bare, field_types
from trainer.core.files import sha256_json

INTERPOLATION = "${"  # a value that comes from elsewhere, perhaps from the environment
LENGTH_KEYS = {f"schedule.{item.name}" for item in dataclasses.fields(ScheduleConfig) if item.metadata == LENGTH}


def fixed_values(config: dict[str, Any], constant: bool | None = None) -> dict[str, Any]:
    """Dotted key -> value of all that must stay the same across a resume.

    ``config`` is complete, or as an older version wrote it: a field that it lacks has its default, which is how that
    version behaved. Values with interpolations stay as they are written; ``constant`` says whether the rate is, where
    that is not written either.
    """
    sections = fixed_fields(Config, config)
    flat = {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
    constant = flat["schedule.lr"] == "constant" if constant is None else constant
    return {key: value for key, value in flat.items() if not (constant and key in LENGTH_KEYS)}


def fixed_fields(section: Any, values: dict[str, Any]) -> dict[str, Any]:
    """One section without the fields that are free; sections and lists of sections within it likewise."""
    hints, fixed = field_types(section), {}
    for item in dataclasses.fields(section):
        if item.name not in hints or item.metadata == FREE:
            continue
        value = values[item.name] if item.name in values else default_value(item)
        fixed[item.name] = without_free(hints[item.name], value)
    return fixed


def without_free(hint: Any, value: Any) -> Any:
    """One field's value, by its annotation."""
    kind = bare(hint)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return fixed_fields(kind, value)
    if typing.get_origin(kind) is list and isinstance(value, list):
        return [without_free(typing.get_args(kind)[0], each) for each in value]
    return value


def default_value(item: "dataclasses.Field[Any]") -> Any:
    """A field's default as plain values, a section's as an empty mapping; None where the field is required."""
    if item.default_factory is dataclasses.MISSING:
        return None if item.default is dataclasses.MISSING else item.default
    value: Any = item.default_factory()
    if isinstance(value, list):
        return [dataclasses.asdict(each) if dataclasses.is_dataclass(type(each)) else each for each in value]
    return {} if dataclasses.is_dataclass(value) else value


def describe_fixed(config: Config) -> dict[str, Any]:
    """What a checkpoint records: the fixed values as written, and a digest of those that come from elsewhere.

    The digest shows a changed environment variable without storing it; None where no value needs one.
    """
    constant = config.schedule.lr == "constant"
    fixed, resolved = (fixed_values(values, constant) for values in (config.written, resolved_values(config)))
    outside = {key: resolved[key] for key in find_interpolated(fixed)}
    return {"values": fixed, "digest": sha256_json(outside) if outside else None}


def find_interpolated(fixed: dict[str, Any]) -> list[str]:
    """The keys of fixed values that come from elsewhere."""
    return [key for key, value in fixed.items() if INTERPOLATION in str(value)]
