"""What a set of shards holds, counted over the columns of its index: no Python object lives as long as there are rows.

Everything here is a function of the index and of the config's rules; what a run makes of it is the plan's.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from trainer.config.schema import CaptionsConfig
from trainer.core.rng import rng
from trainer.data.captions import (
    VARIANT_SEPARATOR,
    column_tags,
    compose_caption,
    draw_caption,
    quality_tag,
    year_tag,
)
from trainer.data.shards import Row
from trainer.data.sites import TAG_CATEGORIES
from trainer.data.tokens import TextTokenizer

CAPTION_COLUMNS = ("caption", "rating", "score", "year", "extra", *(f"tags_{name}" for name in TAG_CATEGORIES))
EXAMPLE_GROUPS, EXAMPLE_KEYS = 10, 6  # of duplicates
TOKENIZED_AT_ONCE = 1000

Counts = list[tuple[str, int]]


@dataclass(frozen=True)
class Fits:
    """How images got into their buckets, float64 (n,) each."""

    cropped: np.ndarray  # share of the resized pixels
    factors: np.ndarray  # of the resize; above 1 enlarges


@dataclass(frozen=True)
class TagCounts:
    """The tags of one category, over the images whose caption is composed."""

    top: Counts  # the most frequent first, equal ones by name
    distinct: int
    images: int  # that have any


@dataclass(frozen=True)
class RuleCounts:
    """Which tags the config's rules give, over the images whose caption is composed; "" where they give none."""

    composed: int  # images
    finished: int  # images that bring a caption, which no rule touches
    ratings: Counts
    quality: Counts
    years: Counts
    columns: Counts  # empty where no rule is about a column


@dataclass(frozen=True)
class Duplicates:
    """Images of the same bytes."""

    groups: int
    images: int  # in those groups
    examples: list[tuple[int, list[str]]]  # the largest groups: how many, and a few of their keys


