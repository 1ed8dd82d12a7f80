"""The plan against the recipe's numbers, and against the design's third idea written again, slowly."""

import math
import random
import time
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.buckets import list_buckets
from trainer.data.loader import micro_batch_numbers
from trainer.data.plan import Plan, Planned, Unit
from trainer.data.sample_weights import ONE

SIZES = list_buckets(1024, 512, 2048, 64)


def make_plan(counts: list[int], *, unit: int, step: int, seed: int = 42) -> Plan:
    """A plan of so many images of each bucket, their rows mixed."""
    return Plan(mix_rows(counts), seed=seed, bucket_batch_size=unit, global_batch_size=step)


def mix_rows(counts: list[int]) -> np.ndarray:
    sizes = np.repeat(np.array(SIZES[: len(counts)]), counts, axis=0)
    return np.random.default_rng(0).permutation(sizes)


def count_views(plan: Plan, epochs: int) -> np.ndarray:
    """How often each row is seen by the end of an epoch, int64 (n,)."""
    seen = np.zeros(int(plan.images.sum()), dtype=np.int64)
    for epoch in range(1, epochs + 1):
        seen += np.bincount(plan.epoch_rows(epoch)[1].ravel(), minlength=len(seen))
    return seen


def danbooru_like(images: int, least: int) -> list[int]:
    """Images of each of the 33 buckets: most are portraits near 0.7, some square, some wide, few extreme."""
    aspects = np.log([width / height for width, height in SIZES])
    peaks = ((6.0, 0.7, 0.12), (1.5, 1.0, 0.1), (2.0, 1.5, 0.2), (0.1, 0.7, 0.7))
    weights = np.zeros(len(SIZES))
    for share, centre, spread in peaks:
        weights += share * np.exp(-(((aspects - math.log(centre)) / spread) ** 2) / 2)
    counts = np.maximum(least, np.floor(images * weights / weights.sum())).astype(int)
    counts[counts.argmax()] += images - counts.sum()
    return counts.tolist()


# --- the recipe's numbers


@pytest.fixture(scope="module")
def stage_1() -> Plan:
    return make_plan(danbooru_like(1_271_990, 48), unit=48, step=96)


def test_stage_1_has_the_recipes_steps(stage_1: Plan) -> None:
    assert len(stage_1.images) == 33 and stage_1.images.sum() == 1_271_990
    assert stage_1.images.max() > 100 * stage_1.images.min() > 0  # the spread is one
    steps = stage_1.steps_for_epochs(10)
    # each filled bucket rounds its units, and one step is filled up
    assert abs(steps - 132_499) <= 33 / 2 / 2 + 1
    assert abs(steps / 132_590 - 1) < 0.001  # the original's


def test_stage_1_sees_every_image_9_to_11_times(stage_1: Plan) -> None:
    views = count_views(stage_1, 10)
    assert len(views) == 1_271_990
    assert views.min() >= 9 and views.max() <= 11
    assert abs(views.mean() - 10) < 0.001
    assert stage_1.repeating_buckets() == []


@pytest.mark.parametrize("smallest", [1, 2, 3, 20, 47, 48, 49, 52, 95])
def test_small_buckets_beside_big_ones(smallest: int) -> None:
    counts = [smallest, 1000, 52, 48, 49]
    plan = make_plan(counts, unit=48, step=96)
    views = count_views(plan, 10)
    by_size = {size: views[(mix_rows(counts) == size).all(axis=1)] for size in plan.buckets}
    assert all(seen.min() >= 9 and seen.max() <= 11 for seen in by_size.values() if len(seen) >= 48)
    # U views at least, however small: the unit is never partial
    assert all(seen.sum() == 48 * max(1, round_half_up(Fraction(10 * len(seen), 48))) for seen in by_size.values())
    repeating = [size for size, seen in by_size.items() if len(seen) < 48]
    assert plan.repeating_buckets() == repeating


