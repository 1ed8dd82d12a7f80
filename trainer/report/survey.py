"""What a set of shards holds, counted over its index, as SQL where that counts faster and in less memory.

Everything here is a function of the index and of the config's rules; what a run makes of it is the plan's.
"""

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.config.schema import CaptionsConfig
from trainer.core.rng import rng
from trainer.data.captions import VARIANT_SEPARATOR, column_tags, quality_tag, year_tag
from trainer.data.tables import connect

EXAMPLE_GROUPS, EXAMPLE_KEYS = 10, 6  # of duplicates
WHITE_SPACE = r"\p{Z}\t-\r\x1c-\x1f\x{85}"  # in a pattern's brackets: what Python's str.split parts at

Counts = list[tuple[str, int]]


@dataclass(frozen=True)
class Fits:
    """How images got into their buckets, float64 (n,) each."""

    cropped: np.ndarray  # share of the resized pixels
    factors: np.ndarray  # of the resize; above 1 enlarges


@dataclass(frozen=True)
class TagCounts:
    """The tags of one category, over the images whose caption is composed; or the tags of finished captions."""

    top: Counts  # the most frequent first, equal ones by name
    distinct: int
    images: int  # that have any


@dataclass(frozen=True)
class RuleCounts:
    """Which tags the config's rules give, over the images whose caption is composed; "" where they give none.

    Those that no part of the template asks for are empty.
    """

    composed: int  # images
    finished: int  # images that have a finished caption, which no rule touches
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


def query_rows(table: pa.Table, sql: str, values: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
    """What a query finds in ``rows``, the table; ``values`` are the query's parameters."""
    with tempfile.TemporaryDirectory() as folder, connect(Path(folder), rows=table) as database:
        return database.execute(sql, values).fetchall()


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


def count_tags(table: pa.Table, category: str, most: int, beside: bool = False) -> TagCounts:
    """The tags of one category as the index has them; of all images where a caption of theirs stands ``beside``."""
    tags = f"tags_{category}"
    composed = "true" if beside else "caption IS NULL"
    texts = f"SELECT {tags} AS text FROM rows WHERE {composed} AND regexp_matches({tags}, '[^{WHITE_SPACE}]')"
    return count_words(table, texts, " ", f"string_split_regex(piece, '[{WHITE_SPACE}]+')", most)


def count_finished(table: pa.Table, separator: str, most: int) -> TagCounts:
    """What stands between the commas of the captions that sources finished."""
    texts = "SELECT replace(replace(caption, $separator, ','), $variant, ',') AS text FROM rows WHERE caption NOT NULL"
    trimmed = f"[regexp_replace(piece, '^[{WHITE_SPACE}]+|[{WHITE_SPACE}]+$', '', 'g')]"
    return count_words(table, texts, ",", trimmed, most, separator=separator, variant=VARIANT_SEPARATOR)


def count_words(table: pa.Table, texts: str, between: str, words: str, most: int, **values: str) -> TagCounts:
    """Words in the ``text`` of a query: cut at ``between``, and what is distinct then cut once more into ``words``.

    Patterns are slow, and distinct pieces few.
    """
    sql = f"""
        WITH texts AS ({texts}),
        pieces AS (
            SELECT piece, count(*) AS count FROM (SELECT unnest(string_split(text, $between)) AS piece FROM texts)
            GROUP BY piece
        ),
        words AS (
            SELECT word, sum(count)::BIGINT AS count FROM (SELECT unnest({words}) AS word, count FROM pieces)
            WHERE word <> '' GROUP BY word
        )
        SELECT word, count, count(*) OVER () FROM words ORDER BY count DESC, word LIMIT $most
    """
    found = query_rows(table, sql, {"between": between, "most": most, **values})
    ((images,),) = query_rows(table, f"SELECT count(*) FROM ({texts})", values)
    return TagCounts([(word, count) for word, count, _ in found], found[0][2] if found else 0, images)


def count_rules(table: pa.Table, rules: CaptionsConfig, beside: bool = False) -> RuleCounts:
    """Ratings, quality and year tags; the rules are asked once for each rating, score and year that occurs.

    Of all images where a caption of theirs stands ``beside``.
    """
    # what the rules can give is shown even where it does not occur, in the rules' order
    ratings = Counter(dict.fromkeys(rules.ratings.values(), 0))
    quality = Counter(dict.fromkeys((rule.tag for rule in rules.quality), 0))
    years = Counter(dict.fromkeys((rule.tag for rule in rules.years), 0))
    composed = "true" if beside else "caption IS NULL"
    sql = f"SELECT rating, score, year, count(*) FROM rows WHERE {composed} GROUP BY ALL ORDER BY ALL"
    for rating, score, year, count in query_rows(table, sql):
        ratings[rules.ratings.get(rating, "")] += count
        quality[quality_tag(score, rules, rating)] += count
        years[year_tag(year, rules)] += count
    columns = count_columns(table, rules, beside) if rules.columns else Counter()
    images, asked = ratings.total(), {part.tag for part in rules.template}
    return RuleCounts(
        composed=images,
        finished=len(table) - images,
        ratings=list(ratings.items()) if "rating" in asked else [],
        quality=list(quality.items()) if "quality" in asked else [],
        years=list(years.items()) if "year" in asked else [],
        columns=list(columns.items()),
    )


def count_columns(table: pa.Table, rules: CaptionsConfig, beside: bool) -> Counter[str]:
    """Tags from the numbers of posts; "" for each post and column that gives none."""
    tags = Counter(dict.fromkeys((rule.tag for rule in rules.columns), 0))
    columns = {rule.column for rule in rules.columns}
    rows = table if beside else table.filter(pc.is_null(table["caption"]))
    for batch in rows.select(sorted({"extra", "rating", "year"} | (columns & {*table.column_names}))).to_batches():
        for record in batch.to_pylist():
            found = column_tags(record, rules)
            tags.update(found)
            tags[""] += len(columns) - len(found)
    return tags


def count_sources(table: pa.Table) -> Counts:
    """Images of each source, the largest first."""
    return query_rows(table, "SELECT source, count(*) FROM rows GROUP BY source ORDER BY count(*) DESC, source")


def find_duplicates(table: pa.Table) -> Duplicates:
    """Groups of images whose files have the same SHA-256."""
    sql = """
        WITH copies AS (SELECT content_hash, count(*) AS size FROM rows GROUP BY content_hash HAVING size > 1)
        SELECT size, min(key, $keys), count(*) OVER (), sum(size) OVER ()
        FROM copies JOIN rows USING (content_hash) GROUP BY content_hash, size
        ORDER BY size DESC, min(key) LIMIT $groups
    """
    found = query_rows(table, sql, {"keys": EXAMPLE_KEYS, "groups": EXAMPLE_GROUPS})
    groups, images = found[0][2:] if found else (0, 0)
    return Duplicates(groups, int(images), [(size, keys) for size, keys, *_ in found])


def choose_rows(purpose: str, seed: int, rows: int, most: int) -> np.ndarray:
    """All rows, or ``most`` of them at random, in the index's order."""
    if rows <= most:
        return np.arange(rows)
    return np.sort(rng(purpose, seed).choice(rows, most, replace=False))
