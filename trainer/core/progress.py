"""A meter of long work: a bar on a terminal, elsewhere (a log, SLURM, CI) a line now and then; none under --quiet."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from trainer.core.console import SHORT, format_duration, log
from trainer.core.disk import format_bytes

BYTES, SECONDS = "B", "s"  # units that are written in other ways; of SECONDS nothing but the time is counted
LINE_SECONDS = 30.0  # after these a line, or earlier ...
LINE_SHARE, BETWEEN_SECONDS = 0.1, 5.0  # ... at each tenth, but not more often
WATCH_SECONDS = 0.5
BAR, BAR_COLUMNS = "{desc}: {percentage:3.0f}%|{bar:20}| {state}", 29  # beside the description and the state
NO_BAR, NO_BAR_COLUMNS = "{desc}: {percentage:3.0f}%, {state}", 8
NO_TOTAL = "{desc}: {state}"

Each = TypeVar("Each")


class Bar(tqdm):
    """A bar that says how much of how much, how fast, and how long it will take, in our words, as far as they fit."""

    note = ""  # after all else

    @property
    def format_dict(self) -> dict[str, Any]:
        values = super().format_dict
        n, initial, total, seconds = (values[name] for name in ("n", "initial", "total", "elapsed"))
        rate = values["rate"] or (n - initial) / max(seconds, 1e-9)
        parts = split_state(n, total, values["unit"], rate, seconds)
        layout, state = fit_line((values["ncols"] or 1000) - len(values["prefix"]), bool(total), parts, self.note)
        return {**values, "state": state, "bar_format": layout}


class Meter:
    """Counts what is done of ``total``; None where that is not known. ``done`` was done before.

    ``unit`` is a noun in the singular, BYTES or SECONDS.
    """

    def __init__(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit, self.first, self.done = what, total, unit, done, done
        self.shown = log.isEnabledFor(logging.INFO)
        self.begun = self.said_at = time.monotonic()
        self.said: int | None = None  # what was done at the last line
        self.note = ""  # after all else
        self.bar: Bar | None = None
        if self.shown and terminal_columns():
            # leave=None: bars inside another one are wiped away
            self.bar = Bar(desc=what, total=total, initial=done, unit=unit, delay=SHORT, leave=None, dynamic_ncols=True)

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, said: bool = True) -> None:
        """End the bar; elsewhere, after earlier lines, a last one, unless another says it."""
        if self.bar is not None:
            self.bar.close()
        elif self.said is not None and said:
            took = format_duration(time.monotonic() - self.begun)
            made = "" if self.unit == SECONDS else f"{format_count(self.done - self.first, self.unit)} in "
            log.info("%s: %s%s%s", self.what, made, took, self.note)

    def update(self, more: int = 1, note: str = "") -> None:
        """So much more is done."""
        self.done += more
        if not self.shown:
            return
        if note:
            self.note = f", {note}"
        if self.bar is not None:
            self.bar.note = note or self.bar.note
            self.bar.update(more)
        elif self.is_due():
            self.said, self.said_at = self.done, time.monotonic()
            log.info("%s: %s", self.what, self.describe())

    def is_due(self) -> bool:
        """Whether it is time for another line."""
        waited = time.monotonic() - self.said_at
        share = (self.done - (self.said or self.first)) / self.total if self.total else 0.0
        return waited >= LINE_SECONDS or (waited >= BETWEEN_SECONDS and share >= LINE_SHARE)

    def describe(self) -> str:
        """Where it stands, in a line."""
        seconds = time.monotonic() - self.begun
        rate = (self.done - self.first) / max(seconds, 1e-9)
        percent = f"{100 * self.done // self.total}%, " if self.total else ""
        return percent + describe_state(self.done, self.total, self.unit, rate, seconds) + self.note


def terminal_columns() -> int:
    """Columns of the terminal that stderr is; 0 where it is none, or does not know, as one of ``docker exec -t``."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else 0
    except (OSError, ValueError):
        return 0