def test_a_late_step_costs_as_little_as_an_early_one(stage_1: Plan) -> None:
    """Resume reads the step and goes on: nothing is replayed."""
    stage_1.step_samples(0)
    start = time.perf_counter()
    samples = stage_1.step_samples(130_000)
    assert time.perf_counter() - start < 1.0
    assert len(samples) == 96 and {sample.unit.epoch for sample in samples} == {10}


@pytest.mark.parametrize("least", [0, 1, 2, 3, 5])
def test_stage_2_has_the_recipes_steps(least: int) -> None:
    counts = danbooru_like(2500, least)
    plan = make_plan(counts, unit=8, step=48)
    assert plan.steps_for_epochs(10) in (521, 522)
    views = count_views(plan, 10)
    sizes = mix_rows(counts)
    images = {size: int((sizes == size).all(axis=1).sum()) for size in plan.buckets}
    outside = {images[tuple(size.tolist())] for size, seen in zip(sizes, views, strict=True) if not 9 <= seen <= 11}
    assert outside <= {1, 2}
    assert views.max() <= 12 and views.min() >= 8


@pytest.mark.parametrize("least", [0, 1, 2, 3, 5])
def test_stage_3_has_the_steps_that_its_config_says(least: int) -> None:
    assert make_plan(danbooru_like(3500, least), unit=8, step=48).steps_for_epochs(10) in (729, 730, 731)


def test_only_buckets_of_one_or_two_images_fall_outside_9_to_11() -> None:
    for images in range(1, 100):
        views = count_views(make_plan([images], unit=8, step=8), 10)
        assert (views.min() >= 9 and views.max() <= 11) == (images > 2)


# --- the design's third idea, from its text alone


def round_half_up(share: Fraction) -> int:
    return math.floor(share + Fraction(1, 2))


def units_by_end(epoch: int, images: int, unit: int) -> int:
    """c_b(e): what e epochs of the bucket's images make in units, to the nearest, but never none."""
    return 0 if epoch == 0 else max(1, round_half_up(Fraction(epoch * images, unit)))


