"""What a set's captions are like: of which kinds, how long, what is cut off, what tables make of their tags."""

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from trainer.core.progress import Meter, metered
from trainer.data.caption_draws import DrawnCaption, draw_record, join_drawn, list_words, share_out
from trainer.data.index import Index
from trainer.data.tag_maps import map_tags
from trainer.data.template import COLUMN_OF, CaptionRules, mixes, without_chance
from trainer.data.tokens import TextTokenizer
from trainer.report.survey import Counts, query_rows

TOKENIZED_AT_ONCE = 1000
KIND_WORDS = {
    "tags": "the template alone",
    "natural": "their own caption alone",
    "tags_natural": "the template, then their own caption",
    "natural_tags": "their own caption, then the template",
}


@dataclass(frozen=True)
class KindCounts:
    """Of how many captions which kind there will be in a pass, and what samples lack."""

    kinds: Counts  # expected, to the nearest caption
    without_tags: int  # of those that have a caption of their own
    without_caption: int  # of those that have tags
    without_both: int


@dataclass(frozen=True)
class Lengths:
    """Content tokens of whole captions, and what of them is not read."""

    tokens: np.ndarray  # int64 (n,)
    cut: Counts  # part -> captions that lose something of it, in the order of their frequency


def measure_captions(
    index: Index, rows: np.ndarray, rules: CaptionRules, tokenizer: TextTokenizer, seed: int
) -> Lengths:
    """As the first pass draws them, with nothing left out."""
    whole = without_chance(rules, shuffle=rules.config.shuffle)
    drawn = [draw_record(index.row(row), 0, seed, whole) for row in rows.tolist()]
    lengths: list[int] = []
    cut: Counter[str] = Counter()
    with Meter("count tokens", len(drawn), "caption") as meter:
        for start in range(0, len(drawn), TOKENIZED_AT_ONCE):
            some = drawn[start : start + TOKENIZED_AT_ONCE]
            lengths += map(len, tokenizer.content_ids([join_drawn(each) for each in some]))
            meter.update(len(some))
    limit = rules.config.max_token_length
    for each, length in zip(drawn, lengths, strict=True):
        if length > limit:
            cut.update(find_cut_parts(each, tokenizer, limit))
    return Lengths(np.array(lengths, dtype=np.int64), sorted(cut.items(), key=lambda item: (-item[1], item[0])))


def find_cut_parts(drawn: DrawnCaption, tokenizer: TextTokenizer, limit: int) -> set[str]:
    """The parts of which something stands behind the last token that is read."""
    pieces = list_words(drawn)
    lengths = map(len, tokenizer.content_ids([f"{tag}," for _, tag in pieces]))  # each with the comma after it
    ends = np.cumsum(list(lengths))
    if len(ends):
        ends[-1] -= 1  # the last has none
    return {part for (part, _), end in zip(pieces, ends.tolist(), strict=True) if end > limit}


def count_kinds(table: pa.Table, rules: CaptionRules) -> KindCounts | None:
    """Captions by what they are made of; None where samples have one caption each."""
    if not mixes(rules.config):
        return None
    sql = f"""SELECT concat_ws('', {", ".join(COLUMN_OF.values())}) <> '' AS tags,
              coalesce(trim(caption) <> '', false) AS own, count(*) FROM rows GROUP BY ALL"""
    expected: defaultdict[str, float] = defaultdict(float)
    found = {(tags, own): count for tags, own, count in query_rows(table, sql)}
    for (tags, own), count in found.items():
        for kind, share in share_out(rules.config.mix, tags, own).items():
            expected[KIND_WORDS[kind]] += share * count
    kinds = [(words, round(expected[words])) for words in KIND_WORDS.values() if expected[words]]
    return KindCounts(kinds, *(found.get(lack, 0) for lack in ((False, True), (True, False), (False, False))))


def count_mapped(table: pa.Table, rules: CaptionRules) -> Counts:
    """How many tags of the set the tables replace, leave out as implied, or remove; empty without tables."""
    if not rules.maps:
        return []
    counts: Counter[str] = Counter(dict.fromkeys(("replaced", "implied", "removed"), 0))
    for row in metered(
        zip(*(table[column] for column in COLUMN_OF.values()), strict=True), "map tags", "image", len(table)
    ):
        own = {category: (text.as_py() or "").split() for category, text in zip(COLUMN_OF, row, strict=True)}
        map_tags(own, rules.maps, counts)
    return list(counts.items())
