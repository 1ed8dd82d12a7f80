"""Which tags are frequent in a set: counted once, when a run begins, and recorded then."""

import tempfile
from collections import Counter
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
    aliases, counts = read_tag_maps(rules).aliases, Counter[str]()
    for tag, count in count_all_tags(table).items():
        counts[aliases.get(tag, tag)] += count
    return {"share": share, "tags": sorted(tag for tag, count in counts.items() if count > share * len(table))}


def count_all_tags(table: pa.Table) -> Counter[str]:
    """How often each tag stands in an index, over all categories."""
    texts = ", ".join(COLUMN_OF.values())
    pieces = f"SELECT unnest(string_split(concat_ws(' ', {texts}), ' ')) AS piece FROM rows"
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, connect(Path(folder), rows=table) as database:
        for piece, count in database.execute(f"SELECT piece, count(*) FROM ({pieces}) GROUP BY piece").fetchall():
            for tag in piece.split():
                counts[tag] += count
    return counts