def check_against_the_text(plan: Plan, sizes: np.ndarray, *, unit: int, step: int, epochs: int) -> None:
    rows_of = defaultdict(set)
    for row, (width, height) in enumerate(sizes.tolist()):
        rows_of[width, height].add(row)
    spare = 2 + step  # epochs that the last step may reach into, should each have but a unit
    wanted = {  # epoch -> its units: (bucket, number)
        epoch: {
            (bucket, number)
            for bucket, rows in rows_of.items()
            for number in range(units_by_end(epoch - 1, len(rows), unit), units_by_end(epoch, len(rows), unit))
        }
        for epoch in range(1, epochs + 1 + spare)
    }
    total = sum(len(wanted[epoch]) for epoch in range(1, epochs + 1))
    per_step = step // unit
    steps = math.ceil(total / per_step)
    assert plan.steps_for_epochs(epochs) == steps

    seen: list[tuple[int, tuple[int, int], int]] = []  # (epoch, bucket, number) in the run's order
    streams: dict[tuple[int, int], dict[int, list[Planned]]] = defaultdict(dict)
    for number in range(steps):
        samples = plan.step_samples(number)
        assert [sample.position for sample in samples] == list(range(step))
        for first in range(0, step, unit):
            together = samples[first : first + unit]
            assert len({sample.unit for sample in together}) == 1
            planned = together[0].unit
            bucket = plan.buckets[planned.bucket]
            seen.append((planned.epoch, bucket, planned.number))
            streams[bucket][planned.number] = together

    # epochs follow each other, each with exactly its own units, the last step filled from the next
    position = 0
    for epoch in wanted:
        part = seen[position : position + len(wanted[epoch])]
        assert all(told == epoch for told, _, _ in part)
        assert len(set(part)) == len(part)
        units = {(bucket, number) for _, bucket, number in part}
        assert units == wanted[epoch] if epoch <= epochs else units <= wanted[epoch]
        position += len(part)
    assert position == len(seen)

    # a bucket's units in order are its stream: one permutation of all its images after another
    for bucket, rows in rows_of.items():
        known = streams[bucket]
        for number, samples in known.items():
            for i, sample in enumerate(samples):
                assert sample.row in rows
                assert sample.pass_ == (number * unit + i) // len(rows)
        whole = units_by_end(epochs, len(rows), unit)  # the next epoch's units may come without those before them
        stream = [sample for number in range(whole) for sample in known[number]]
        for start in range(0, len(stream), len(rows)):
            part_rows = [sample.row for sample in stream[start : start + len(rows)]]
            assert len(set(part_rows)) == len(part_rows)
            if len(part_rows) == len(rows):
                assert set(part_rows) == rows

    counted = Counter(sample.row for bucket, known in streams.items() for number, samples in known.items()
                      if number < units_by_end(epochs, len(rows_of[bucket]), unit) for sample in samples)  # fmt: skip
    assert count_views(plan, epochs).tolist() == [counted[row] for row in range(len(sizes))]


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    unit=st.integers(1, 12),
    per_step=st.integers(1, 4),
    epochs=st.integers(1, 5),
    seed=st.integers(0, 2**40),
)
def test_the_plan_is_the_designs(counts: list[int], unit: int, per_step: int, epochs: int, seed: int) -> None:
    plan = make_plan(counts, unit=unit, step=unit * per_step, seed=seed)
    check_against_the_text(plan, mix_rows(counts), unit=unit, step=unit * per_step, epochs=epochs)


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(1, 200), min_size=1, max_size=8), unit=st.integers(1, 50), epoch=st.integers(0, 30))
def test_units_of_an_epoch(counts: list[int], unit: int, epoch: int) -> None:
    plan = make_plan(counts, unit=unit, step=unit)
    expected = [units_by_end(epoch, count, unit) for count in plan.images.tolist()]
    assert plan.units_until(epoch).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([1, 3, 4, 8]), st.integers(1, 12))
def test_an_epoch_at_once_is_its_units_one_by_one(counts: list[int], unit: int, epoch: int) -> None:
    plan = make_plan(counts, unit=unit, step=unit)
    first, end = (int(plan.units_until(number).sum()) for number in (epoch - 1, epoch))
    units = [plan.unit_at(position) for position in range(first, end)]
    buckets, rows = plan.epoch_rows(epoch)
    assert buckets.tolist() == [one.bucket for one in units]
    assert rows.tolist() == [[row for row, _ in plan.unit_samples(one)] for one in units]


def test_an_image_that_comes_twice_in_a_unit_is_in_another_pass() -> None:
    plan = make_plan([3], unit=8, step=8)
    for step in range(30):
        samples = plan.step_samples(step)
        pairs = [(sample.row, sample.pass_) for sample in samples]
        assert len(set(pairs)) == 8
        assert {sample.row for sample in samples} == {0, 1, 2}
    assert plan.repeating_buckets() == [SIZES[0]]


# --- what the order depends on, and what it does not


def steps_of(plan: Plan, steps: int) -> list[list[Planned]]:
    return [plan.step_samples(step) for step in range(steps)]


def test_any_step_is_the_same_however_one_comes_to_it() -> None:
    """Step N is a function of N: not of the steps asked for before, nor of how long the run is."""
    counts = [30, 7, 1, 90]
    plan = make_plan(counts, unit=4, step=12)
    walked = steps_of(plan, 40)
    order = list(range(40))
    random.Random(0).shuffle(order)
    assert {step: plan.step_samples(step) for step in order} == dict(enumerate(walked))
    assert all(make_plan(counts, unit=4, step=12).step_samples(step) == walked[step] for step in (0, 17, 39))
    for epochs in (1, 2, 5):
        longer = make_plan(counts, unit=4, step=12)
        longer.steps_for_epochs(epochs), longer.epoch_rows(epochs)
        assert steps_of(longer, 12) == walked[:12]


