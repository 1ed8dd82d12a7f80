"""Captions as text, before and after a draw: what tests compare."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.data.caption_draws import draw_finished, join_drawn
from trainer.data.template import CaptionRules, compose


def compose_caption(record: Mapping[str, Any], rules: CaptionRules) -> str:
    """The caption of one sample before any draw, its runs parted by the separator; a finished one wins where it does.

    A template that does not begin with what is fixed begins with the separator.
    """
    if record["caption"] is not None and not rules.uses_caption:
        return record["caption"]
    composed = compose(record, rules, record["caption"] or "")
    separator = rules.config.keep_tokens_separator
    # the separator stays even beside an empty part: without it the caption would count as one that has none
    parts = [] if composed.runs[0].fixed else [separator]
    for number, run in enumerate(composed.runs):
        parts += [separator] if number else []
        first = composed.ends[run.first - 1] if run.first else 0
        parts.append(", ".join(filter(None, composed.tags[first : composed.ends[run.end - 1]])))
    return " ".join(part for part in (parts if len(parts) > 1 else [*parts, separator]) if part)


def draw_caption(caption: str, rules: CaptionRules, generator: np.random.Generator) -> str:
    """What a pass sees of a finished caption."""
    return join_drawn(draw_finished(caption, rules, generator))
