"""Index -> the samples of every step, written before the run.

Each bucket is an endless stream of reshuffled passes over its images, cut into units of ``bucket_batch_size``
samples. By the end of epoch e a bucket of n images has had c(e) = max(1, (2 e n + U) // (2 U)) units; the units
c(e-1) .. c(e) of all buckets belong to epoch e and are shuffled together. Epochs follow each other without end, and a
step takes ``global_batch_size / bucket_batch_size`` units in a row. Nothing is partial, dropped or padded, and what
a step sees does not depend on how long the run is. Design, idea 3.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.config.schema import DataConfig
from trainer.core.errors import UserError
from trainer.core.progress import waiting
from trainer.core.rng import rng
from trainer.data.index import Index


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
    pass_: int  # how often the bucket's stream had gone through all its images before
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
        repeats: np.ndarray | None = None,
    ):
        """The plan of an index.

        Args:
            bucket_sizes: (n, 2) int, width and height of the bucket of each row of the index.
            repeats: (n,) int, how often each row is seen in a pass of its bucket's stream; None is once.
        """
        assert global_batch_size % bucket_batch_size == 0
        if not len(bucket_sizes):
            raise ValueError("a plan needs at least one image")
        self.seed = seed
        self.unit_size = bucket_batch_size
        self.units_per_step = global_batch_size // bucket_batch_size
        # one number per size, sorted by (width, height); widths and heights are far below 2^20
        codes = (bucket_sizes[:, 0].astype(np.int64) << 20) | bucket_sizes[:, 1]
        found, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
        self.buckets = [(int(code >> 20), int(code & 0xFFFFF)) for code in found]  # (width, height)
        self.images = counts  # of each bucket
        # entries of bucket b, rows in the index's order, are rows[starts[b] : starts[b + 1]]; a row may be several
        self._rows = np.argsort(inverse, kind="stable").astype(np.int32)
        self._repeats, self._turns = repeats, np.zeros(0, dtype=np.int32)
        if repeats is not None:
            times = repeats[self._rows]
            firsts = np.repeat(np.cumsum(times) - times, times)
            self._turns = (np.arange(len(firsts)) - firsts).astype(np.int32)  # which of its row's entries each one is
            self._rows = np.repeat(self._rows, times)
            counts = np.bincount(inverse, weights=repeats).astype(np.int64)
        self.counts = counts  # entries of each bucket: images, each as often as it is repeated
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._epoch_units = lru_cache(maxsize=2)(self._shuffle_epoch)
        self._order = lru_cache(maxsize=2 * len(self.buckets))(self._shuffle_pass)

    def units_until(self, epoch: int) -> np.ndarray:
        """c_b(epoch): units of each bucket by the end of an epoch, int64 (buckets,)."""
        if epoch == 0:
            return np.zeros(len(self.counts), dtype=np.int64)
        return np.maximum(1, (2 * epoch * self.counts + self.unit_size) // (2 * self.unit_size))

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
        epoch = max(1, position * self.unit_size // int(self.counts.sum()))
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
        count = int(self.counts[unit.bucket])
        first = unit.number * self.unit_size
        places = [divmod(first + i, count) for i in range(self.unit_size)]
        return [self._seen(int(self._order(unit.bucket, pass_)[place]), pass_) for pass_, place in places]

    def _seen(self, entry: int, pass_: int) -> tuple[int, int]:
        """The row of an entry, and its own pass: a row that is seen r times in each of its bucket's makes r of them."""
        row = int(self._rows[entry])
        if self._repeats is None:
            return row, pass_
        return row, pass_ * int(self._repeats[row]) + int(self._turns[entry])

    def epoch_rows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """All of an epoch at once: its units' buckets, (units,), and their samples' rows, int32 (units, unit size).

        Units in order, samples as ``unit_samples`` gives them; what 26,500 calls of it would do.
        """
        buckets, numbers = self._epoch_units(epoch)
        rows = np.empty((len(buckets), self.unit_size), dtype=np.int32)
        for bucket in np.unique(buckets).tolist():
            units = np.flatnonzero(buckets == bucket)
            samples = numbers[units, None] * np.int64(self.unit_size) + np.arange(self.unit_size)
            passes, places = np.divmod(samples, int(self.counts[bucket]))
            found = np.empty(samples.shape, dtype=np.int32)
            for pass_ in np.unique(passes).tolist():
                here = passes == pass_
                found[here] = self._rows[self._order(bucket, pass_)[places[here]]]
            rows[units] = found
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
        """Buckets (width, height) with fewer images than a unit: an image repeats within it."""
        return [size for size, count in zip(self.buckets, self.images, strict=True) if count < self.unit_size]

    def _shuffle_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(bucket, number) of an epoch's units in their shuffled order, int32 each."""
        before, after = self.units_until(epoch - 1), self.units_until(epoch)
        buckets = np.repeat(np.arange(len(before)), after - before)
        numbers = np.concatenate([np.arange(low, high) for low, high in zip(before, after, strict=True)])
        order = rng("units", self.seed, epoch).permutation(len(buckets))
        return buckets[order].astype(np.int32), numbers[order].astype(np.int32)

    def _shuffle_pass(self, bucket: int, pass_: int) -> np.ndarray:
        """Entries of a bucket in the order of one pass, int32 (n_b,)."""
        width, height = self.buckets[bucket]
        order = rng("order", self.seed, pass_, width, height).permutation(int(self.counts[bucket]))
        return (order + self._starts[bucket]).astype(np.int32)


def build_plan(index: Index, seed: int, data: DataConfig) -> Plan:
    """The plan of a config over an index."""
    with waiting("plan the steps"):
        return Plan(
            index.bucket_sizes,
            seed=seed,
            bucket_batch_size=data.bucket_batch_size,
            global_batch_size=data.global_batch_size,
            repeats=find_repeats(index, data),
        )


def find_repeats(index: Index, data: DataConfig) -> np.ndarray | None:
    """How often each row is seen in a pass, by its source, int64 (n,); None where that is once for all.

    Raises:
        UserError: when the index has samples of a source that the config does not name.
    """
    if data.sources is None or all(source.repeats == 1 for source in data.sources):
        return None
    labels = [source.label for source in data.sources]
    places = pc.index_in(index.table["source"], pa.array(labels))
    if places.null_count:
        strange = pc.unique(index.table["source"].filter(pc.is_null(places))).to_pylist()
        raise UserError(
            f"data.sources: {index.folder} holds samples of {', '.join(strange[:4])}, and no source is called so, "
            "which leaves its repeats unknown: name it as when it was prepared, or run scripts/build_shards.py again"
        )
    return np.array([source.repeats for source in data.sources])[places.to_numpy()]