def test_the_seed_decides_the_order_of_rows_and_of_units() -> None:
    def rows(seed: int) -> list[int]:
        return [sample.row for step in steps_of(make_plan([50], unit=5, step=10, seed=seed), 5) for sample in step]

    def units(seed: int) -> list[Unit]:
        return make_plan([40, 40], unit=5, step=80, seed=seed).step_units(0)

    assert rows(1) == rows(1) and units(1) == units(1)
    assert rows(1) != rows(2) and units(1) != units(2)
    assert sorted(rows(1)) == sorted(rows(2)) == list(range(50))
    assert set(units(1)) == set(units(2))


def test_every_epoch_and_every_pass_is_shuffled_anew() -> None:
    plan = make_plan([40, 40], unit=5, step=80)
    epochs = [[unit.bucket for unit in plan.step_units(step)] for step in range(6)]
    assert len({tuple(buckets) for buckets in epochs}) == 6
    assert all(buckets != sorted(buckets) for buckets in epochs)
    single = make_plan([40], unit=40, step=40)
    passes = [tuple(row for row, _ in single.unit_samples(Unit(1, 0, number))) for number in range(6)]
    assert len(set(passes)) == 6
    assert all(sorted(rows) == list(range(40)) and list(rows) != sorted(rows) for rows in passes)


def test_two_buckets_of_one_size_have_different_orders() -> None:
    plan = make_plan([40, 40], unit=40, step=40)
    first, second = ([row for row, _ in plan.unit_samples(Unit(1, bucket, 0))] for bucket in (0, 1))
    ranks = [np.argsort(np.argsort(rows)).tolist() for rows in (first, second)]
    assert ranks[0] != ranks[1]


def test_another_buckets_images_leave_a_buckets_stream_alone() -> None:
    """The stream's order is drawn by the bucket's size, not by its place in the list of filled buckets."""
    alone, beside = np.array([SIZES[5]] * 20), np.array([SIZES[5]] * 20 + [SIZES[0]] * 9)
    plans = [Plan(sizes, seed=1, bucket_batch_size=4, global_batch_size=4) for sizes in (alone, beside)]
    streams = [
        [plan.unit_samples(Unit(1, plan.buckets.index(SIZES[5]), number)) for number in range(12)] for plan in plans
    ]
    assert streams[0] == streams[1]


def test_a_golden_step() -> None:
    """If this changes, every run sees its images in another order."""
    plan = make_plan([5, 9, 2], unit=4, step=8)
    seen = [(sample.row, sample.pass_, sample.unit.bucket) for sample in plan.step_samples(3)]
    assert seen == [(11, 1, 1), (10, 1, 1), (11, 2, 1), (12, 2, 1), (11, 0, 1), (13, 1, 1), (12, 1, 1), (9, 1, 1)]


