"""Post -> the tags of its caption, part by part, before any draw. Recipe, section 2.

``CaptionRules`` are the config's rules, made ready once: thresholds resolved, tables read, frequent tags counted.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from trainer.config.caption_fields import CaptionPart
from trainer.config.schema import CaptionsConfig
from trainer.config.template_rules import list_kinds
from trainer.data.captions import (
    column_tags,
    column_text,
    quality_tag,
    spell_tags,
    split_caption,
    split_tags,
    year_tag,
)
from trainer.data.sites import TAG_CATEGORIES
from trainer.data.tag_maps import TagMaps, map_tags, read_tag_maps

CATEGORIES = tuple(TAG_CATEGORIES)
COLUMN_OF = {category: f"tags_{category}" for category in CATEGORIES}


class Stretch(NamedTuple):
    """Neighbouring parts that are all fixed, or are shuffled together."""

    first: int
    end: int  # after the last
    fixed: bool


class Composed(NamedTuple):
    """The tags of a caption in the template's order."""

    tags: list[str]
    ends: list[int]  # for each part, where its tags end
    labels: tuple[str, ...]  # of the parts
    runs: tuple[Stretch, ...]


@dataclass(frozen=True)
class CaptionRules:
    """The rules of captions, ready to be used."""

    config: CaptionsConfig  # quality rules by score
    labels: tuple[str, ...]
    runs: tuple[Stretch, ...]
    people: frozenset[str]  # what ``people`` parts take from the general tags; empty where there are none
    ruled: frozenset[str]  # columns that have rules
    maps: TagMaps
    frequent: frozenset[str]  # as captions spell them
    by_part: bool  # whether tags are left out by what part they belong to

    @property
    def protected(self) -> frozenset[str]:
        """Tags that are never left out, with spaces."""
        return self.maps.protected

    @property
    def uses_caption(self) -> bool:
        """Whether a post's own caption stands beside its tags, and does not take their place."""
        return mixes(self.config) or any(part.caption is not None for part in self.config.template)


def mixes(config: CaptionsConfig) -> bool:
    """Whether a sample has several captions."""
    mix = config.mix
    return mix.tags + mix.natural + mix.tags_natural + mix.natural_tags > 0


def ready_rules(config: CaptionsConfig, frequent: Iterable[str] = ()) -> CaptionRules:
    """The rules of a config in which nothing is left to be resolved.

    Args:
        frequent: tags that ``frequent_tag_dropout`` may leave out, as the index has them.

    Raises:
        UserError: for a table of tags that cannot be read.
    """
    template = config.template
    has_people = any(part.tags == "people" for part in template)
    return CaptionRules(
        config=config,
        labels=tuple(map(label_part, template)),
        runs=find_stretches(template),
        people=frozenset(config.people) if has_people else frozenset(),
        ruled=frozenset(rule.column for rule in config.columns),
        maps=read_tag_maps(config),
        frequent=(spelt := frozenset(spell_tags(frequent, config))),
        by_part=bool(spelt) or drops_by_part(config),
    )


def without_chance(rules: CaptionRules, *, shuffle: bool) -> CaptionRules:
    """The same rules, by which nothing is left out but what is too much for its part."""
    template = [dataclasses.replace(part, dropout=0.0, tag_dropout=0.0) for part in rules.config.template]
    config = dataclasses.replace(rules.config, template=template, shuffle=shuffle, tag_dropout=0.0, caption_dropout=0.0)
    return dataclasses.replace(rules, config=config, frequent=frozenset(), by_part=drops_by_part(config))


def drops_by_part(config: CaptionsConfig) -> bool:
    """Whether a part says that it, or some of its tags, may be left out."""
    return any(part.dropout or part.tag_dropout or part.max_tags is not None for part in config.template)


def label_part(part: CaptionPart) -> str:
    """What a part is called in reports, and in the names of its draws."""
    return next((f"{kind}: {what}" for kind, what in list_kinds(part).items()), "nothing")


def find_stretches(template: list[CaptionPart]) -> tuple[Stretch, ...]:
    """The runs of a template."""
    runs: list[Stretch] = []
    for number, part in enumerate(template):
        if runs and runs[-1].fixed == part.fixed:
            runs[-1] = runs[-1]._replace(end=number + 1)
        else:
            runs.append(Stretch(number, number + 1, part.fixed))
    return tuple(runs)


def compose(record: Mapping[str, Any], rules: CaptionRules, own_caption: str = "") -> Composed:
    """The tags of one sample's caption.

    Args:
        record: has the index's columns: ``tags_general`` ... ``tags_meta`` (separated by spaces), ``rating``,
            ``score``, ``year``, ``extra``; each may be None.
        own_caption: what ``caption`` parts take.
    """
    own = list_own_tags(record, rules)
    tags: list[str] = []
    ends: list[int] = []
    for part in rules.config.template:
        if part.caption is not None:
            tags += [f"{part.prefix}{own_caption}"] if own_caption else []
        else:
            for word in own[part.tags] if part.tags is not None else make_words(part, record, rules):
                if not word:
                    continue
                word = part.prefix + word if part.prefix else word
                if "," in word:
                    tags += split_caption(word)
                elif word := word.strip():
                    tags.append(word)
        ends.append(len(tags))
    return Composed(tags, ends, rules.labels, rules.runs)


def list_own_tags(record: Mapping[str, Any], rules: CaptionRules) -> dict[str, list[str]]:
    """A post's tags by category, with its people apart, as captions spell them."""
    if rules.maps:
        own = {category: (record[column] or "").split() for category, column in COLUMN_OF.items()}
        spelt = {category: spell_tags(tags, rules.config) for category, tags in map_tags(own, rules.maps).items()}
    else:
        spelt = {category: split_tags(record[column], rules.config) for category, column in COLUMN_OF.items()}
    if people := rules.people:
        general = spelt["general"]
        spelt["people"] = [tag for tag in general if tag in people]
        spelt["general"] = [tag for tag in general if tag not in people]
    return spelt


def make_words(part: CaptionPart, record: Mapping[str, Any], rules: CaptionRules) -> list[str]:
    """What a part has that is not made of the post's tags."""
    config = rules.config
    if part.text is not None:
        return [part.text]
    if part.column is not None:
        if part.column in rules.ruled:
            return column_tags(record, config, (part.column,))
        return [column_text(record, part.column)]
    match part.tag:
        case "rating":
            return [config.ratings.get(record["rating"], "")]
        case "quality":
            return [quality_tag(record["score"], config, record["rating"])]
        case "year":
            return [year_tag(record["year"], config)]
        case "columns" if config.columns:
            return column_tags(record, config, list_rest(config))
    return []


def list_rest(config: CaptionsConfig) -> list[str]:
    """The columns with rules that have no part of their own."""
    apart = {part.column for part in config.template}
    return [column for column in dict.fromkeys(rule.column for rule in config.columns) if column not in apart]
