"""What is seen how often in a run: images and their views by artist, character, rating and year."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from trainer.report.survey import WHITE_SPACE, query_rows

MOST_SEEN = 20  # artists, and characters, that are listed

SQL_TAGS = f"""
    WITH words AS (
        SELECT unnest(list_distinct(string_split_regex(tags, '[{WHITE_SPACE}]+'))) AS name, views FROM rows
        WHERE tags IS NOT NULL
    )
    SELECT name, count(*), sum(views)::BIGINT FROM words WHERE name <> ''
    GROUP BY name ORDER BY sum(views) DESC, count(*) DESC, name LIMIT {MOST_SEEN}
"""
SQL_VALUES = """
    SELECT coalesce(value::VARCHAR, 'none') AS name, count(*), sum(views)::BIGINT FROM rows
    GROUP BY name ORDER BY name = 'none', name
"""


class ViewCounts(NamedTuple):
    """Images that have something in common, and how often they are seen together."""

    name: str
    images: int
    views: int


def count_views_by(table: pa.Table, views: np.ndarray) -> dict[str, list[ViewCounts]]:
    """Views of the most seen artists and characters, and of every rating and year.

    Args:
        views: (n,) int, of each row.
    """
    seen = pa.array(views)
    kinds = {
        "Artist": (SQL_TAGS, "tags_artist"),
        "Character": (SQL_TAGS, "tags_character"),
        "Rating": (SQL_VALUES, "rating"),
        "Year": (SQL_VALUES, "year"),
    }
    counts = {}
    for kind, (sql, column) in kinds.items():
        rows = pa.table({"tags" if sql is SQL_TAGS else "value": table[column], "views": seen})
        counts[kind] = [ViewCounts(*found) for found in query_rows(rows, sql)]
    return counts