def fit_line(columns: int, has_total: bool, parts: tuple[str, str, str], note: str) -> tuple[str, str]:
    """The layout of a bar's line and its state, of which as much is left out as does not fit.

    First the bar itself goes, then the rate, then all but the beginning of the note, which of a training is the loss.
    """
    counted, rate, left = parts
    narrow, rest = (NO_BAR, NO_BAR_COLUMNS) if has_total else (NO_TOTAL, 2)
    layouts = [(BAR, BAR_COLUMNS, [counted, rate, left, note])] if has_total else []
    layouts += [(narrow, rest, said) for said in ([counted, rate, left, note], [counted, left, note])]
    layouts += [(narrow, rest, [counted, left, note.partition(", ")[0]])]
    fitted = [(layout, taken, ", ".join(filter(None, said))) for layout, taken, said in layouts]
    layout, _, state = next((each for each in fitted if each[1] + len(each[2]) <= columns), fitted[-1])
    return layout, state


def describe_state(done: float, total: float | None, unit: str, rate: float, seconds: float) -> str:
    """As in ``1,234 of 5,000 images, 12.3 images/s, 0:05:10 left``; ``rate`` in units a second."""
    return ", ".join(filter(None, split_state(done, total, unit, rate, seconds)))


def split_state(done: float, total: float | None, unit: str, rate: float, seconds: float) -> tuple[str, str, str]:
    """How much, how fast, and how long it will take or took; a part that says nothing is empty."""
    if unit == SECONDS:
        return format_duration(seconds), "", ""
    counted = f"{format_part(done, total, unit)} of {format_count(total, unit)}" if total else format_count(done, unit)
    if not rate:
        return counted, "", ""
    left = f"{format_duration((total - done) / rate)} left" if total and done < total else format_duration(seconds)
    return counted, format_rate(rate, unit), left


def format_count(count: float, unit: str) -> str:
    """As in ``1,234 images`` or ``6.9 GB``."""
    if unit == BYTES:
        return format_bytes(count)
    return f"{count:,.0f} {unit}{'' if count == 1 else 's'}"


def format_part(done: float, total: float | None, unit: str) -> str:
    """A part of a total, without its unit where that is the total's."""
    if unit != BYTES or total is None:
        return f"{done:,.0f}"
    number, _, scale = format_bytes(done).partition(" ")
    return number if format_bytes(total).endswith(scale) else f"{number} {scale}"


def format_rate(rate: float, unit: str) -> str:
    """As in ``12.3 images/s``, ``4.8 s/step`` or ``412.0 MB/s``."""
    if unit == BYTES:
        return f"{format_bytes(rate)}/s"
    return f"{rate:,.1f} {unit}s/s" if rate >= 1 else f"{1 / rate:,.1f} s/{unit}"


def metered(items: Iterable[Each], what: str, unit: str, total: int | None = None) -> Iterator[Each]:
    """The items, counted by a meter as they are asked for."""
    with Meter(what, total, unit) as meter:
        if not meter.shown:
            yield from items
            return
        for item in items:
            yield item
            meter.update()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Around what says nothing of how far it is: a meter of the time that it takes."""
    with Meter(what, None, SECONDS) as meter, repeating(lambda: meter.update(0)) if meter.shown else nullcontext():
        yield


@contextmanager
def watch_writing(folder: Path, what: str, size: int) -> Iterator[None]:
    """Around a library's call that writes ``size`` bytes into ``folder`` and says nothing meanwhile.

    Seen by the disk space that the folder's files take: the file may have its whole length from the beginning.
    """
    with Meter(f"write {what}", size, BYTES) as meter:
        before = measure_files(folder) if meter.shown else 0

        def look() -> None:
            written = min(measure_files(folder) - before, size)
            meter.update(max(0, written - meter.done))

        with repeating(look) if meter.shown else nullcontext():
            yield
        meter.update(size - meter.done)


@contextmanager
def repeating(work: Callable[[], object]) -> Iterator[None]:
    """Inside, a thread does this twice a second."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(WATCH_SECONDS):
            work()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def measure_files(folder: Path) -> int:
    """Bytes on the disk of the files in a folder, those of its folders not counted."""
    total = 0
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:  # renamed or removed since
            continue
    return total