def measure_fits(table: pa.Table, upscale: bool) -> Fits:
    """Share of the resized pixels that is cropped away, and the factor of the resize.

    As ``buckets.fit_image`` makes them. With ``upscale`` off an image may have kept its size: then its crop is the
    centre of the unscaled image.
    """
    names = ("original_width", "original_height", "bucket_width", "bucket_height", "crop_left", "crop_top")
    width, height, bucket_width, bucket_height, left, top = (table[name].to_numpy().astype(np.int64) for name in names)
    wider = width / height > bucket_width / bucket_height
    factor = np.where(wider, bucket_height / height, bucket_width / width)
    if not upscale:
        centred = (left == (width - bucket_width) // 2) & (top == (height - bucket_height) // 2)
        factor = np.where(centred, 1.0, factor)
    resized = np.floor(width * factor + 0.5) * np.floor(height * factor + 0.5)
    return Fits(1 - bucket_width * bucket_height / resized, factor)


def count_in_ranges(values: np.ndarray, edges: Sequence[float]) -> list[int]:
    """How many values are at most edges[0], at most edges[1], ..., above the last: len(edges) + 1 numbers."""
    places = np.searchsorted(np.asarray(edges, dtype=np.float64), values, side="left")
    return np.bincount(places, minlength=len(edges) + 1).tolist()


def composed_batches(table: pa.Table, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of the rows whose caption is composed from tags, a record batch at a time."""
    for batch in table.select([*columns, "caption"]).to_batches():
        yield batch.filter(pc.is_null(batch["caption"]))


def count_tags(table: pa.Table, category: str, most: int) -> TagCounts:
    """The tags of one category as the index has them."""
    parts, images = [], 0
    for batch in composed_batches(table, [f"tags_{category}"]):
        lists = pc.utf8_split_whitespace(batch[f"tags_{category}"].drop_null())
        words = lists.flatten()
        words = words.filter(pc.not_equal(words, ""))  # in front of a leading space
        images += int(pc.sum(pc.not_equal(pc.utf8_trim_whitespace(batch[f"tags_{category}"]), "")).as_py() or 0)
        parts.append(counted(words))
    return sum_counts(parts, images, most)


def count_finished(table: pa.Table, separator: str, most: int) -> TagCounts:
    """What stands between the commas of the captions that sources brought."""
    parts, images = [], 0
    for batch in table.select(["caption"]).to_batches():
        captions = batch["caption"].drop_null()
        images += len(captions)
        for between in (separator, VARIANT_SEPARATOR):
            captions = pc.replace_substring(captions, between, ",")
        words = pc.split_pattern(captions, ",").flatten()
        words = pc.utf8_trim_whitespace(words)
        parts.append(counted(words.filter(pc.not_equal(words, ""))))
    return sum_counts(parts, images, most)


def counted(words: pa.Array) -> pa.Table:
    """Words and how often each occurs."""
    counts = pc.value_counts(words)
    return pa.table({"word": counts.field("values"), "count": counts.field("counts")})


def sum_counts(parts: list[pa.Table], images: int, most: int) -> TagCounts:
    """Counts of all batches together."""
    if not parts:
        return TagCounts([], 0, images)
    summed = pa.concat_tables(parts).group_by("word").aggregate([("count", "sum")])
    order = [("count_sum", "descending"), ("word", "ascending")]
    top = summed.take(pc.sort_indices(summed, sort_keys=order).slice(0, most))
    return TagCounts(list(zip(top["word"].to_pylist(), top["count_sum"].to_pylist(), strict=True)), len(summed), images)


def count_rules(table: pa.Table, rules: CaptionsConfig) -> RuleCounts:
    """Ratings, quality and year tags; the rules are asked once for each rating, score and year that occurs."""
    batches = list(composed_batches(table, ["rating", "score", "year"]))
    composed = sum(len(batch) for batch in batches)
    ratings, quality, years = (Counter[str]() for _ in range(3))
    # what the rules can give is shown even where it does not occur, in the rules' order
    ratings.update(dict.fromkeys(rules.ratings.values(), 0))
    quality.update(dict.fromkeys((rule.tag for rule in rules.quality), 0))
    years.update(dict.fromkeys((rule.tag for rule in rules.years), 0))
    if composed:
        named = pa.Table.from_batches(batches).group_by(["rating", "score", "year"]).aggregate([([], "count_all")])
        for record in named.to_pylist():
            ratings[rules.ratings.get(record["rating"], "")] += record["count_all"]
            quality[quality_tag(record["score"], rules, record["rating"])] += record["count_all"]
            years[year_tag(record["year"], rules)] += record["count_all"]
    columns = count_columns(table, rules) if rules.columns else Counter()
    counts = [list(counter.items()) for counter in (ratings, quality, years, columns)]
    return RuleCounts(composed, len(table) - composed, *counts)


def count_columns(table: pa.Table, rules: CaptionsConfig) -> Counter[str]:
    """Tags from the numbers that posts bring; "" for each post and column that gives none."""
    tags = Counter(dict.fromkeys((rule.tag for rule in rules.columns), 0))
    columns = len({rule.column for rule in rules.columns})
    for batch in composed_batches(table, ["extra"]):
        for extra in batch["extra"].to_pylist():
            found = column_tags(extra, rules)
            tags.update(found)
            tags[""] += columns - len(found)
    return tags


def count_sources(table: pa.Table) -> Counts:
    """Images of each source, the largest first."""
    counts = pc.value_counts(table["source"])
    named = zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)
    return sorted(named, key=lambda item: (-item[1], item[0]))


def find_duplicates(table: pa.Table) -> Duplicates:
    """Groups of images whose files have the same SHA-256."""
    counts = pc.value_counts(table["content_hash"])
    several = counts.filter(pc.greater(counts.field("counts"), 1))
    sizes = several.field("counts").to_numpy()
    largest = np.argsort(-sizes, kind="stable")[:EXAMPLE_GROUPS]
    examples = []
    for place in largest.tolist():
        keys = table["key"].filter(pc.equal(table["content_hash"], several.field("values")[place]))
        examples.append((int(sizes[place]), keys.slice(0, EXAMPLE_KEYS).to_pylist()))
    return Duplicates(len(several), int(sizes.sum()), examples)


def choose_rows(purpose: str, seed: int, rows: int, most: int) -> np.ndarray:
    """All rows, or ``most`` of them at random, in the index's order."""
    if rows <= most:
        return np.arange(rows)
    return np.sort(rng(purpose, seed).choice(rows, most, replace=False))


def take_captions(table: pa.Table, rows: np.ndarray) -> Iterator[Row]:
    """What captions are made of, of some rows in ascending order."""
    start = 0
    # batch by batch: taking from a long table joins all its strings first
    for batch in table.select(list(CAPTION_COLUMNS)).to_batches():
        inside = rows[(rows >= start) & (rows < start + len(batch))] - start
        yield from batch.take(pa.array(inside)).to_pylist()
        start += len(batch)


def measure_captions(
    table: pa.Table, rows: np.ndarray, rules: CaptionsConfig, tokenizer: TextTokenizer, progress: bool = False
) -> np.ndarray:
    """Content tokens of whole captions, nothing dropped and nothing cut: int64 (len(rows),).

    The order of the tags, which changes from pass to pass, does not change the length.
    """
    whole = dataclasses.replace(rules, shuffle=False, tag_dropout=0.0, caption_dropout=0.0)
    generator = rng("report lengths")  # its draws decide nothing
    captions = [draw_caption(compose_caption(row, rules), whole, generator) for row in take_captions(table, rows)]
    lengths: list[int] = []
    starts = range(0, len(captions), TOKENIZED_AT_ONCE)
    for start in tqdm(starts, "tokenize captions", unit=" thousand", disable=not progress):
        lengths += map(len, tokenizer.content_ids(captions[start : start + TOKENIZED_AT_ONCE]))
    return np.array(lengths, dtype=np.int64)
