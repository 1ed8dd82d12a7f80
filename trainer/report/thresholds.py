"""A run's caption rules by its records alone: what training finds, without a model."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from trainer.config.schema import Config
from trainer.core.layout import RUN_FILE
from trainer.data.percentiles import (
    Resolved,
    Thresholds,
    by_percentile,
    choose_thresholds,
    is_of,
    resolve_anew,
)
from trainer.data.tag_counts import find_frequent
from trainer.data.template import CaptionRules, ready_rules
from trainer.model.exports import find_run
from trainer.model.lineage import read_lineage


def find_caption_rules(config: Config, table: pa.Table) -> CaptionRules:
    """The caption rules as training has them, or will have them: thresholds, tables of tags, frequent tags.

    Raises:
        UserError: as ``find_thresholds``, and for a table of tags that cannot be read.
    """
    captions = find_thresholds(config, table).captions
    recorded = read_run_record(config) or {}
    frequent = find_frequent(captions, table, recorded.get("frequent_tags"))
    return ready_rules(captions, frequent["tags"] if frequent else ())


def read_run_record(config: Config) -> dict[str, Any] | None:
    """What this run has recorded; None where it has not begun."""
    records = Path(config.run.output_dir).expanduser() / config.run.name / RUN_FILE
    return json.loads(records.read_text(encoding="utf-8")) if records.is_file() else None


def find_thresholds(config: Config, table: pa.Table) -> Resolved:
    """Caption rules by score as training has them, or will have them: see ``choose_thresholds``.

    Raises:
        UserError: where ``captions.thresholds_from`` has no thresholds for these rules.
    """
    rules = config.captions
    if not by_percentile(rules):
        return Resolved(rules, None, "")
    own, recorded = None, read_run_record(config)
    if recorded is not None:
        # version 0.2.0 recorded none, and took those of the set
        own = recorded.get("thresholds", resolve_anew(rules, table, "").thresholds)
    if own is not None and not is_of(own, rules):
        own = None
    # what a fork branches off stands in for the base: it comes after it
    before = thresholds_of_base(Path(config.checkpoint.fork or config.model.pretrained))
    return choose_thresholds(rules, table, own=own, base=before)


def thresholds_of_base(base: Path) -> Thresholds | None:
    """What a local base, or the run that it is or lies in, records; None for a hub id, which is not fetched to look."""
    run = find_run(base)
    if run is not None and (run[0] / RUN_FILE).is_file():
        return json.loads((run[0] / RUN_FILE).read_text(encoding="utf-8")).get("thresholds")
    return (read_lineage(base) or {}).get("thresholds") if base.exists() else None
