"""Weights: which rows a rule is about, what they come to, and that the plan sees each row as often as that says."""

import dataclasses
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.posts_on_disk import rows_to_table
from trainer.config.schema import CaptionsConfig, DataConfig, SourceConfig, WeightRule
from trainer.core.errors import UserError
from trainer.core.rng import hash_keys, philox_key
from trainer.data.conditions import count_rarest
from trainer.data.index import Index
from trainer.data.plan import Plan, Unit, build_plan
from trainer.data.sample_weights import ONE, describe_sum, draw_phases, find_images_of, find_sample_weights
from trainer.train.announce import warn_of_weights

POSTS: list[dict[str, Any]] = [
    {"tags_general": "1girl long_hair", "tags_artist": "ann", "rating": "g", "score": 200, "year": 2022,
     "extra": '{"aesthetic": 6.5, "lens": "50mm", "shown": true}'},
    {"tags_general": "1girl very_long_hair", "tags_artist": "ann bob", "rating": "e", "score": -9, "year": 2007,
     "extra": '{"aesthetic": 3, "other": "aesthetic"}'},
    {"tags_general": "long_hair", "tags_artist": "ann", "rating": None, "score": None, "year": None, "extra": None},
    {"caption": "a girl, Long Hair, long hair ||| masterpiece", "tags_character": "miku", "rating": "q", "score": 30},
    {"caption": "her long hair is blue\x1elong_hair", "tags_character": "miku rin", "score": 151, "source": "scans"},
    {"tags_general": " masterpiece  solo", "tags_character": "", "tags_copyright": "x y", "score": 99},
]  # fmt: skip


def table_of(posts: list[dict[str, Any]]) -> pa.Table:
    zeros = {"source": "posts", "shard": "s", "offset": 0, "length": 0, "crc32": 0, "content_hash": "", "crop_left": 0}
    sides = ("bucket_width", "bucket_height", "original_width", "original_height", "crop_top")
    rows = [{"key": f"{number:04d}", **zeros, **dict.fromkeys(sides, 64), **post} for number, post in enumerate(posts)]
    return rows_to_table(rows)


def index_of(posts: list[dict[str, Any]]) -> Index:
    index = Index(Path("set"), {})
    index.__dict__["table"] = table_of(posts)
    return index


RULES: list[tuple[dict[str, Any], list[int]]] = [
    ({"tag": "long hair"}, [0, 2, 3, 4]),  # neither very_long_hair nor her long hair is blue
    ({"tag": "long_hair"}, [0, 2, 3, 4]),
    ({"tag": "masterpiece"}, [0, 3, 4, 5]),  # scores of 151 and more, a finished caption's, a post's own
    ({"tag": "oldest"}, [1]),
    ({"tag": "hair"}, []),
    ({"rating": "e"}, [1]),
    ({"rating": "none"}, [2, 4, 5]),
    ({"column": "score", "above": 30}, [0, 4, 5]),
    ({"column": "score", "below": 30}, [1]),
    ({"column": "score", "above": -9, "below": 100}, [3, 5]),
    ({"column": "score", "equals": "30"}, [3]),
    ({"column": "source", "equals": "scans"}, [4]),
    ({"column": "original_width", "equals": "64"}, [0, 1, 2, 3, 4, 5]),
    ({"column": "aesthetic", "above": 3}, [0]),
    ({"column": "aesthetic", "below": 6.5}, [1]),
    ({"column": "aesthetic", "equals": "3"}, [1]),
    ({"column": "lens", "equals": "50mm"}, [0]),
    ({"column": "lens", "above": 0}, []),
    ({"column": "shown", "above": 0}, []),  # true is no number
    ({"column": "tags_general", "above": 0}, []),
    ({"artist_count_below": 3}, [1]),  # bob has one image, ann three
    ({"artist_count_below": 4}, [0, 1, 2]),
    ({"character_count_below": 2}, [4]),
    ({"copyright_count_below": 2}, [5]),
    ({"tag": "1girl", "rating": "e", "column": "score", "below": 0}, [1]),
    ({"tag": "1girl", "rating": "q"}, []),
]


@pytest.mark.parametrize(("rule", "rows"), RULES, ids=str)
def test_which_rows_a_rule_is_about(rule: dict[str, Any], rows: list[int]) -> None:
    found = find_images_of(table_of(POSTS), WeightRule(factor=2.0, **rule), CaptionsConfig())
    assert np.flatnonzero(found).tolist() == rows


