"""Rules of the parts of a caption, of their mix, and of what is left out of them."""

from collections import Counter
from collections.abc import Iterator

from trainer.config.caption_fields import CaptionPart
from trainer.config.schema import CaptionsConfig, Config

PART_KINDS = ("tags", "tag", "column", "text", "caption")  # of parts
ONE_TAG = ("text", "caption")  # kinds of parts that are a text, whole or not there
PartProblem = tuple[tuple[str, ...], str]


def template_rules(config: Config) -> Iterator[PartProblem]:
    """The keys concerned, the first of which names the problem, and the message."""
    captions = config.captions
    if not captions.template:
        yield ("captions.template",), "name at least one part"
    for number, part in enumerate(captions.template):
        yield from part_rules(f"captions.template.{number}", part)
    parts = Counter((kind, what) for part in captions.template for kind, what in list_kinds(part).items())
    for (kind, what), count in parts.items():
        if count > 1:
            yield ("captions.template",), f"has {count} parts {{{kind}: {what}}}: each may stand there once"
    yield from column_part_rules(captions)
    yield from mix_rules(captions)
    yield from dropout_rules(captions)


def list_kinds(part: CaptionPart) -> dict[str, str]:
    """What a part says that it is; one thing, if it is right."""
    return {kind: what for kind in PART_KINDS if (what := getattr(part, kind)) is not None}


def part_rules(key: str, part: CaptionPart) -> Iterator[PartProblem]:
    """One part by itself."""
    kinds = list_kinds(part)
    if len(kinds) != 1:
        said = f", not {' and '.join(kinds)} at once" if kinds else ""
        yield (key,), f"needs exactly one of {', '.join(PART_KINDS[:-1])} and {PART_KINDS[-1]}{said}"
        return
    ((kind, what),) = kinds.items()
    if not what.strip():
        yield (f"{key}.{kind}",), "must be some text"
    if "," in part.prefix:
        yield (f"{key}.prefix",), "must be some text without commas, at which captions are cut"
    for name in ("dropout", "tag_dropout"):
        if not 0 <= getattr(part, name) <= 1:
            yield (f"{key}.{name}",), f"must lie between 0 and 1, not {getattr(part, name)}"
    if part.max_tags is not None and part.max_tags < 1:
        yield (f"{key}.max_tags",), f"must be at least 1, not {part.max_tags}"
    if part.max_tags is not None and kind != "tags":
        yield (f"{key}.max_tags", f"{key}.{kind}"), f"has no effect on a part of the kind {kind}"
    if part.tag_dropout and kind in ONE_TAG:
        yield (f"{key}.tag_dropout", f"{key}.{kind}"), f"dropout leaves out a {kind}, which is one"


def column_part_rules(captions: CaptionsConfig) -> Iterator[PartProblem]:
    """Rules for numbers that no part asks for."""
    if any(part.tag == "columns" for part in captions.template):
        return
    asked = {part.column for part in captions.template}
    if unused := [rule.column for rule in captions.columns if rule.column not in asked]:
        keys = ("captions.columns", "captions.template")
        yield keys, f"has no effect: no part of captions.template is {{tag: columns}} or {{column: {unused[0]}}}"


def mix_rules(captions: CaptionsConfig) -> Iterator[PartProblem]:
    """Probabilities of kinds of captions."""
    shares = {name: getattr(captions.mix, name) for name in ("tags", "natural", "tags_natural", "natural_tags")}
    wrong = [name for name, share in shares.items() if not 0 <= share <= 1]
    for name in wrong:
        yield (f"captions.mix.{name}",), f"must lie between 0 and 1, not {shares[name]}"
    total = sum(shares.values())
    if not wrong and total and abs(total - 1) > 1e-6:
        yield ("captions.mix",), f"probabilities must add up to 1, not {total:g}"
    if total and any(part.caption is not None for part in captions.template):
        yield ("captions.mix", "captions.template"), "a part {caption: natural} has a place of its own: leave out one"


def dropout_rules(captions: CaptionsConfig) -> Iterator[PartProblem]:
    """What is left out by how frequent it is, and what never is."""
    share = captions.frequent_tag_share
    if (share is None) != (captions.frequent_tag_dropout == 0):
        keys = ("captions.frequent_tag_dropout", "captions.frequent_tag_share")
        yield keys, "needs captions.frequent_tag_share beside it, and that has no effect without it"
    if share is not None and not 0 < share < 1:
        yield ("captions.frequent_tag_share",), f"must lie between 0 and 1, not {share}"
    by_part = any(part.dropout or part.tag_dropout or part.max_tags is not None for part in captions.template)
    drops = captions.tag_dropout or captions.frequent_tag_dropout or by_part
    drops = drops or captions.tag_implications is not None or captions.tag_removals is not None
    for name in ("protected_tags", "protected_tags_file"):
        if getattr(captions, name) and not drops:
            yield (f"captions.{name}",), "has no effect: nothing leaves out single tags"
