"""The tags of a record by category, as Danbooru's strings: separated by spaces, underscores inside a tag.

Danbooru has strings (``tag_string_general``), gallery-dl lists or strings (``tags_general``), e621 a mapping, dumps of
Danbooru a list of ``{name, category}``, taggers and people commas. All give the same strings.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from trainer.data.fields import Note, check_text, is_absent, parse_json, show_text, show_value
from trainer.data.sites import TAG_CATEGORIES, TAG_CATEGORY_NUMBERS

PREFIXES = ("tag_string_", "tags_")
KNOWN = {name: category for category, names in TAG_CATEGORIES.items() for name in names}
LIST_AS_TEXT = ('["', "['")  # how a list begins that a table holds as text
COMMA = re.compile(r",\s|\s,")  # what no tag of a string separated by spaces has


def read_tags(record: Mapping[str, Any], notes: list[Note]) -> dict[str, str | None]:
    """Each category's tags, None where the record has none; a record without any category has all in general.

    Raises:
        ValueError: when a field is neither text nor a list of texts. Tags decide what an image is called.
    """
    nested = nest_tags(record.get("tags"))
    fields = find_fields(record, nested)
    tags = {category: join_fields(fields, names, notes) for category, names in TAG_CATEGORIES.items()}
    for name in sorted(fields.keys() - KNOWN.keys()):
        label, value = fields[name]
        if value:
            kind = f"tags of an unknown category: {show_text(name)}"
            notes.append(Note(kind, f"{show_text(label)}: {show_value(value)}"))
    if not any(value for name, (_, value) in fields.items() if name in KNOWN):
        for name in ("tag_string", "tags"):
            value = record.get(name)
            if not is_absent(value) and not nested and not isinstance(value, Mapping):
                return tags | {"general": read_tag_value(name, value, notes)}
    return tags


def nest_tags(tags: Any) -> dict[str, Any]:
    """Category -> tags of a field ``tags`` that says the categories: e621's mapping, or the list of old dumps."""
    if isinstance(tags, Mapping):
        return {str(name): value for name, value in tags.items()}
    if not isinstance(tags, list) or not all(isinstance(tag, Mapping) and "category" in tag for tag in tags):
        return {}
    nested: dict[str, Any] = {}
    for tag in tags:
        number = str(tag["category"])
        nested.setdefault(TAG_CATEGORY_NUMBERS.get(number, number), []).append(tag.get("name"))
    return nested


def find_fields(record: Mapping[str, Any], nested: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """A site's name of a category -> (field, value), the first that is there of the three ways to write it."""
    fields: dict[str, tuple[str, Any]] = {}
    for label in sorted(label for label in record if label.startswith(PREFIXES)):  # tag_string_ comes before tags_
        prefix = PREFIXES[0] if label.startswith(PREFIXES[0]) else PREFIXES[1]
        if not is_absent(record[label]):
            fields.setdefault(label[len(prefix) :], (label, record[label]))
    for name, value in nested.items():
        if not is_absent(value):
            fields.setdefault(name, (f"tags.{name}", value))
    return fields


def join_fields(fields: Mapping[str, tuple[str, Any]], names: Iterable[str], notes: list[Note]) -> str | None:
    """The tags of all fields that are of one category."""
    texts = [read_tag_value(*fields[name], notes) for name in names if name in fields]
    if len(texts) < 2:
        return texts[0] if texts else None
    return " ".join(text for text in texts if text)


def read_tag_value(name: str, value: Any, notes: list[Note]) -> str:
    """Tags as text or as a list."""
    if isinstance(value, str):
        if value.lstrip()[:2] not in LIST_AS_TEXT:
            return split_string(name, check_text(name, value), notes)
        text, value = value, parse_json(value)
        if not isinstance(value, list):
            raise ValueError(f"{name} holds a list written as text, which is not JSON: {show_value(text)}")
    if not isinstance(value, list):
        raise ValueError(f"{name} must be text or a list of texts, not {show_value(value)}")
    return read_tag_list(name, value, notes)


def split_string(name: str, text: str, notes: list[Note]) -> str:
    """A string of tags, as it is where they are separated by spaces already.

    They are separated by commas where a comma stands beside a space, or where there are commas and no spaces. A comma
    inside a word of a string with spaces is a part of that tag, and noted.
    """
    if "," not in text:
        return text
    if COMMA.search(text) or not re.search(r"\s", text.strip()):
        return " ".join("_".join(tag.split()) for tag in text.split(",") if tag.strip())
    note_commas(name, text.split(), notes)
    return text


def read_tag_list(name: str, tags: list[Any], notes: list[Note]) -> str:
    """A list of tags, each one word or several; of pixiv's own mappings the tag's name."""
    words: list[str] = []
    for tag in tags:
        tag = tag.get("name") if isinstance(tag, Mapping) else tag
        if is_absent(tag) or tag == "":
            continue  # what splitting an empty string leaves, and a table's empty cell
        if not isinstance(tag, str):
            raise ValueError(f"{name} must be a list of texts, but holds {show_value(tag)}")
        parts = tag.split(",") if COMMA.search(tag) else [tag]
        words += ["_".join(part.split()) for part in parts if part.strip()]
    note_commas(name, words, notes)
    return check_text(name, " ".join(words))


def note_commas(name: str, tags: Iterable[str], notes: list[Note]) -> None:
    if with_comma := [tag for tag in tags if "," in tag]:
        notes.append(Note("comma inside a tag", f"{name}: {show_value(' '.join(with_comma))}"))
