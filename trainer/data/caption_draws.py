"""What a pass sees of a sample's caption: which kind, which variant, what is left out, in which order.

Every draw has a stream of its own, named by what it is for, seed, pass and key; so an option that is turned moves the
draws of no other. The stream "caption" is version 0.2.0's: whole captions, the order of the free tags, tags left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from trainer.config.caption_fields import CaptionPart, MixConfig
from trainer.core.rng import rng
from trainer.data.captions import VARIANT_SEPARATOR, split_caption
from trainer.data.tag_maps import plain_name
from trainer.data.template import CATEGORIES, CaptionRules, Composed, Stretch, compose, without_chance

CaptionKind = Literal["empty", "finished", "tags", "natural", "tags_natural", "natural_tags"]
Names = tuple[int, int, str]  # of a draw: seed, pass and key
PARTS_OF_FINISHED = ("finished caption, kept", "finished caption", "finished caption, its end")  # the parts of one
RUNS_OF_FINISHED = (Stretch(0, 1, True), Stretch(1, 2, False), Stretch(2, 3, True))
NATURAL = "caption: natural"
SENTENCE_ENDS = (".", "!", "?", "…", "。")


class DrawnCaption(NamedTuple):
    """What one pass sees of a sample's caption."""

    kind: CaptionKind
    composed: Composed
    order: list[int]  # places in ``composed.tags`` of what is seen
    own_caption: str = ""  # where it is one of those


NO_WORDS = Composed([], [], (), ())


def draw_sample_caption(record: Mapping[str, Any], pass_: int, seed: int, rules: CaptionRules) -> str:
    """The caption of a sample in one pass."""
    return join_drawn(draw_record(record, pass_, seed, rules))


def whole_caption(record: Mapping[str, Any], rules: CaptionRules) -> str:
    """A caption in the template's order, with nothing left out."""
    return draw_sample_caption(record, 0, 0, without_chance(rules, shuffle=False))


def draw_record(record: Mapping[str, Any], pass_: int, seed: int, rules: CaptionRules) -> DrawnCaption:
    """The caption of a sample in one pass, with what it is made of."""
    names = (seed, pass_, record["key"])
    generator = rng("caption", *names)
    own = record["caption"]
    if own is not None and not rules.uses_caption:
        return draw_finished(own, rules, generator)
    # all is drawn always and in this order, so that turning one knob leaves the draws of the others as they were
    if generator.random() < rules.config.caption_dropout:
        return DrawnCaption("empty", NO_WORDS, [])
    text = draw_variant(own, names, rules.config.keep_tokens_separator) if own and rules.uses_caption else ""
    kind = draw_kind(rules.config.mix, has_tags(record), bool(text), names)
    if kind == "natural":
        return DrawnCaption(kind, Composed([text], [1], (NATURAL,), ()), [0], text)
    composed = compose(record, rules, text)
    order = draw_order(composed, rules, generator, names)
    if kind == "tags":
        return DrawnCaption(kind, composed, order, text)
    place = len(composed.tags)
    both = Composed([*composed.tags, text], [*composed.ends, place + 1], (*composed.labels, NATURAL), composed.runs)
    return DrawnCaption(kind, both, [*order, place] if kind == "tags_natural" else [place, *order], text)


def draw_finished(caption: str, rules: CaptionRules, generator: np.random.Generator) -> DrawnCaption:
    """One of its variants, free tags dropped and shuffled, no separator.

    Text after a second separator is a fixed tail. A caption without separator is free as a whole but for its
    ``keep_tokens`` leading tags. Recipe, section 2. Only a caption with variants has a draw for them.
    """
    config = rules.config
    if generator.random() < config.caption_dropout:
        return DrawnCaption("empty", NO_WORDS, [])
    if VARIANT_SEPARATOR in caption:
        variants = caption.split(VARIANT_SEPARATOR)
        caption = variants[int(generator.integers(len(variants)))]
    parts = caption.split(config.keep_tokens_separator)
    if len(parts) == 1:
        tags = split_caption(caption)
        head, free, tail = tags[: config.keep_tokens], tags[config.keep_tokens :], []
    else:
        head, free = split_caption(parts[0]), split_caption(parts[1])
        tail = [tag for part in parts[2:] for tag in split_caption(part)]
    ends = [len(head), len(head) + len(free), len(head) + len(free) + len(tail)]
    composed = Composed([*head, *free, *tail], ends, PARTS_OF_FINISHED, RUNS_OF_FINISHED)
    return DrawnCaption("finished", composed, draw_order(composed, rules, generator))


def draw_order(
    composed: Composed, rules: CaptionRules, generator: np.random.Generator, names: Names | None = None
) -> list[int]:
    """The places of the tags that are seen, in their order.

    Args:
        generator: draws the first run that is shuffled; each other has a stream of its own.
        names: of the draws by part; None where nothing is drawn by part.
    """
    config, ends = rules.config, composed.ends
    left_out = find_left_out(composed, rules, names) if names is not None and rules.by_part else frozenset()
    seen: list[int] = []
    for number, run in enumerate(composed.runs):
        first, end = ends[run.first - 1] if run.first else 0, ends[run.end - 1]
        if run.fixed:
            seen += range(first, end)
            continue
        if number > 1:  # after the first one that is shuffled
            assert names is not None
            generator = rng("caption run", *names, number)
        order = generator.permutation(end - first)
        if not config.shuffle:
            order = np.arange(end - first)
        if config.tag_dropout:  # the last of the draws
            kept = generator.random(end - first) >= config.tag_dropout
            if rules.protected:
                kept |= [is_protected(tag, rules) for tag in composed.tags[first:end]]
            order = order[kept[order]]
        seen += (order + first).tolist()
    return [place for place in seen if place not in left_out] if left_out else seen


