"""What becomes no sample, or not as it stands: remarks of the sources, and inputs that are set aside.

Two things make a remark. A ``Post`` carries ``notes``: what of its record could not be taken as it is, and did not cost
the post. A source yields a ``Remark``: so many inputs that are neither a post nor set aside. Each is counted by source
and kind: in the manifest (``counts.by_source``, only where there are any), on the terminal and on the page. The first
few of a kind go into notes.jsonl.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.core.errors import shorten
from trainer.core.files import write_file
from trainer.data.fields import show_text
from trainer.data.post import Post
from trainer.data.sites import TAG_CATEGORIES
from trainer.data.sources.records import Remark, explain_reason

MAX_KINDS = 100  # of one source: some kinds have names that the input chooses, as extensions of files
OTHER_KINDS = "other kinds"
SHOWN_REASONS = 5  # of inputs that are set aside, in a message
EXAMPLES_OF_A_KIND = 20  # of one kind and source: a million posts may share one fault, and the count says so


@dataclass
class Remarks:
    """The remarks so far."""

    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # source -> kind -> how many
    examples: list[dict[str, Any]] = field(default_factory=list)  # lines of notes.jsonl

    def add(self, item: Post | Remark) -> None:
        """Count a remark, or all notes of a post."""
        if isinstance(item, Post):
            for note in item.notes:
                self.add(Remark(item.source, note.kind, 1, item.origin, note.detail, item.key))
            return
        kinds = self.counts.setdefault(item.source, {})
        kind, detail = show_text(item.kind), show_text(item.detail)
        if kind not in kinds and len(kinds) >= MAX_KINDS:
            kind, detail = OTHER_KINDS, f"{kind}: {detail}"
        if kinds.get(kind, 0) < EXAMPLES_OF_A_KIND:
            where = {"key": item.key, "origin": item.origin}
            self.examples.append(where | {"note": kind, "source": item.source, "detail": detail})
        kinds[kind] = kinds.get(kind, 0) + item.count

    def add_separator(self, post: Post, separator: str) -> None:
        """Count a post with the separator inside a tag: captions write it with spaces there."""
        word = separator.replace(" ", "_")
        if names := [f"tags_{name}" for name in TAG_CATEGORIES if word in (getattr(post, f"tags_{name}") or "")]:
            detail = f"{', '.join(names)}: {separator}"
            self.add(Remark(post.source, "separator inside a tag", 1, post.origin, detail, post.key))


def format_remarks(counts: dict[str, dict[str, int]]) -> list[str]:
    """Counts by source and kind, a line each."""
    return [f"{source}: {kind}: {count}" for source, kinds in counts.items() for kind, count in kinds.items()]


def write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    write_file(path, write)


def count_reasons(set_aside: list[dict[str, Any]]) -> dict[str, int]:
    """How many inputs are set aside for each reason, the most frequent first."""
    return dict(Counter(line["reason"] for line in set_aside).most_common())


def format_counts(counts: dict[str, int]) -> str:
    """Counts in one line; reasons in words."""
    return ", ".join(f"{count} {explain_reason(name)}" for name, count in counts.items())


def list_examples(set_aside: list[dict[str, Any]]) -> list[str]:
    """The commonest reasons, a line each with the first input that it concerns."""
    first = {line["reason"]: line for line in reversed(set_aside)}
    shown = [first[reason] for reason in list(count_reasons(set_aside))[:SHOWN_REASONS]]
    return [
        f"  {explain_reason(line['reason'])}, such as {line['origin']}: {shorten(line['detail'])}" for line in shown
    ]
