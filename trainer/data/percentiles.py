"""Quality rules by percentile -> rules by score: the thresholds of each rating, from the scores of a whole index."""

import dataclasses
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.config.schema import CaptionsConfig, QualityRule

Rating = Literal["g", "s", "q", "e", "none"]
RATINGS: tuple[Rating, ...] = ("g", "s", "q", "e", "none")  # posts without a rating are a group of their own


def resolve_percentiles(rules: CaptionsConfig, table: pa.Table) -> CaptionsConfig:
    """The same rules with scores for percentiles, the same for the same index; unchanged where there are none.

    A score is above p percent when more than that share of its rating's posts have scores below its own: it lies above
    the least score s at which p percent of them have s or less. Source: the card of Animagine XL 3.1, whose quality
    tags consider "both scores and post ratings".
    """
    if all(rule.above_percentile is None for rule in rules.quality):
        return rules
    ratings = pc.fill_null(table["rating"], "none").to_numpy(zero_copy_only=False)
    has_score = pc.is_valid(table["score"]).to_numpy(zero_copy_only=False)
    scores = pc.fill_null(table["score"], 0).to_numpy()
    resolved: list[QualityRule] = []
    # the highest first: where few scores make two thresholds equal, the higher rule counts
    for rule in sorted(rules.quality, key=lambda rule: -(rule.above_percentile or 0)):
        for rating in RATINGS if rule.rating is None else (rule.rating,):
            own = scores[has_score & (ratings == rating)]
            if len(own):
                resolved.append(dataclasses.replace(resolve_rule(rule, own), rating=rating))
    return dataclasses.replace(rules, quality=resolved)


def resolve_rule(rule: QualityRule, scores: np.ndarray) -> QualityRule:
    """One rule over the scores of one rating."""
    if rule.above_percentile is None:
        return rule
    limit = int(np.percentile(scores, rule.above_percentile, method="inverted_cdf"))
    return dataclasses.replace(rule, min_score=limit + 1, above_percentile=None)
