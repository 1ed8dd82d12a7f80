"""Index -> the samples of every step, written before the run.

Each bucket is an endless stream of reshuffled passes over its images, cut into units of ``bucket_batch_size``
samples. Row i has had floor(P w_i + phi_i) entries of the stream when P passes are over: with weight 1 one in each
pass, with 2.5 two or three. By the end of epoch e a bucket whose weights sum to n (its images, where all have weight 1)
has had c(e) = max(1, (2 e n + U) // (2 U)) units, none where n is 0; the units c(e-1) .. c(e) of all buckets belong to
epoch e and are shuffled together. Epochs follow each other without end, and a step takes
``global_batch_size / bucket_batch_size`` units in a row. Nothing is partial, dropped or padded, and what a step sees
does not depend on how long the run is. Design, idea 3.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from trainer.config.schema import DataConfig
from trainer.core.progress import waiting
from trainer.core.rng import rng
from trainer.data.index import Index
from trainer.data.sample_weights import ONE, SampleWeights, draw_phases, find_sample_weights

PASS_ENDS = 4096  # of streams, kept: a walk through a run asks for those of each bucket again and again


@dataclass(frozen=True)
class Unit:
    """``bucket_batch_size`` samples that share a bucket."""

    epoch: int  # from 1
    bucket: int  # position in Plan.buckets
    number: int  # how many units this bucket had before


@dataclass(frozen=True)
class Planned:
    """One sample of a step."""

    row: int  # in the index
    pass_: int  # the row's own: how often it was in the bucket's stream before
    position: int  # in the global batch
    unit: Unit


class Plan:
    """The order of everything, as pure functions of the step; caches only what costs time to compute."""

    def __init__(
        self,
        bucket_sizes: np.ndarray,
        *,
        seed: int,
        bucket_batch_size: int,
        global_batch_size: int,
        weights: np.ndarray | None = None,
        phases: np.ndarray | None = None,
    ):
        """The plan of an index.

        Args:
            bucket_sizes: (n, 2) int, width and height of the bucket of each row of the index.
            weights: (n,) int64, how often each row is seen in a pass of its bucket's stream, in parts of ``ONE``, so
                that no sum is ever rounded; None is once.
            phases: (n,) int, where each row's views begin, from 0 to below ``ONE``; None is 0.
        """
        assert global_batch_size % bucket_batch_size == 0
        if not len(bucket_sizes) or (weights is not None and not weights.any()):
            raise ValueError("a plan needs at least one image")
        self.seed = seed
        self.unit_size = bucket_batch_size
        self.units_per_step = global_batch_size // bucket_batch_size
        # one number per size, sorted by (width, height); widths and heights are far below 2^20
        codes = (bucket_sizes[:, 0].astype(np.int64) << 20) | bucket_sizes[:, 1]
        found, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
        self.buckets = [(int(code >> 20), int(code & 0xFFFFF)) for code in found]  # (width, height)
        self.images = counts  # of each bucket
        # rows of bucket b, in the index's order, are rows[starts[b] : starts[b + 1]]; weights and phases lie likewise
        self._rows = np.argsort(inverse, kind="stable").astype(np.int32)
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._weights = None if weights is None else weights[self._rows]
        self._phases = 0 if phases is None else phases[self._rows]
        self.seen = counts  # images of each bucket that are seen at all
        self.weights = counts * ONE  # of each bucket, summed
        if self._weights is not None:
            self.weights = np.add.reduceat(self._weights, self._starts[:-1])
            self.seen = np.add.reduceat((self._weights > 0).astype(np.int64), self._starts[:-1])
        self._epoch_units = lru_cache(maxsize=2)(self._shuffle_epoch)
        self._order = lru_cache(maxsize=2 * len(self.buckets))(self._shuffle_pass)
        self._entries_until = lru_cache(maxsize=PASS_ENDS)(self._count_entries)

    def units_until(self, epoch: int) -> np.ndarray:
        """c_b(epoch): units of each bucket by the end of an epoch, int64 (buckets,)."""
        if epoch == 0:
            return np.zeros(len(self.weights), dtype=np.int64)
        unit = self.unit_size * ONE
        return np.where(self.seen > 0, np.maximum(1, (2 * epoch * self.weights + unit) // (2 * unit)), 0)

    def steps_for_epochs(self, epochs: int) -> int:
        """Steps of a run of so many epochs; the last one is filled from the next epoch."""
        return -(-int(self.units_until(epochs).sum()) // self.units_per_step)

    def step_units(self, step: int) -> list[Unit]:
        """The units of a step, in order."""
        return [self.unit_at(step * self.units_per_step + i) for i in range(self.units_per_step)]

    def unit_at(self, position: int) -> Unit:
        """The unit at a place in the endless sequence of all epochs."""
        epoch = self.find_epoch(position)
        buckets, numbers = self._epoch_units(epoch)
        offset = position - int(self.units_until(epoch - 1).sum())
        return Unit(epoch, int(buckets[offset]), int(numbers[offset]))

    def find_epoch(self, position: int) -> int:
        """The epoch, from 1, that holds the unit at ``position``."""
        # units grow by about sum(n) / U an epoch: guess, then walk the rest
        epoch = max(1, position * self.unit_size * ONE // int(self.weights.sum()))
        while epoch > 1 and position < int(self.units_until(epoch - 1).sum()):
            epoch -= 1
        while position >= int(self.units_until(epoch).sum()):
            epoch += 1
        return epoch

    def epochs_until(self, step: int) -> float:
        """Epochs that ``step`` completed steps have made: 9.5 is nine, and half of the tenth one's units."""
        units = step * self.units_per_step
        if units == 0:
            return 0.0
        epoch = self.find_epoch(units - 1)
        before, after = (int(self.units_until(number).sum()) for number in (epoch - 1, epoch))
        return epoch - 1 + (units - before) / (after - before)

    def unit_samples(self, unit: Unit) -> list[tuple[int, int]]:
        """(row, pass) of a unit's samples, in order. A small bucket may repeat an image, in another pass."""
        samples: list[tuple[int, int]] = []
        for pass_, places in self._find_passes(unit.bucket, unit.number * self.unit_size, self.unit_size):
            rows, views = self._order(unit.bucket, pass_)
            samples += zip(rows[places].tolist(), views[places].tolist(), strict=True)
        return samples

    def epoch_rows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """All of an epoch at once: its units' buckets, (units,), and their samples' rows, int32 (units, unit size).

        Units in order, samples as ``unit_samples`` gives them; what 26,500 calls of it would do.
        """
        buckets, numbers = self._epoch_units(epoch)
        rows = np.empty((len(buckets), self.unit_size), dtype=np.int32)
        for bucket in np.unique(buckets).tolist():
            units = np.flatnonzero(buckets == bucket)
            first = int(numbers[units].min())
            passes = self._find_passes(bucket, first * self.unit_size, len(units) * self.unit_size)
            stream = np.concatenate([self._order(bucket, pass_)[0][places] for pass_, places in passes])
            rows[units] = stream.reshape(-1, self.unit_size)[numbers[units] - first]
        return buckets, rows

    def step_samples(self, step: int) -> list[Planned]:
        """All samples of a step in the order of their position in the global batch."""
        units = range(self.units_per_step)
        return [sample for number in units for sample in self.micro_batch(step, number, self.unit_size)]

    def micro_batch(self, step: int, number: int, size: int) -> list[Planned]:
        """Samples ``number * size`` .. of a step; ``size`` divides the unit, so they share a bucket."""
        place, offset = divmod(number * size, self.unit_size)
        unit = self.unit_at(step * self.units_per_step + place)
        samples = self.unit_samples(unit)[offset : offset + size]
        return [Planned(row, pass_, number * size + i, unit) for i, (row, pass_) in enumerate(samples)]

    def repeating_buckets(self) -> list[tuple[int, int]]:
        """Buckets (width, height) with fewer images than a unit, but some: an image repeats within it."""
        return [size for size, count in zip(self.buckets, self.seen, strict=True) if 0 < count < self.unit_size]

    def _shuffle_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(bucket, number) of an epoch's units in their shuffled order, int32 each."""
        before, after = self.units_until(epoch - 1), self.units_until(epoch)
        buckets = np.repeat(np.arange(len(before)), after - before)
        numbers = np.concatenate([np.arange(low, high) for low, high in zip(before, after, strict=True)])
        order = rng("units", self.seed, epoch).permutation(len(buckets))
        return buckets[order].astype(np.int32), numbers[order].astype(np.int32)

    def _shuffle_pass(self, bucket: int, pass_: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of one pass of a bucket's stream, in its order, and the row's own pass in each place; int32 both."""
        rows = self._rows[self._starts[bucket] : self._starts[bucket + 1]]
        views = np.broadcast_to(np.int32(pass_), len(rows))
        if self._weights is not None:
            first, end = self._views_until(bucket, pass_), self._views_until(bucket, pass_ + 1)
            times = end - first
            before = np.repeat(np.cumsum(times) - times - first, times)  # entries before the row's, less its views
            rows, views = np.repeat(rows, times), (np.arange(len(before)) - before).astype(np.int32)
        width, height = self.buckets[bucket]
        order = rng("order", self.seed, pass_, width, height).permutation(len(rows))
        return rows[order], views if self._weights is None else views[order]

    def _views_until(self, bucket: int, pass_: int) -> np.ndarray:
        """How often each row of a bucket was seen before a pass: floor(P w + phi), int64 (n_b,)."""
        here = slice(self._starts[bucket], self._starts[bucket + 1])
        assert self._weights is not None
        phases = self._phases if isinstance(self._phases, int) else self._phases[here]
        return (pass_ * self._weights[here] + phases) // ONE

    def _count_entries(self, bucket: int, pass_: int) -> int:
        """Entries of a bucket's stream before a pass."""
        if self._weights is None:
            return pass_ * int(self.images[bucket])
        return int(self._views_until(bucket, pass_).sum())

    def _find_passes(self, bucket: int, first: int, count: int) -> Iterator[tuple[int, slice]]:
        """The passes that hold entries ``first`` .. ``first + count - 1`` of a stream, and where in each they lie."""
        entry, end = first, first + count
        while entry < end:
            pass_ = self._find_pass(bucket, entry)
            begins, ends = self._entries_until(bucket, pass_), self._entries_until(bucket, pass_ + 1)
            yield pass_, slice(entry - begins, min(ends, end) - begins)
            entry = ends

    def _find_pass(self, bucket: int, entry: int) -> int:
        """The pass that holds an entry of a bucket's stream."""
        images, weight = int(self.images[bucket]), int(self.weights[bucket])
        if self._weights is None:
            return entry // images
        # each row's views are P w give or take one, so all entries P sum(w) give or take the images
        low = max(0, (entry - images) * ONE // weight)
        high = (entry + images) * ONE // weight + 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._entries_until(bucket, middle) <= entry else (low, middle)
        return low


def build_plan(index: Index, seed: int, data: DataConfig, weights: SampleWeights | None = None) -> Plan:
    """The plan of a config over an index; ``weights`` are those of its rules, where they are known already."""
    weights = weights or find_sample_weights(index, data)
    with waiting("plan the steps"):
        return Plan(
            index.bucket_sizes,
            seed=seed,
            bucket_batch_size=data.bucket_batch_size,
            global_batch_size=data.global_batch_size,
            weights=weights.values,
            phases=None if weights.values is None else draw_phases(index.table["key"], seed, weights.values),
        )