def find_left_out(composed: Composed, rules: CaptionRules, names: Names) -> frozenset[int]:
    """The places of tags that are left out by what their part says, or because they are frequent."""
    left_out: set[int] = set()
    first = 0
    for part, label, end in zip(rules.config.template, composed.labels, composed.ends, strict=True):
        if end > first:
            generator = rng("caption part", *names, label)
            left_out.update(first + place for place in draw_left_out(composed.tags[first:end], part, rules, generator))
        first = end
    return frozenset(left_out)


def draw_left_out(
    tags: list[str], part: CaptionPart, rules: CaptionRules, generator: np.random.Generator
) -> Iterator[int]:
    """The places of those of a part's tags that are left out."""
    # all is drawn always and in this order, so that turning one knob leaves the draws of the others as they were
    whole = generator.random() < part.dropout
    each, often, rank = generator.random(len(tags)), generator.random(len(tags)), generator.permutation(len(tags))
    plain = [tag.removeprefix(part.prefix) for tag in tags]
    safe = [is_protected(tag, rules) for tag in plain]
    kept = []
    for place, tag in enumerate(plain):
        frequent = part.tags in (*CATEGORIES, "people") and tag in rules.frequent
        lost = whole or each[place] < part.tag_dropout
        lost = lost or (frequent and often[place] < rules.config.frequent_tag_dropout)
        if lost and not safe[place]:
            yield place
        else:
            kept.append(place)
    if part.max_tags is not None:
        kept.sort(key=lambda place: (not safe[place], place if part.fixed else rank[place]))
        yield from (place for place in kept[part.max_tags :] if not safe[place])


def is_protected(tag: str, rules: CaptionRules) -> bool:
    """Whether a tag is never left out."""
    return bool(rules.protected) and plain_name(tag) in rules.protected


def draw_variant(caption: str, names: Names, separator: str) -> str:
    """One of the variants of a post's own caption, as one text without separators."""
    variants = caption.split(VARIANT_SEPARATOR)
    text = variants[int(rng("caption variant", *names).integers(len(variants)))] if len(variants) > 1 else caption
    if separator not in text:
        return text.strip()
    return ", ".join([part for part in (part.strip(" ,") for part in text.split(separator)) if part])


def has_tags(record: Mapping[str, Any]) -> bool:
    """Whether a post has tags of its own; a rating, a score and a year say nothing of the image."""
    return any(record[f"tags_{category}"] for category in CATEGORIES)


def share_out(mix: MixConfig, tags: bool, natural: bool) -> dict[CaptionKind, float]:
    """The probability of each kind that a sample can have: what it lacks leaves its share to the others.

    Where the mix has none of those that it can have, it has what there is.
    """
    shares: dict[CaptionKind, float] = {"tags": mix.tags if tags else 0.0, "natural": mix.natural if natural else 0.0}
    both = tags and natural
    shares |= {"tags_natural": mix.tags_natural if both else 0.0, "natural_tags": mix.natural_tags if both else 0.0}
    total = sum(shares.values())
    if not total:
        return {"natural" if natural and not tags else "tags": 1.0}
    return {kind: share / total for kind, share in shares.items() if share}


def draw_kind(mix: MixConfig, tags: bool, natural: bool, names: Names) -> CaptionKind:
    """What a caption is made of this time; without a mix its template."""
    if not (mix.tags or mix.natural or mix.tags_natural or mix.natural_tags):
        return "tags"
    shares = share_out(mix, tags, natural)
    edges = np.cumsum(list(shares.values()))
    place = int(np.searchsorted(edges, rng("caption kind", *names).random(), side="right"))
    return list(shares)[min(place, len(shares) - 1)]


def join_drawn(drawn: DrawnCaption) -> str:
    """The caption as the tokenizers get it."""
    tags, own = drawn.composed.tags, drawn.own_caption
    joined = ", ".join([tags[place] for place in drawn.order])
    # a sentence ends with its own mark
    return joined.replace(f"{own}, ", f"{own} ", 1) if own.endswith(SENTENCE_ENDS) else joined


def list_words(drawn: DrawnCaption) -> list[tuple[str, str]]:
    """(part, tag) of what is seen, in its order."""
    owners = list_owners(drawn.composed)
    return [(owners[place], drawn.composed.tags[place]) for place in drawn.order]


def list_owners(composed: Composed) -> list[str]:
    """The part of each tag."""
    starts: Sequence[int] = [0, *composed.ends]
    return [
        label
        for label, first, end in zip(composed.labels, starts, composed.ends, strict=False)
        for _ in range(first, end)
    ]


def explain_parts(drawn: DrawnCaption) -> list[dict[str, Any]]:
    """What each part gave and what of it was left out, in the template's order; a part that gave nothing is none."""
    seen = set(drawn.order)
    parts: dict[str, dict[str, Any]] = {}
    for place, (label, tag) in enumerate(zip(list_owners(drawn.composed), drawn.composed.tags, strict=True)):
        own = parts.setdefault(label, {"part": label, "tags": [], "left_out": []})
        own["tags" if place in seen else "left_out"].append(tag)
    return list(parts.values())
