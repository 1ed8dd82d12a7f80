"""How long a run's steps, saves and samples take: measured as it goes, for whoever has to look ahead."""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

LAST = {"step": 50, "checkpoint": 3, "sample": 3}  # as many of the last count


class Pace:
    """The last durations of each kind of work, in seconds."""

    def __init__(self) -> None:
        self.took: dict[str, deque[float]] = {}
        self.step_begun: float | None = None  # of time.monotonic()
        self.aside = 0.0  # since then, of what is no part of it

    def note(self, what: str, seconds: float) -> None:
        """One more took so long."""
        self.took.setdefault(what, deque(maxlen=LAST.get(what, 3))).append(seconds)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Around one: how long it takes is noted, and is no part of the step."""
        begun = time.monotonic()
        yield
        self.note(what, time.monotonic() - begun)
        self.aside += time.monotonic() - begun

    def begin_step(self) -> None:
        """A step begins, and the one before has ended."""
        now = time.monotonic()
        if self.step_begun is not None:
            self.note("step", now - self.step_begun - self.aside)
        self.step_begun, self.aside = now, 0.0

    def longest(self, what: str, default: float = 0.0) -> float:
        """The longest of the last; the default where none is known."""
        return max(self.took.get(what, ()), default=default)

    def median(self, what: str, default: float = 0.0) -> float:
        """The median of the last; the default where none is known."""
        return statistics.median(self.took[what]) if self.took.get(what) else default
