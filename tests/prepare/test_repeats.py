"""Sources that are seen more often than others: from the config to the steps."""

import json
from dataclasses import replace

import pytest

from support.posts_on_disk import draw, make_base, make_config, run
from trainer.config.schema import Config, SourceConfig
from trainer.core.errors import UserError
from trainer.data.index import open_index
from trainer.data.plan import build_plan
from trainer.data.sample_weights import find_repeats
from trainer.report.facts import walk_run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Six square drawings of one source and four of another, prepared."""
    folder = tmp_path_factory.mktemp("repeats")
    for name, numbers in (("many", range(6)), ("few", range(6, 10))):
        (folder / name).mkdir()
        for number in numbers:
            draw(folder / name / f"{number}.png", number, (64, 64))
        lines = "".join(json.dumps({"id": number, "tag_string_general": "1girl"}) + "\n" for number in numbers)
        (folder / f"{name}.jsonl").write_text(lines)
    sources = [
        SourceConfig("posts", str(folder / "many.jsonl"), str(folder / "many")),
        SourceConfig("posts", str(folder / "few.jsonl"), str(folder / "few"), name="curated", repeats=3),
    ]
    base = make_base(folder / "base")
    batch = {"global_batch_size": 2, "bucket_batch_size": 2, "micro_batch_size": 2}
    config = make_config(base, folder, posts=None, images=None, sources=sources, **batch)
    run(config)
    return config


def test_a_source_is_seen_as_often_as_it_says(config: Config) -> None:
    index = open_index(config.data.shards)
    assert sorted(set(index.table["source"].to_pylist())) == ["curated", "many.jsonl"]
    plan = build_plan(index, 42, config.data)
    assert plan.steps_for_epochs(1) == (6 + 4 * 3) // 2
    rows = [sample.row for step in range(plan.steps_for_epochs(1)) for sample in plan.step_samples(step)]
    seen = {index.row(row)["key"]: rows.count(row) for row in set(rows)}
    assert seen == {str(number): 1 if number < 6 else 3 for number in range(10)}
    # counted unit by unit
    units = [{sample.row for sample in plan.step_samples(step)} for step in range(9)]
    assert walk_run(plan, 9).repeating.tolist() == [sum(len(unit) < 2 for unit in units)]


def test_once_for_all_is_no_plan_of_its_own(config: Config) -> None:
    index = open_index(config.data.shards)
    once = replace(config.data, sources=[replace(source, repeats=1) for source in config.data.sources or ()])
    short = replace(config.data, sources=None)
    plans = [build_plan(index, 42, data) for data in (once, short)]
    assert plans[0].step_samples(3) == plans[1].step_samples(3) and find_repeats(index, once) is None


def test_a_source_that_nobody_names(config: Config) -> None:
    sources = [replace(source, name=None) for source in config.data.sources or ()]
    with pytest.raises(UserError, match=r"holds samples of curated, and no source is called so"):
        build_plan(open_index(config.data.shards), 42, replace(config.data, sources=sources))
