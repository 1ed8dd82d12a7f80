"""Subsets of a set: files of keys and rules; a run on one is that of a set that holds no more."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.paths import REPOSITORY
from support.set_on_disk import row, write_set
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.data.index import open_index, read_raw_latents
from trainer.data.plan import build_plan
from trainer.data.subset import describe_subset, open_chosen, record_subset
from trainer.model.checkpoint import find_newest, read_train_state
from trainer.prepare.prepare import prepare
from trainer.report.data_page import make_report, render_data, summarise
from trainer.report.explain import explain_step
from trainer.report.thresholds import find_caption_rules
from trainer.train.loop import train
from trainer.train.run import run_path

MakeConfig = Callable[..., Config]


def keys_of(config: Config) -> list[str]:
    return open_chosen(config.data, config.captions).table["key"].to_pylist()


def all_keys(config: Config) -> list[str]:
    return open_index(config.data.shards).table["key"].to_pylist()


def write_list(path: Path, keys: list[str]) -> Path:
    path.write_text("".join(f"{key}\n" for key in keys))
    return path


def test_rules_choose_and_exclude(make_config: MakeConfig, tmp_path: Path) -> None:
    scores = {"1": 200, "2": 120, "3": None, "4": 151, "5": 10, "6": -9}
    food, every = ["2", "3", "6"], sorted(scores)
    rows = [row(key, score=score, tags_general="food" if key in food else "cat") for key, score in scores.items()]
    shards = write_set(tmp_path / "set", rows)

    def choose(rules: str, *words: str) -> list[str]:
        return keys_of(make_config(f"data.shards={shards}", f"data.subset_rules=[{rules}]", *words))

    assert choose("{tag: food}") == food
    assert choose("{tag: food}, {column: score, above: 100}") == ["1", "2", "3", "4", "6"]
    assert choose("{tag: food, column: score, above: 100}") == ["2"]
    assert choose("{column: score, above: 100}, {tag: food, exclude: true}") == ["1", "4"]
    assert choose("{tag: food, exclude: true}, {tag: masterpiece, exclude: true}") == ["5"]
    assert choose("{tag: masterpiece}") == ["1", "4"]  # a tag that a score gives
    assert choose("{column: score, above: -99}, {tag: food}") == every
    words = "captions.quality=[{tag: masterpiece, above_percentile: 90}, {tag: plain}]"
    with pytest.raises(UserError, match=r"data.subset_rules.0.tag: which scores are masterpiece"):
        choose("{tag: masterpiece}", words)
    assert choose("{tag: food}", words) == food
    with pytest.raises(UserError, match=r"of the 6 images of .* none is chosen"):
        choose("{tag: no_such_tag}")


def test_files_of_keys(make_config: MakeConfig, tmp_path: Path) -> None:
    keys = all_keys(make_config())
    file = write_list(tmp_path / "keys.txt", [*keys[3:9][::-1], "", keys[3]])
    config = make_config(f"data.subset={file}")
    assert keys_of(config) == keys[3:9]
    index = open_chosen(config.data, config.captions)
    whole = open_index(config.data.shards)
    assert index.row(2) == whole.row(5) and np.array_equal(read_raw_latents(index, 2), read_raw_latents(whole, 5))
    assert len(index) == len(index.bucket_sizes) == 6 == len(pickle.loads(pickle.dumps(index)))
    assert describe_subset(record_subset(index)) == "subset: 6 of the 24 images of the set"
    # a rule beside it: both count
    wide = "data.subset_rules=[{column: original_width, above: 271}]"
    both = {*keys[3:9]} & {*keys_of(make_config(wide))}
    assert set(keys_of(make_config(f"data.subset={file}", wide))) == both and 0 < len(both) < 6
    # all of them are no subset
    everything = make_config(f"data.subset={write_list(tmp_path / 'all.txt', keys)}")
    assert record_subset(open_chosen(everything.data, everything.captions)) == record_subset(whole)
    write_list(file, [keys[0], "gone", "also/gone"])
    with pytest.raises(UserError, match="2 of 3 keys not in the set, such as gone, also/gone"):
        keys_of(config)
    for content in (b"", b"\n \n", b"\xff\xfe\xff"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"data.subset: .*keys.txt (lists no key|cannot be read)"):
            keys_of(config)


def test_a_subset_is_what_a_set_without_the_rest_is(make_config: MakeConfig, tmp_path: Path) -> None:
    """Plan, draws and weights: as if only those images had been prepared."""
    words = ["data.weights=[{factor: 2.5, tag: food}]", "diffusion.timestep_sampling=stratified"]
    some = make_config(*words, "data.subset_rules=[{column: original_width, below: 272}]")
    chosen = set(keys_of(some))
    assert 4 < len(chosen) < 24
    posts = [json.loads(line) for line in Path(some.data.posts[0]).read_text().splitlines()]  # type: ignore[index]
    alone = tmp_path / "posts.jsonl"
    alone.write_text("".join(json.dumps(post) + "\n" for post in posts if post["image_width"] < 272))
    own = make_config(*words, f"data.posts=[{alone}]", f"data.shards={tmp_path / 'alone'}")
    prepare(own)
    assert keys_of(own) == sorted(chosen)
    for step in (0, 5, 40):
        lines = [*explain_step(some, open_chosen(some.data, some.captions), step)]
        assert lines == [*explain_step(own, open_index(own.data.shards), step)]
        assert {line["key"] for line in lines} <= chosen
    report = make_report(some)
    page = render_data(report)
    assert len(report.index) == len(chosen) and f"a subset of {len(chosen)} of its 24 images" in " ".join(page.split())
    assert f"subset: {len(chosen)} of the 24 images of the set" in summarise(report)


def test_another_subset_is_not_resumed(make_config: MakeConfig, tmp_path: Path) -> None:
    keys = all_keys(make_config())
    file, other = write_list(tmp_path / "a.txt", keys[:12]), write_list(tmp_path / "b.txt", keys[1:13])
    train(make_config(f"data.subset={file}", "schedule.max_steps=1"))
    newest = find_newest(run_path(make_config()))
    assert newest is not None
    recorded = read_train_state(newest)["subset"]
    assert (recorded["images"], recorded["of"]) == (12, 24)
    for words in (
        [],
        [f"data.subset={other}"],
        [f"data.subset={file}", "data.subset_rules=[{column: original_width, above: 271}]"],
    ):
        with pytest.raises(UserError, match="was made with another subset of the set"):
            train(make_config(*words, "schedule.max_steps=2"))
    # where the list lies, and in which order, is free
    moved = write_list(tmp_path / "moved.txt", keys[11::-1])
    train(make_config(f"data.subset={moved}", "schedule.max_steps=2"))
    train(make_config("run.name=whole", "schedule.max_steps=1"))
    with pytest.raises(UserError, match=r"another subset of the set .*: all of it there"):
        train(make_config("run.name=whole", f"data.subset={file}", "schedule.max_steps=2"))


def test_stages_may_have_subsets_of_one_set() -> None:
    words = ["data.subset=best.txt"]
    config = load_config([REPOSITORY / "configs/stage2_refine_unet.yaml"], words)
    assert config.data.subset == "best.txt" and config.data.subset_rules == []


def test_the_plan_is_of_the_subset_alone(make_config: MakeConfig) -> None:
    config = make_config("data.subset_rules=[{column: original_width, below: 250}]")
    index = open_chosen(config.data, config.captions)
    plan = build_plan(index, 0, config.data)
    assert sum(plan.images) == len(index) < 24


def test_thresholds_from_the_same_shards_are_of_the_whole_set(make_config: MakeConfig, tmp_path: Path) -> None:
    shards = write_set(tmp_path / "set", [row(str(number), score=number, rating="g") for number in range(10)])
    words = [f"data.shards={shards}", "captions.quality=[{tag: best, above_percentile: 50}, {tag: plain}]",
             "data.subset_rules=[{column: score, above: 6}]"]  # fmt: skip
    for more, least in (([], 9), ([f"captions.thresholds_from={shards}"], 5)):
        config = make_config(*words, *more)
        rules = find_caption_rules(config, open_chosen(config.data, config.captions).table).config.quality
        assert [rule.min_score for rule in rules if rule.tag == "best"] == [least]
