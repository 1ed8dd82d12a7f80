"""Which tags are frequent: by the samples that have them, however often and under whatever name."""

from collections import Counter
from pathlib import Path

import pyarrow as pa

from trainer.config.schema import CaptionsConfig
from trainer.data.tag_counts import count_rows_by_tag, find_frequent
from trainer.data.template import COLUMN_OF

ROWS = [
    ("miku hatsune_miku solo", ""), ("hatsune_miku solo solo", "hatsune_miku"), ("miku", "miku"), ("", ""),
    ("smile", "solo"),
]  # fmt: skip


def table_of(rows: list[tuple[str, str]]) -> pa.Table:
    texts = {column: [""] * len(rows) for column in COLUMN_OF.values()}
    texts |= {"tags_general": [row[0] for row in rows], "tags_character": [row[1] for row in rows]}
    return pa.table({"key": [str(number) for number in range(len(rows))], **texts})


def test_samples_are_counted_and_not_mentions() -> None:
    assert +count_rows_by_tag(table_of(ROWS), {}) == {"miku": 2, "hatsune_miku": 2, "solo": 3, "smile": 1}
    found = +count_rows_by_tag(table_of(ROWS), {"miku": "hatsune_miku", "nowhere": "solo"})
    assert found == {"hatsune_miku": 3, "solo": 3, "smile": 1}
    expected = Counter(
        tag for row in ROWS for tag in {"hatsune_miku" if t == "miku" else t for t in " ".join(row).split()}
    )
    assert found == expected


def test_the_share_is_of_the_samples(tmp_path: Path) -> None:
    """Four of ten have both names of a tag, and one has one of them: five are no more than half."""
    (tmp_path / "aliases.csv").write_text("antecedent_name,consequent_name\nmiku,hatsune_miku\n")
    rules = CaptionsConfig(tag_aliases=str(tmp_path / "aliases.csv"), frequent_tag_dropout=0.5, frequent_tag_share=0.5)
    table = table_of([("miku hatsune_miku", "")] * 4 + [("hatsune_miku", "")] + [("solo", "")] * 5)
    assert find_frequent(rules, table) == {"share": 0.5, "tags": []}
    assert find_frequent(rules, table_of([("miku", "")] * 6 + [("", "")] * 4)) == {
        "share": 0.5,
        "tags": ["hatsune_miku"],
    }
