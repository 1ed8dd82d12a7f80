"""Tables that change a post's tags before anything else sees them: aliases, implications and removals of Danbooru.

Its tables ``tag_aliases`` and ``tag_implications`` have antecedent_name, consequent_name and status, ``tags`` name and
is_deprecated: https://danbooru.donmai.us/wiki_pages/api%3Atag_aliases and its neighbours.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config.schema import CaptionsConfig
from trainer.core.errors import UserError
from trainer.core.files import read_listed, sha256_json
from trainer.data.sources.record_files import iterate_records, strip_compression
from trainer.data.sources.records import BadRecord, parse_record

MAX_IMPLIED = 1000  # tags that one implies: Danbooru has some tens
PAIR = ("antecedent_name", "consequent_name")
TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")  # also compressed
ACTIVE_STATUS = (None, "active")  # a table without a status has active lines alone
TRUE_WORDS = (True, "true", "True", "t", "1", 1)  # how tables write that a tag is deprecated


@dataclass(frozen=True)
class TagMaps:
    """What becomes of tags, each as Danbooru writes it."""

    aliases: Mapping[str, str] = field(default_factory=dict)  # tag -> the one that stands for it, after all aliases
    implied: Mapping[str, frozenset[str]] = field(default_factory=dict)  # tag -> all that it implies, at any distance
    removed: frozenset[str] = frozenset()
    protected: frozenset[str] = frozenset()  # with spaces; neither implied nor removed

    def __bool__(self) -> bool:
        return bool(self.aliases or self.implied or self.removed)


def read_tag_maps(rules: CaptionsConfig) -> TagMaps:
    """The tables that the config names.

    Raises:
        UserError: for one that cannot be read, has no such lines, or has aliases or implications in a circle.
    """
    protected = {plain_name(tag) for tag in rules.protected_tags}
    if rules.protected_tags_file is not None:
        protected |= {plain_name(tag) for tag in read_list("captions.protected_tags_file", rules.protected_tags_file)}
    aliases = dict(read_pairs("captions.tag_aliases", rules.tag_aliases))
    implications: dict[str, set[str]] = {}
    for tag, implied in read_pairs("captions.tag_implications", rules.tag_implications):
        implications.setdefault(tag, set()).add(implied)
    ends = follow_aliases(aliases)
    closed = {tag: close_implications(tag, implications) for tag in implications}
    removed = frozenset(read_removals(rules.tag_removals))
    return TagMaps(ends, closed, removed, frozenset(protected))


def plain_name(tag: str) -> str:
    """A tag to be compared: with spaces, whichever way it is written."""
    return tag.strip().replace("_", " ")


def read_pairs(key: str, file: str | None) -> Iterator[tuple[str, str]]:
    """(antecedent, consequent) of the active lines of a table."""
    for line in read_lines(key, file):
        names = [line.get(name) for name in PAIR]
        if not all(isinstance(name, str) and name for name in names):
            raise UserError(f"{key}: {file}: a line needs {' and '.join(PAIR)}, but has {', '.join(line) or 'nothing'}")
        if line.get("status") in ACTIVE_STATUS:
            yield str(names[0]), str(names[1])


def read_removals(file: str | None) -> list[str]:
    """The tags that a list names, or a table, of which those that are deprecated where it says so."""
    if file is None:
        return []
    if not strip_compression(Path(file).name).endswith(TABLE_SUFFIXES):
        return read_list("captions.tag_removals", file)
    lines = list(read_lines("captions.tag_removals", file))
    if any(not isinstance(line.get("name"), str) for line in lines):
        raise UserError(f"captions.tag_removals: {file}: a line needs name, the tag")
    says = any("is_deprecated" in line for line in lines)
    return [line["name"] for line in lines if not says or line.get("is_deprecated") in TRUE_WORDS]


def read_list(key: str, file: str) -> list[str]:
    """A file of one tag a line."""
    try:
        return read_listed(Path(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {file} cannot be read: {error}") from error


def read_lines(key: str, file: str | None) -> Iterator[dict[str, Any]]:
    """The lines of a table as mappings."""
    if file is None:
        return
    try:
        for where, record in iterate_records(Path(file)):
            try:
                line = parse_record(record) if isinstance(record, bytes) else record
            except BadRecord as error:
                line = error
            if isinstance(line, BadRecord):
                raise UserError(f"{file}: {where}: {line.args[1]}")
            yield line
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def follow_aliases(aliases: Mapping[str, str]) -> dict[str, str]:
    """Where each tag's chain of aliases ends."""
    ends: dict[str, str] = {}
    for tag in aliases:
        seen = {tag: None}  # in order
        end = tag
        while end not in ends and (following := aliases.get(end)) is not None:
            if following in seen:
                raise UserError(f"captions.tag_aliases: a circle: {' -> '.join([*seen, following])}")
            seen[following] = None
            end = following
        end = ends.get(end, end)
        ends |= dict.fromkeys((each for each in seen if each in aliases), end)
    return ends


def close_implications(tag: str, implications: Mapping[str, set[str]]) -> frozenset[str]:
    """All that a tag implies, at any distance."""
    found: set[str] = set()
    waiting = [tag]
    while waiting:
        new = implications.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
        if len(found) > MAX_IMPLIED:
            raise UserError(f"captions.tag_implications: {tag} implies more than {MAX_IMPLIED:,} tags")
    if tag in found:  # both would be left out
        raise UserError(f"captions.tag_implications: {tag} implies itself by a detour")
    return frozenset(found)


def hash_tag_maps(maps: TagMaps) -> str:
    """SHA-256 of what the tables say, whatever files they lie in, and in which order."""
    implied = {tag: sorted(names) for tag, names in maps.implied.items()}
    return sha256_json(
        [sorted(maps.aliases.items()), sorted(implied.items()), sorted(maps.removed), sorted(maps.protected)]
    )


def map_tags(own: Mapping[str, list[str]], maps: TagMaps, counts: Counter[str] | None = None) -> dict[str, list[str]]:
    """A post's tags by category as the tables want them, each once in its category; ``counts`` gets what they did."""
    counts = Counter() if counts is None else counts
    replaced = {category: [maps.aliases.get(tag, tag) for tag in tags] for category, tags in own.items()}
    counts["replaced"] += sum(a != b for name in own for a, b in zip(own[name], replaced[name], strict=True))
    once = {name: dict.fromkeys(tags) for name, tags in replaced.items()}
    stay = {name: [tag for tag in tags if not is_removed(tag, maps)] for name, tags in once.items()}
    implied = frozenset().union(*(maps.implied.get(tag, ()) for tags in stay.values() for tag in tags))
    mapped = {
        name: [tag for tag in tags if tag not in implied or plain_name(tag) in maps.protected]
        for name, tags in stay.items()
    }
    counts["removed"] += sum(len(once[name]) - len(stay[name]) for name in own)
    counts["implied"] += sum(len(stay[name]) - len(mapped[name]) for name in own)
    return mapped


def is_removed(tag: str, maps: TagMaps) -> bool:
    """Whether a tag is in no caption; what it implies then stands for itself."""
    return tag in maps.removed and plain_name(tag) not in maps.protected
