"""Posts whose caption is empty: each is noted, and more of them than a share stop the preparation before it begins.

Such a caption comes of a finished one without words, or of neither a caption nor tags; a rating, a score and a year say
nothing of what an image shows.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.core.errors import UserError
from trainer.data.sites import TAG_CATEGORIES
from trainer.data.sources.records import NO_CAPTION
from trainer.prepare.remarks import Remarks

SPACE = " \t\r\n"
NO_WORDS = SPACE + ",|"  # what stands between the tags of a finished caption, the usual separator included
NOTE = "empty_caption"
MAX_EXAMPLES = 3


def check_empty_captions(inputs: pa.Table, share: float, remarks: Remarks) -> None:
    """Refuse more empty captions than data.max_empty_captions allows.

    Args:
        inputs: the posts that filters have let through.
        remarks: what their sources say of them.

    Raises:
        UserError: with some of them, and the text that their records hold under other names.
    """
    empty = inputs.filter(find_empty(inputs))
    if len(empty) <= share * len(inputs):
        return
    origins = ", ".join(empty["origin"].slice(0, MAX_EXAMPLES).to_pylist())
    lines = [
        f"{len(empty)} of {len(inputs)} posts have neither a caption nor tags, above data.max_empty_captions {share}: "
        f"{origins}{' ...' if len(empty) > MAX_EXAMPLES else ''}. Name the field of captions by a posts or "
        "dataset source's caption_column, mend the posts, or raise the share"
    ]
    others = {(line["source"], line["detail"]) for line in remarks.examples if line["note"] == NO_CAPTION}
    raise UserError("\n".join(lines + [f"  {source}: {detail}" for source, detail in sorted(others)[:MAX_EXAMPLES]]))


def note_empty_captions(table: pa.Table) -> list[dict[str, Any]]:
    """A note for each sample whose caption is empty."""
    rows = table.select(["key", "origin"]).filter(find_empty(table)).to_pylist()
    return [{**row, "note": NOTE} for row in rows]


def find_empty(table: pa.Table) -> pa.ChunkedArray:
    """Which rows of posts have no words: bool (n,)."""
    without_tags = pa.chunked_array([pa.array(np.ones(len(table), dtype=bool))])
    for category in TAG_CATEGORIES:
        without_tags = pc.and_(without_tags, has_only(table[f"tags_{category}"], SPACE))
    caption = table["caption"]
    return pc.if_else(pc.is_valid(caption), has_only(caption, NO_WORDS), without_tags)


def has_only(texts: pa.ChunkedArray, characters: str) -> pa.ChunkedArray:
    return pc.equal(pc.utf8_trim(pc.fill_null(texts, ""), characters), "")