def test_rules_multiply_within_limits_and_with_repeats() -> None:
    sources = [SourceConfig("folder", "posts", repeats=3), SourceConfig("folder", "scans")]
    rules = [WeightRule(factor=4.0, tag="long_hair"), WeightRule(factor=0.3, column="score", above=100),
             WeightRule(factor=0.0, rating="q"), WeightRule(factor=1e-6, rating="e")]  # fmt: skip
    data = DataConfig("", sources=sources, weights=rules, max_weight=2.0)
    weights = find_sample_weights(index_of(POSTS), data, CaptionsConfig())
    assert weights.values is not None and weights.record is not None
    # 4 x 0.3 thrice; no weight but 0 becomes 0; limited; 0; 4 x 0.3 once; thrice
    assert weights.values.tolist() == [3 * 78643, 3, 6 * ONE, 0, 78643, 3 * ONE]
    record = weights.record
    assert [rule["images"] for rule in record["rules"]] == [4, 2, 1, 1] and record["never_seen"] == 1
    assert record["sum"] == pytest.approx(3.6 + 6 + 1.2 + 3, abs=0.001) and record["most"] == 6
    low = find_sample_weights(index_of(POSTS), dataclasses.replace(data, min_weight=0.5), CaptionsConfig())
    assert low.values is not None and low.values.tolist()[1:4] == [3 * ONE // 2, 6 * ONE, 0]  # 0 stays 0
    assert low.record is not None and low.record["sha256"] != record["sha256"]


def test_weights_that_change_nothing_are_none() -> None:
    weights = find_sample_weights(
        index_of(POSTS), DataConfig("", weights=[WeightRule(factor=2.0, tag="nowhere")]), CaptionsConfig()
    )
    assert weights.values is None and weights.record is not None
    assert describe_sum(weights.record, 6) == "weights: an epoch sees 6 samples of 6 images"
    (said,) = warn_of_weights(weights.record)
    assert said.startswith("data.weights.0 holds for no image")
    assert list(warn_of_weights(None)) == []
    assert find_sample_weights(index_of(POSTS), DataConfig("")).record is None


def test_nothing_left_is_refused() -> None:
    rules = [WeightRule(factor=0.0, column="original_width", above=0)]
    with pytest.raises(UserError, match="every image has weight 0"):
        find_sample_weights(index_of(POSTS), DataConfig("", weights=rules), CaptionsConfig())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.none(), st.lists(st.sampled_from("abcde"), unique=True)), max_size=20))
def test_the_rarest_tag_counts(artists: list[list[str] | None]) -> None:
    counts = Counter(name for names in artists for name in names or ())
    expected = [min((counts[name] for name in names or ()), default=0) for names in artists]
    posts = [{"tags_artist": None if names is None else " ".join(names)} for names in artists]
    assert count_rarest(table_of(posts), "artist").tolist() == expected


def test_keys_are_hashed_as_philox_keys_are() -> None:
    keys = ["", "1", "a b", "日本"]
    found = hash_keys(keys, "weight", 42)
    assert found.tolist() == [philox_key("weight", 42, key) % 2**64 for key in keys]


# --- the plan


def weighted_plan(buckets: list[list[float]], *, unit: int, seed: int = 1) -> tuple[Plan, np.ndarray, np.ndarray]:
    """A plan of some buckets, each of images of such weights; with its sizes, and its weights in parts."""
    sizes = np.repeat(np.array([[64 * (i + 1), 64] for i in range(len(buckets))]), list(map(len, buckets)), axis=0)
    parts = np.rint(np.array([weight for bucket in buckets for weight in bucket]) * ONE).astype(np.int64)
    phases = draw_phases(pa.chunked_array([[str(row) for row in range(len(parts))]]), seed, parts)
    make = {"bucket_batch_size": unit, "global_batch_size": 2 * unit}
    return Plan(sizes, seed=seed, weights=parts, phases=phases, **make), sizes, parts


WEIGHT = st.one_of(st.just(0.0), st.just(1.0), st.floats(0.01, 0.99), st.floats(1, 6))
BUCKETS = st.lists(st.lists(WEIGHT, min_size=1, max_size=12), min_size=1, max_size=3).filter(
    lambda buckets: any(weight > 0 for bucket in buckets for weight in bucket)
)


