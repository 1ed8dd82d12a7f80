"""How long a run's steps, saves and samples take, and what this rank is at: for whoever looks ahead, or watches it."""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

LAST = {"step": 50, "checkpoint": 3, "sample": 3}  # as many of the last count


@dataclass(frozen=True)
class Mark:
    """What a rank is at. All ranks come by the same marks in the same order, so that their numbers can be compared."""

    number: int  # of this rank's marks
    kind: str  # start, step, checkpoint or sample
    doing: str  # in words
    since: float  # of time.monotonic(); or when it last went on


class Pace:
    """The last durations of each kind of work, in seconds, and the last mark."""

    def __init__(self) -> None:
        self.took: dict[str, deque[float]] = {}
        self.step_begun: float | None = None  # of time.monotonic()
        self.aside = 0.0  # since then, of what is no part of it
        self.saving_since: float | None = None  # where a save is under way beside the steps
        self.last = Mark(0, "start", "its beginning", time.monotonic())

    def mark(self, doing: str, kind: str = "step") -> None:
        """What comes now, often a wait for all other ranks."""
        self.last = Mark(self.last.number + 1, kind, doing, time.monotonic())

    def go_on(self) -> None:
        """Still at the same, and not hanging."""
        self.last = replace(self.last, since=time.monotonic())

    def note(self, what: str, seconds: float) -> None:
        """One more took so long."""
        self.took.setdefault(what, deque(maxlen=LAST.get(what, 3))).append(seconds)

    @contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """Around what is no part of the step."""
        begun = time.monotonic()
        self.mark(f"a {what}", what)
        yield
        self.mark(f"the end of a {what}")
        self.aside += time.monotonic() - begun

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Around one: how long it takes is noted, and is no part of the step."""
        begun = time.monotonic()
        with self.apart(what):
            yield
        self.note(what, time.monotonic() - begun)

    def begin_step(self) -> None:
        """A step begins, and the one before has ended."""
        now = time.monotonic()
        if self.step_begun is not None:
            self.note("step", now - self.step_begun - self.aside)
        self.step_begun, self.aside = now, 0.0
        self.mark("the agreement of all ranks to go on")

    def rest_of_save(self, expected: float) -> float:
        """Seconds until the save that is under way beside the steps has taken as long as expected."""
        return 0.0 if self.saving_since is None else max(0.0, self.saving_since + expected - time.monotonic())

    def longest(self, what: str, default: float = 0.0) -> float:
        """The longest of the last; the default where none is known."""
        return max(self.took.get(what, ()), default=default)

    def median(self, what: str) -> float:
        """The median of the last, of which there are some."""
        return statistics.median(self.took[what])
