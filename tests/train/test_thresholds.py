"""Thresholds of quality tags by percentile: recorded once, taken over by the curated stage, the same on resume."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from support.checkpoints import change_record
from trainer.config.caption_fields import QualityRule
from trainer.config.schema import CaptionsConfig, Config
from trainer.core.errors import UserError
from trainer.data.captions import quality_tag
from trainer.data.index import open_index
from trainer.data.percentiles import OWN_SCORES, choose_thresholds, resolve_anew
from trainer.data.shards import SCHEMA
from trainer.model.checkpoint import find_newest, read_train_state
from trainer.release.export import export
from trainer.report.thresholds import find_thresholds
from trainer.train.loop import train
from trainer.train.run import run_path

RULES = CaptionsConfig(quality=[QualityRule("best", above_percentile=90), QualityRule("fine", above_percentile=10),
                                QualityRule("worst")])  # fmt: skip
WORDS = ["captions.quality=[{tag: best, above_percentile: 90}, {tag: fine, above_percentile: 10}, {tag: worst}]"]


def table_of(scores: range) -> pa.Table:
    schema = pa.schema([field.with_nullable(True) for field in SCHEMA])
    rows = [dict.fromkeys(SCHEMA.names) | {"rating": "g", "score": score} for score in scores]
    return pa.Table.from_pylist(rows, schema=schema)


def tags(captions: CaptionsConfig, *scores: int) -> list[str]:
    return [quality_tag(score, captions, "g") for score in scores]


def test_a_curated_set_takes_the_thresholds_of_the_set_that_taught_the_tags() -> None:
    whole, curated = table_of(range(1000)), table_of(range(990, 1000))
    first = choose_thresholds(RULES, whole)
    assert first.source == OWN_SCORES and tags(first.captions, 50, 500, 990) == ["worst", "fine", "best"]
    alone = choose_thresholds(RULES, curated)  # of these ten, all best of the thousand, one would be the worst
    assert tags(alone.captions, 990) == ["worst"]
    second = choose_thresholds(RULES, curated, base=json.loads(json.dumps(first.thresholds)))
    assert second.captions == first.captions and second.source == "the base's lineage"
    assert second.thresholds == first.thresholds  # which the next stage takes over in turn


def test_a_base_with_other_rules_is_no_source() -> None:
    other = CaptionsConfig(quality=[QualityRule("great", above_percentile=50), QualityRule("bad")])
    base = choose_thresholds(other, table_of(range(1000))).thresholds
    assert choose_thresholds(RULES, table_of(range(10)), base=base).source == OWN_SCORES


def test_what_the_run_recorded_comes_first() -> None:
    own = resolve_anew(RULES, table_of(range(1000)), "").thresholds
    resolved = choose_thresholds(RULES, table_of(range(5)), own=own, base={"rules": []})
    assert resolved.thresholds == own and "record" in resolved.source


def test_rules_by_score_have_none() -> None:
    resolved = choose_thresholds(CaptionsConfig(), table_of(range(5)), own={"rules": [], "resolved": []})
    assert resolved.captions == CaptionsConfig() and resolved.thresholds is None


def named(folder: Path) -> CaptionsConfig:
    return CaptionsConfig(quality=RULES.quality, thresholds_from=str(folder))


def test_a_set_or_a_run_may_be_named(make_config: Callable[..., Config], tmp_path: Path) -> None:
    shards = Path(make_config().data.shards)
    of_set = choose_thresholds(named(shards), table_of(range(1000)), base={"rules": []})
    assert of_set.thresholds == resolve_anew(RULES, open_index(shards).table, "").thresholds
    (tmp_path / "run.json").write_text(json.dumps({"thresholds": of_set.thresholds}))
    of_run = choose_thresholds(named(tmp_path), table_of(range(1000)))
    assert of_run.captions.quality == of_set.captions.quality
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="records no thresholds"):
        choose_thresholds(named(tmp_path), table_of(range(9)))
    damaged = {"{": "cannot be read as JSON", "[]": "must hold a JSON object", '{"thresholds": [1]}': "has other rules"}
    for text, message in damaged.items():
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match=message):
            choose_thresholds(named(tmp_path), table_of(range(9)))
    with pytest.raises(UserError, match="neither a set of shards nor a run's folder"):
        choose_thresholds(named(tmp_path / "nothing"), table_of(range(9)))
    with pytest.raises(UserError, match="other thresholds than this run began with"):
        choose_thresholds(named(shards), table_of(range(9)), own=resolve_anew(RULES, table_of(range(7)), "").thresholds)


def read_state(config: Config) -> dict[str, Any]:
    newest = find_newest(run_path(config))
    assert newest is not None
    return read_train_state(newest)


def test_a_fork_takes_over_what_it_branches_off(make_config: Callable[..., Config]) -> None:
    parent = make_config(*WORDS, "run.name=parent", "schedule.max_steps=1")
    train(parent)
    other = read_state(parent)["thresholds"] | {"resolved": [dataclasses.asdict(QualityRule("best", 7, rating="g"))]}
    newest, file = find_newest(run_path(parent)), run_path(parent) / "run.json"
    assert newest is not None
    change_record(newest, thresholds=other)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"thresholds": other}))
    fork = make_config(*WORDS, "run.name=fork", "schedule.max_steps=2", f"checkpoint.fork={run_path(parent)}")
    assert find_thresholds(fork, open_index(fork.data.shards).table).thresholds == other
    train(fork)
    assert read_state(fork)["thresholds"] == other


def test_a_run_that_is_resumed_by_its_folder_keeps_its_thresholds(make_config: Callable[..., Config]) -> None:
    began = make_config(*WORDS, "run.name=run", "schedule.max_steps=1")
    train(began)
    other = read_state(began)["thresholds"] | {"resolved": [dataclasses.asdict(QualityRule("best", 7, rating="g"))]}
    newest = find_newest(run_path(began))
    assert newest is not None
    change_record(newest, thresholds=other)
    moved = make_config(*WORDS, f"run.output_dir={run_path(began) / 'on'}", "run.name=run", "schedule.max_steps=2",
                        f"checkpoint.resume={run_path(began)}")  # fmt: skip
    train(moved)
    assert read_state(moved)["thresholds"] == other


def test_a_second_stage_takes_over_and_resumes(make_config: Callable[..., Config], notes: Callable[[], str]) -> None:
    first = make_config(*WORDS, "run.name=first", "schedule.max_steps=1", "publish.formats=[diffusers]")
    train(first)
    assert "thresholds from the scores of this set itself; a curated set wants" in notes()
    recorded = read_state(first)["thresholds"]
    assert recorded == read_state(first)["lineage"]["thresholds"]
    # another stand-in for what the first stage saw: what is recorded counts, not what this set would give
    recorded["resolved"] = [dataclasses.asdict(QualityRule("best", 12345, rating="g"))]
    (folder,) = export(run_path(first))
    lineage = json.loads((folder / "lineage.json").read_text())
    lineage["thresholds"] = recorded
    (folder / "lineage.json").write_text(json.dumps(lineage))
    words = [*WORDS, "run.name=second", f"model.pretrained={folder}"]
    second = make_config(*words, "schedule.max_steps=1")
    assert find_thresholds(second, open_index(second.data.shards).table).thresholds == recorded  # before it trains
    train(second)
    assert "thresholds from the base's lineage" in notes().splitlines()[0]
    assert read_state(second)["thresholds"] == recorded
    (folder / "lineage.json").unlink()  # resumed, it needs the base's lineage no more
    train(make_config(*words, "schedule.max_steps=2"))
    assert read_state(second)["thresholds"] == recorded and read_state(second)["step"] == 2
    assert find_thresholds(second, open_index(second.data.shards).table).thresholds == recorded