@settings(max_examples=80, deadline=None)
@given(BUCKETS, st.integers(1, 6), st.integers(0, 9))
def test_views_at_each_passs_end_are_right_give_or_take_one(buckets: list[list[float]], unit: int, seed: int) -> None:
    """And each time that a row is seen, it is in a pass of its own: no draw is made twice, none is left out."""
    plan, sizes, parts = weighted_plan(buckets, unit=unit, seed=seed)
    phases = plan._phases
    for bucket, size in enumerate(plan.buckets):
        rows = np.flatnonzero((sizes == size).all(axis=1))
        total = int(parts[rows].sum())
        if not total:
            assert plan.units_until(50)[bucket] == 0
            continue
        ends = [sum((pass_ * parts[rows] + phases[rows]) // ONE) for pass_ in range(9)]  # type: ignore[index]
        stream: list[tuple[int, int]] = []
        while len(stream) < ends[-1]:
            stream += plan.unit_samples(Unit(1, bucket, len(stream) // unit))
        for pass_, end in enumerate(ends):
            seen = Counter(row for row, _ in stream[:end])
            assert all(abs(seen[row] - pass_ * parts[row] / ONE) < 1 for row in rows)
        for row in rows.tolist():
            views = sorted(view for seen, view in stream[: ends[-1]] if seen == row)
            assert views == list(range(len(views)))


@settings(max_examples=60, deadline=None)
@given(BUCKETS, st.sampled_from([1, 3, 4]), st.integers(1, 9))
def test_units_follow_the_sum_of_weights(buckets: list[list[float]], unit: int, epoch: int) -> None:
    plan, sizes, parts = weighted_plan(buckets, unit=unit)
    for bucket, size in enumerate(plan.buckets):
        total = int(parts[(sizes == size).all(axis=1)].sum())
        expected = max(1, int(epoch * total / ONE / unit + 0.5)) if total else 0
        assert plan.units_until(epoch)[bucket] == expected
    first, end = (int(plan.units_until(number).sum()) for number in (epoch - 1, epoch))
    if first == end:
        return
    units = [plan.unit_at(position) for position in range(first, end)]
    _, rows = plan.epoch_rows(epoch)
    assert rows.tolist() == [[row for row, _ in plan.unit_samples(one)] for one in units]
    assert not set(np.flatnonzero(parts == 0).tolist()) & set(rows.ravel().tolist())  # weight 0 is never seen


def test_a_step_is_the_same_however_one_comes_to_it() -> None:
    buckets = [[0.3, 2.5, 1.0] * 9, [0.02], [1.0, 0.0]]
    plan, *_ = weighted_plan(buckets, unit=4)
    walked = [plan.step_samples(step) for step in range(40)]
    other, *_ = weighted_plan(buckets, unit=4)
    assert [other.step_samples(step) for step in reversed(range(40))] == walked[::-1]
    assert [sample for number in range(4) for sample in other.micro_batch(7, number, 2)] == walked[7]


def test_rows_of_one_weight_take_turns() -> None:
    """Half of the images of weight 0.5 are in each pass, and not all in every other one."""
    plan, *_ = weighted_plan([[0.5] * 1000], unit=1)
    ends = [plan._count_entries(0, pass_) for pass_ in range(5)]
    assert all(400 < end - begin < 600 for begin, end in pairwise(ends)) and ends[4] == 2000


def test_a_rule_for_some_leaves_the_draws_of_the_others_alone() -> None:
    """The passes of a row are counted from 0 whatever its weight: caption and noise of its n-th view are the same."""
    rules = [WeightRule(factor=3.0, tag="1girl"), WeightRule(factor=0.4, rating="q")]
    data = DataConfig("", bucket_batch_size=2, global_batch_size=2)
    plain = build_plan(index_of(POSTS), 1, data)
    weights = find_sample_weights(index_of(POSTS), dataclasses.replace(data, weights=rules), CaptionsConfig())
    weighted = build_plan(index_of(POSTS), 1, data, weights)
    seen: list[dict[int, list[int]]] = []
    for plan in (plain, weighted):
        views: dict[int, list[int]] = {row: [] for row in range(6)}
        for number in range(60):
            for row, view in plan.unit_samples(Unit(1, 0, number)):
                views[row].append(view)
        seen.append(views)
    assert all(sorted(views) == list(range(len(views))) for each in seen for views in each.values())
    lengths = [[len(each[row]) for row in range(6)] for each in seen]
    assert lengths[0] == [20] * 6
    assert lengths[1] == pytest.approx([36, 36, 12, 5, 12, 12], abs=3)


def test_repeats_are_recorded() -> None:
    """So that a resume notices that they are another source's."""
    sources = [SourceConfig("folder", "a", name="posts", repeats=3), SourceConfig("folder", "b", name="scans")]
    swapped = [SourceConfig("folder", "a", name="scans", repeats=3), SourceConfig("folder", "b", name="posts")]
    one, two = (
        find_sample_weights(index_of(POSTS), DataConfig("", sources=each)).record for each in (sources, swapped)
    )
    assert one is not None and two is not None and one["sha256"] != two["sha256"]
    assert one["rules"] == [] and one["most"] == 3
    assert find_sample_weights(index_of(POSTS), DataConfig("", sources=[SourceConfig("folder", "a")])).record is None
