"""Which tags are frequent in a set: counted once, when a run begins, and recorded then."""

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import pyarrow as pa

from trainer.config.schema import CaptionsConfig
from trainer.data.tables import connect
from trainer.data.tag_maps import read_tag_maps
from trainer.data.template import COLUMN_OF


class Frequent(TypedDict):
    """The tags that more than a share of a set's samples have, as they are recorded."""

    share: float
    tags: list[str]  # sorted, as the index has them, aliases replaced


def find_frequent(rules: CaptionsConfig, table: pa.Table, own: Frequent | None = None) -> Frequent | None:
    """The tags that more than ``frequent_tag_share`` of the samples have; None where none are asked for.

    Args:
        own: what this run recorded, which then counts.
    """
    share = rules.frequent_tag_share
    if share is None:
        return None
    if own is not None and own["share"] == share:
        return own
    counts = count_rows_by_tag(table, read_tag_maps(rules).aliases)
    return {"share": share, "tags": sorted(tag for tag, count in counts.items() if count > share * len(table))}


def count_rows_by_tag(table: pa.Table, aliases: Mapping[str, str]) -> Counter[str]:
    """In how many rows of an index each tag stands, over all categories, aliases replaced."""
    texts = f"SELECT key, concat_ws(' ', {', '.join(COLUMN_OF.values())}) AS text FROM rows"
    pieces = f"SELECT key, text, unnest(list_distinct(string_split(text, ' '))) AS piece FROM ({texts})"
    named = pa.table({"piece": pa.array(aliases.keys(), pa.string())})
    with tempfile.TemporaryDirectory() as folder, connect(Path(folder), rows=table, named=named) as database:
        counts = Counter(dict(database.execute(f"SELECT piece, count(*) FROM ({pieces}) GROUP BY piece").fetchall()))
        replaced = database.execute(f"SELECT DISTINCT key, text FROM ({pieces}) SEMI JOIN named USING (piece)")
        for _, text in iter(replaced.fetchone, None):
            own = set(text.split())
            counts.subtract(own)
            counts.update({aliases.get(tag, tag) for tag in own})  # which another tag of the row may be already
    del counts[""]
    return counts
