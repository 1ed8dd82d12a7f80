"""Which sound sample stands in for one that cannot be read, where ``data.on_bad_sample`` is substitute.

It is the next sound one of the bucket's stream: a function of (plan, step, position) and of which samples are bad, so
that neither processes nor micro-batches nor threads matter. Once a sample was found bad it counts as bad for the whole
run, also after a resume and where it can be read again: else what was lost and is made again would have other bits.
"""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from trainer.data.index import BadSample, Index, read_latents_into
from trainer.data.plan import Plan, Planned, Unit
from trainer.data.shards import Row

MAX_CANDIDATES = 64  # that are read, or known as bad, before a run gives up
MAX_UNITS = 1000  # of the bucket's stream in which they are looked for: rows of small weight come seldom


@dataclass(frozen=True)
class Substitution:
    """A sample of a step that was bad, and what stood in for it."""

    step: int
    position: int  # in the global batch
    key: str
    substitute: str
    reason: str  # with shard and key
    passed: list[str] = field(default_factory=list)  # keys between the two, which were bad as well


class Substitutes:
    """What this process knows of bad samples; its loader's threads share it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made: dict[tuple[int, int], Substitution] = {}
        self.bad: dict[str, str] = {}  # key -> reason

    def learn(self, records: Iterable[dict[str, Any]]) -> None:
        """Take substitutions of a checkpoint, or of other processes."""
        for record in records:
            self.add(Substitution(**record))

    def add(self, found: Substitution) -> None:
        with self.lock:
            self.made[found.step, found.position] = found
            for key in (found.key, *found.passed):
                self.bad.setdefault(key, found.reason)

    def before(self, made: int) -> list[dict[str, Any]]:
        """The substitutions of the first ``made`` steps, in order; the loader is ahead of them."""
        with self.lock:
            known = sorted(place for place in self.made if place[0] < made)
            return [asdict(self.made[place]) for place in known]


def read_or_substitute(
    raw_latents: np.ndarray, index: Index, plan: Plan, step: int, sample: Planned, known: Substitutes | None
) -> tuple[Row, int]:
    """Fill an array with a planned sample's latents, or with those of what stands in for it; its row and its pass.

    A substitute's draws are those of a pass that no plan has: it sees other noise than in its own turns.

    Raises:
        BadSample: naming shard and key, where nothing may stand in or nothing sound is found.
    """
    record = index.row(sample.row)
    if known is None:
        read_latents_into(raw_latents, index, record)
        return record, sample.pass_
    reason = why_bad(raw_latents, index, record, known)
    if reason is None:
        return record, sample.pass_
    passed: list[str] = []
    for row in iterate_next(plan, sample):
        other = index.row(row)
        if why_bad(raw_latents, index, other, known) is None:
            known.add(Substitution(step, sample.position, record["key"], other["key"], reason, passed))
            return other, substitute_pass(plan, step, sample.position)
        passed.append(other["key"])
        if len(passed) == MAX_CANDIDATES:
            break
    width, height = plan.buckets[sample.unit.bucket]
    raise BadSample(
        f"{reason}. Nothing can stand in for it: none of the {len(passed)} other samples of its bucket {width} x "
        f"{height} that were tried is sound"
    )


def why_bad(raw_latents: np.ndarray, index: Index, record: Row, known: Substitutes) -> str | None:
    """Why a sample cannot be used, of which the latents are read otherwise."""
    if (reason := known.bad.get(record["key"])) is not None:
        return reason
    try:
        read_latents_into(raw_latents, index, record)
    except BadSample as error:
        return str(error)
    return None


def iterate_next(plan: Plan, sample: Planned) -> Iterator[int]:
    """The other rows of a sample's bucket, each once, in the order in which its stream goes on."""
    unit, tried = sample.unit, {sample.row}
    offset = sample.position % plan.unit_size + 1
    for number in range(unit.number, unit.number + MAX_UNITS):
        for row, _ in plan.unit_samples(Unit(unit.epoch, unit.bucket, number))[offset:]:
            if row not in tried:
                tried.add(row)
                yield row
        if len(tried) == plan.seen[unit.bucket]:
            return
        offset = 0


def substitute_pass(plan: Plan, step: int, position: int) -> int:
    """The pass by whose number a substitute's draws are made: below 0, and another one for each place of a run."""
    return -1 - (step * plan.unit_size * plan.units_per_step + position)