# --- micro-batches, ranks


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    micro=st.sampled_from([1, 2, 3, 4, 6, 12]),
    world=st.sampled_from([1, 2, 3, 4, 6]),
    first=st.integers(0, 5),
)
def test_ranks_and_micro_batches_split_a_step_and_never_change_it(
    counts: list[int], micro: int, world: int, first: int
) -> None:
    plan = make_plan(counts, unit=12, step=24)
    if 24 % (micro * world):
        return
    per_step, last = 24 // micro, first + 3
    numbers = [micro_batch_numbers(first, last, per_step, rank, world) for rank in range(world)]
    assert len({len(mine) for mine in numbers}) == 1
    # in the order of micro-steps, and within one in the order of ranks
    merged = [number for together in zip(*numbers, strict=True) for number in together]
    batches = [plan.micro_batch(number // per_step, number % per_step, micro) for number in merged]
    assert all(len(batch) == micro and len({sample.unit for sample in batch}) == 1 for batch in batches)
    samples = [sample for batch in batches for sample in batch]
    assert samples == [sample for step in range(first, last) for sample in plan.step_samples(step)]
    # each rank makes all its micro-batches of a step before the next
    assert all([number // per_step for number in mine] == sorted(number // per_step for number in mine)
               for mine in numbers)  # fmt: skip


def test_ranks_share_a_bucket_where_they_can() -> None:
    plan = make_plan([48] * 6, unit=48, step=96)
    for rank_0, rank_1 in zip(*(micro_batch_numbers(0, 3, 6, rank, 2) for rank in (0, 1)), strict=True):
        first, second = (plan.micro_batch(number // 6, number % 6, 16)[0].unit.bucket for number in (rank_0, rank_1))
        if rank_0 // 3 == rank_1 // 3:  # micro-batches 0 1 2 | 3 4 5 of a step are of one unit each
            assert first == second


def test_no_images_no_plan() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        Plan(np.zeros((0, 2), dtype=int), seed=1, bucket_batch_size=1, global_batch_size=1)


# --- repeats


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=12), min_size=1, max_size=3), st.integers(1, 8),
    st.integers(0, 5),
)  # fmt: skip
def test_a_repeated_image_is_seen_so_often_in_each_pass(repeats: list[list[int]], unit: int, seed: int) -> None:
    """Each image r times in a pass of its bucket's stream, each time in a pass of its own."""
    sizes = np.repeat(np.array(SIZES[: len(repeats)]), [len(each) for each in repeats], axis=0)
    times = np.array([number for each in repeats for number in each])
    plan = Plan(sizes, seed=seed, bucket_batch_size=unit, global_batch_size=unit, weights=times * ONE)
    entries = [sum(each) for each in repeats]
    counts = (plan.weights // ONE).tolist()
    assert counts == [entries[SIZES.index(bucket)] for bucket in plan.buckets]
    assert plan.images.tolist() == [len(repeats[SIZES.index(bucket)]) for bucket in plan.buckets]
    for bucket, count in enumerate(counts):
        stream = [sample for number in range(3 * count) for sample in plan.unit_samples(Unit(1, bucket, number))]
        for pass_ in range(3):
            seen = Counter(stream[pass_ * count : (pass_ + 1) * count])
            expected = {
                (row, pass_ * int(times[row]) + turn)
                for row in np.flatnonzero((sizes == plan.buckets[bucket]).all(axis=1)).tolist()
                for turn in range(times[row])
            }
            assert seen == Counter(expected)  # no draw of one sample is made twice
    views = np.zeros(len(times), dtype=int)
    for position in range(int(plan.units_until(3).sum())):
        np.add.at(views, [row for row, _ in plan.unit_samples(plan.unit_at(position))], 1)
    assert count_views(plan, 3).tolist() == views.tolist()


def test_one_repeat_changes_nothing() -> None:
    sizes = mix_rows([30, 7, 2])
    plain = Plan(sizes, seed=1, bucket_batch_size=4, global_batch_size=8)
    once = Plan(sizes, seed=1, bucket_batch_size=4, global_batch_size=8, weights=np.full(len(sizes), ONE))
    assert [plain.step_samples(step) for step in range(30)] == [once.step_samples(step) for step in range(30)]


def test_epochs_until_a_step_grow_evenly_within_an_epoch() -> None:
    plan = Plan(np.array([[64, 64]] * 40 + [[64, 96]] * 3), seed=1, bucket_batch_size=4, global_batch_size=8)
    assert plan.units_until(1).sum() == 11 and plan.units_until(2).sum() == 22
    assert [plan.epochs_until(step) for step in (0, 1, 11)] == [0.0, 2 / 11, 2.0]
    assert plan.epochs_until(6) == 1 + 1 / 11  # the step that crosses the border is in both
