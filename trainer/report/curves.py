"""A run's metrics in memory, as columns over steps: the file is read once, and after that only what was added to it."""

from array import array
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.model.run_records import parse_metrics

MISSING = float("nan")
NOT_MEASURED = {"step", "attempt", "time"}


class Curves:
    """The steps that count and their metrics, NaN where one is missing or not finite.

    What an attempt made after the step with which a later one began is lost, as its weights are: it is dropped.
    """

    def __init__(self, firsts: Mapping[int, int] | None = None) -> None:
        self.firsts = dict(firsts or {})  # attempt -> completed steps with which it began
        self.steps, self.attempts, self.times = array("q"), array("q"), array("d")
        self.columns: dict[str, array[float]] = {}
        self.attempt = 0  # the newest
        self.damaged = 0  # lines that could not be read
        self.lost = 0  # lines of steps that a later attempt did not begin with
        self.read_bytes = 0

    def read(self, path: Path) -> None:
        """Take over what was added to the file; a line that is not finished yet comes next time."""
        if path.is_file():
            with path.open("rb") as file:
                file.seek(self.read_bytes)
                added = file.read()
            whole = added[: added.rfind(b"\n") + 1]
            self.read_bytes += len(whole)
            for text in whole.split(b"\n"):
                self.add(text)
        self.begin(max(self.firsts, default=0))

    def add(self, text: bytes) -> None:
        """One line of the file; a step may have several."""
        line = parse_metrics(text)
        if line is None:
            self.damaged += bool(text.strip())
            return
        step, attempt = line["step"], line["attempt"]
        if attempt < self.attempt:
            self.lost += 1
            return
        self.firsts.setdefault(attempt, step - 1)
        self.begin(attempt)
        place = bisect_left(self.steps, step)
        if place == len(self.steps) or self.steps[place] != step:
            self.steps.insert(place, step)
            self.attempts.insert(place, attempt)
            self.times.insert(place, line["time"])
            for column in self.columns.values():
                column.insert(place, MISSING)
        for name in [name for name in line if name not in NOT_MEASURED]:
            if name not in self.columns:
                self.columns[name] = array("d", [MISSING]) * len(self.steps)
            self.columns[name][place] = to_number(line[name])

    def begin(self, attempt: int) -> None:
        """A newer attempt, if it is one: what others made after its first step is lost."""
        if attempt <= self.attempt:
            return
        self.attempt = attempt
        place = bisect_left(self.steps, self.firsts[attempt] + 1)
        self.lost += len(self.steps) - place
        del self.steps[place:], self.attempts[place:], self.times[place:]
        for column in self.columns.values():
            del column[place:]

    @property
    def names(self) -> list[str]:
        """The metrics that have a value anywhere, in the order of the file."""
        return [name for name in self.columns if np.isfinite(self.column(name)).any()]

    def column(self, name: str) -> np.ndarray:
        """One metric, float64 (lines,)."""
        values = np.array(self.columns.get(name, [MISSING] * len(self.steps)), dtype=np.float64)
        return np.where(np.isfinite(values), values, MISSING)

    @property
    def x(self) -> np.ndarray:
        """The steps, float64 (lines,), strictly ascending."""
        return np.array(self.steps, dtype=np.float64)

    def last(self, name: str) -> float | None:
        """The newest value of a metric; None where it has none."""
        values = self.column(name)
        found = values[np.isfinite(values)]
        return float(found[-1]) if len(found) else None

    def seconds(self, started: Mapping[int, float]) -> float:
        """How long the attempts took whose steps count, from ``started`` to their last line; pauses are left out."""
        attempts, times = np.array(self.attempts), np.array(self.times)
        used = [number for number in np.unique(attempts).tolist() if number in started]
        return sum(max(0.0, float(times[attempts == number].max()) - started[number]) for number in used)

    def pace(self, lines: int) -> tuple[float, int] | None:
        """Seconds a step over the last so many lines of the newest attempt, all included, and how many steps those are.

        None before it has two lines.
        """
        first = max(bisect_left(self.attempts, self.attempt), len(self.steps) - lines - 1)
        if first >= len(self.steps) - 1:
            return None
        steps, seconds = self.steps[-1] - self.steps[first], self.times[-1] - self.times[first]
        return (seconds / steps, steps) if seconds > 0 else None


def to_number(value: Any) -> float:
    """A value of a line as a float; NaN for null and for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return MISSING
    try:
        return float(value)
    except OverflowError:
        return MISSING


def choose_window(x: np.ndarray) -> float | None:
    """The width of the smoothing, in steps: a fiftieth of the run, and some lines at least; None for few lines."""
    if len(x) < 20:
        return None
    wanted = max((x[-1] - x[0]) / 50, 5 * float(np.median(np.diff(x))))
    scale = 10 ** np.floor(np.log10(wanted))
    return float(max(1, round(wanted / scale) * scale))


def smooth(x: np.ndarray, y: np.ndarray, window: float) -> np.ndarray:
    """The mean of the finite values within half a window of each x, which ascends; NaN where there is none."""
    finite = np.isfinite(y)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(finite, y, 0.0), finite))
    low, high = np.searchsorted(x, x - window / 2, "left"), np.searchsorted(x, x + window / 2, "right")
    within = counts[high] - counts[low]
    return np.where(within > 0, (sums[high] - sums[low]) / np.maximum(within, 1), MISSING)
