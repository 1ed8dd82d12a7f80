"""Captions of several lines, of whatever source: the first line, all lines as tags, or one of them in each pass.

sd-scripts trains on the first line unless enable_wildcard is set, and then on one at random (library/train_util.py,
BaseDataset.process_caption). Tools that write one tag a line, such as gallery-dl, mean all of them.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from trainer.data.captions import VARIANT_SEPARATOR
from trainer.data.fields import Note, show_value
from trainer.data.post import Post
from trainer.data.sources.records import Item

Lines = Literal["first", "tags", "variants"]
LINE_END = re.compile(rf"[\r\n{VARIANT_SEPARATOR}]")
KINDS = {
    "first": "captions of several lines, of which the first is read",
    "tags": "captions of several lines, read as tags",
    "variants": "captions of several lines, read as variants",
}


def settle_lines(items: Iterator[Item], lines: Lines) -> Iterator[Item]:
    """The items of a source, their captions as the config wants them, which a post with several lines notes."""
    for item in items:
        yield settle_caption(item, lines) if isinstance(item, Post) and item.caption else item


def settle_caption(post: Post, lines: Lines) -> Post:
    """A post whose caption is one text, or variants of one."""
    caption = post.caption or ""
    if not LINE_END.search(caption):
        return post
    parts = [part for line in LINE_END.split(caption) if (part := line.strip())]
    if len(parts) < 2:  # only blank lines beside it: the text stays as it is
        return replace(post, caption=caption.replace(VARIANT_SEPARATOR, " "))
    match lines:
        case "first":
            told, detail = parts[0], f"not read: {show_value(parts[1])}; lines: tags or variants reads all"
        case "tags":
            told, detail = ", ".join(part.strip(", ") for part in parts), f"{len(parts)} lines"
        case "variants":
            told, detail = VARIANT_SEPARATOR.join(parts), f"{len(parts)} lines"
    return replace(post, caption=told, notes=(*post.notes, Note(KINDS[lines], detail)))
