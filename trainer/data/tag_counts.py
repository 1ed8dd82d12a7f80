"""Which tags are frequent in a set: counted once, when a run begins, and recorded then."""

import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa

from trainer.config.schema import CaptionsConfig
from trainer.data.tables import connect
from trainer.data.tag_maps import read_tag_maps
from trainer.data.template import COLUMN_OF


def find_frequent(rules: CaptionsConfig, table: pa.Table, own: list[str] | None = None) -> list[str] | None:
    """The tags that more than ``frequent_tag_share`` of the samples have, sorted; None where none are asked for.

    Args:
        own: what this run recorded, which then counts.
    """
    if rules.frequent_tag_share is None:
        return None
    if own is not None:
        return own
    aliases, counts = read_tag_maps(rules).aliases, Counter[str]()
    for tag, count in count_all_tags(table).items():
        counts[aliases.get(tag, tag)] += count
    return sorted(tag for tag, count in counts.items() if count > rules.frequent_tag_share * len(table))


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
