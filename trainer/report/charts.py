"""Curves as inline SVG: thinned so that spikes stay visible, with ticks, and with what the page's script looks up.

A drawing is 1000 x 1000 and is stretched to its box, so that words and line widths do not depend on the screen's size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from trainer.report.pages import figure, short_figure, thousands

MAX_COLUMNS_DRAWN = 600  # points of a curve: more lines of metrics share a column, as mean, least and most
SIDE = 1000  # of a drawing
MAX_DOTS = 60  # so few points are drawn as such
LOG_RANGE = 30.0  # what exceeds the median by more, and not only in some peaks, needs a logarithmic axis
OUTSIDE, MANY, FAR = 0.01, 100, 0.6  # of many values this share at either end may lie outside, if they lie so far away
MAX_COLOURS = 8

Scale = Literal["linear", "zero", "log"]  # "zero" begins there; a linear axis may turn out logarithmic


@dataclass(frozen=True)
class Series:
    """One curve: float64 (n,) each, x ascending, NaN where there is no value."""

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    kind: Literal["line", "raw"] = "line"  # raw: pale, what a smoothed line is made of


@dataclass(frozen=True)
class Thinned:
    """A curve in at most MAX_COLUMNS_DRAWN points; low and high are y itself where nothing was joined."""

    x: np.ndarray
    y: np.ndarray  # means
    low: np.ndarray
    high: np.ndarray
    joined: bool


@dataclass(frozen=True)
class Tick:
    """A label at a place along an axis, in percent."""

    at: float
    text: str
    second: str = ""


@dataclass(frozen=True)
class Drawn:
    """One curve as paths."""

    label: str
    colour: int
    kind: str
    line: str
    band: str
    dots: str
    last: str


@dataclass(frozen=True)
class Axis:
    """What the charts of a page have in common along x."""

    low: float
    high: float
    name: str = "step"
    epochs: Sequence[tuple[float, float]] = ()  # (x, epoch), ascending; empty where they are not known
    marks: Sequence[tuple[float, str]] = ()  # vertical lines: where, and what they say

    def place(self, x: Any) -> Any:
        """Where an x lies, as a share of the width."""
        return (x - self.low) / (self.high - self.low)

    def epoch(self, x: float) -> float | None:
        """The epoch at an x."""
        if not self.epochs:
            return None
        xs, values = zip(*self.epochs, strict=True)
        return float(np.interp(x, xs, values))


@dataclass(frozen=True)
class Chart:
    """A drawing, ready for the template."""

    title: str
    note: str
    curves: list[Drawn]
    y_ticks: list[Tick]
    x_ticks: list[Tick]
    marks: list[Tick]
    joined: bool  # whether some columns stand for several steps
    data: dict[str, Any] = field(repr=False)  # for the script


def draw_chart(title: str, series: Sequence[Series], axis: Axis, scale: Scale = "linear", note: str = "") -> Chart:
    """All curves over each other; those without any value are left out."""
    shown = [each for each in series if np.isfinite(each.y).any()]
    thinned = [thin(each.x, each.y, axis) for each in shown]
    values = join_values(thinned)
    log = scale == "log" or (scale == "linear" and wants_log(values))
    low, high = find_range(values, log, zero=scale == "zero")
    notes = [note, "logarithmic" if log else "", *find_peaks(shown, low, high, axis.name)]
    return Chart(
        title=title,
        note="; ".join(filter(None, notes)),
        curves=[draw_curve(each, points, axis, (low, high), log) for each, points in zip(shown, thinned, strict=True)],
        y_ticks=[
            Tick(100 * float(rescale(value, low, high, log)), short_figure(value))
            for value in (log_ticks(low, high) if log else linear_ticks(low, high))
        ],
        x_ticks=x_ticks(axis),
        marks=[Tick(100 * float(axis.place(x)), text) for x, text in axis.marks],
        joined=any(each.joined for each in thinned),
        data={
            "low": axis.low, "high": axis.high, "name": axis.name, "epochs": [list(pair) for pair in axis.epochs],
            "series": [list_points(points) for points in thinned],
        },
    )  # fmt: skip


def thin(x: np.ndarray, y: np.ndarray, axis: Axis) -> Thinned:
    """Mean, least and most of each column of the width, where there are more points than columns."""
    if len(x) <= MAX_COLUMNS_DRAWN:
        return Thinned(x, y, y, y, joined=False)
    columns = np.minimum((axis.place(x) * MAX_COLUMNS_DRAWN).astype(np.int64), MAX_COLUMNS_DRAWN - 1)
    starts = np.flatnonzero(np.diff(columns, prepend=-1))
    finite = np.isfinite(y)
    sizes, counts = np.diff(starts, append=len(x)), np.add.reduceat(finite.astype(np.int64), starts)
    sums = np.add.reduceat(np.where(finite, y, 0.0), starts)
    mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    low, high = np.fmin.reduceat(y, starts), np.fmax.reduceat(y, starts)  # NaN only where all are
    return Thinned(np.add.reduceat(x, starts) / sizes, mean, low, high, joined=True)


def join_values(curves: Sequence[Thinned]) -> np.ndarray:
    """The least and most of all columns of all curves that have any."""
    values = np.concatenate([part for each in curves for part in (each.low, each.high)] or [np.zeros(0)])
    return values[np.isfinite(values)]


def wants_log(values: np.ndarray) -> bool:
    """Whether curves go through several magnitudes, which is only shown above zero; some peaks are no reason."""
    if not len(values) or values.min() <= 0:
        return False
    low, middle, high = np.quantile(values, (OUTSIDE, 0.5, 1 - OUTSIDE))
    return bool(high > LOG_RANGE * middle or middle > LOG_RANGE * low)


def find_range(values: np.ndarray, log: bool, zero: bool) -> tuple[float, float]:
    """The ends of a vertical axis, with some room; of many values a few that lie far outside are cut off."""
    values = values[values > 0] if log else values
    if not len(values):
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.3, high * 1.3
    if zero and low >= 0:
        return 0.0, high * 1.08 or 1.0
    if len(values) >= MANY:
        inner_low, inner_high = (float(end) for end in np.quantile(values, (OUTSIDE, 1 - OUTSIDE)))
        room = FAR * (inner_high - inner_low)
        low, high = max(low, inner_low - room), min(high, inner_high + room)
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - room, high + room


def find_peaks(series: Sequence[Series], low: float, high: float, name: str) -> Iterator[str]:
    """Words for the extremes that an axis cuts off."""
    for each in series:
        for word, place, cut in (("greatest", np.nanargmax(each.y), high), ("least", np.nanargmin(each.y), low)):
            value = float(each.y[place])
            if (value > cut) if word == "greatest" else (value < cut):
                yield f"cut off: {word} {figure(value)} at {name} {each.x[place]:,.0f}"


def rescale(values: Any, low: float, high: float, log: bool) -> Any:
    """Where values lie between the ends of an axis, as shares; what a logarithmic axis cannot show has none."""
    if not log:
        return (values - low) / (high - low)
    above = np.where(np.asarray(values) > 0, values, np.nan)
    return np.log(above / low) / np.log(high / low)


def linear_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within a range: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * (1 - 1e-9))
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and 2 and 5 times them where there is room; every second or third where there are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    sizes = (1, 2, 5) if len(decades) <= 3 else (1,)
    every = max(1, len(decades) // 5)
    found = [size * 10.0**decade for decade in decades if decade % every == 0 for size in sizes]
    return [value for value in found if low <= value <= high]


def x_ticks(axis: Axis) -> list[Tick]:
    """Round places along x, each with its epoch where that is known."""
    ticks = linear_ticks(axis.low, axis.high)
    ticks = [value for value in ticks if value == int(value)] or [axis.low, axis.high]
    return [
        Tick(100 * float(axis.place(value)), thousands(value), "" if epoch is None else f"ep. {epoch:.3g}")
        for value in ticks
        for epoch in [axis.epoch(value)]
    ]


def draw_curve(series: Series, points: Thinned, axis: Axis, ends: tuple[float, float], log: bool) -> Drawn:
    """Paths of one curve; a break where there is no value, a dot where a value stands alone."""
    xs = np.rint(SIDE * np.clip(axis.place(points.x), 0, 1))
    ys, lows, highs = (
        np.rint(SIDE * (1 - np.clip(rescale(part, *ends, log), 0, 1))) for part in (points.y, points.low, points.high)
    )
    runs = find_runs(np.isfinite(ys))
    line = "".join("M" + "L".join(pairs(xs[a:b], ys[a:b])) for a, b in runs if b - a > 1)
    band = "" if not points.joined else "".join(draw_band(xs[a:b], lows[a:b], highs[a:b]) for a, b in runs)
    few = len(xs) <= MAX_DOTS
    alone = [place for a, b in runs for place in range(a, b) if few or b - a == 1]
    dots = "".join(f"M{pair}h0" for pair in pairs(xs[alone], ys[alone]))
    last = points.y[np.isfinite(points.y)][-1]
    return Drawn(series.label, series.colour % MAX_COLOURS, series.kind, line, band, dots, figure(float(last)))


def find_runs(finite: np.ndarray) -> list[tuple[int, int]]:
    """Stretches of neighbours that have a value, each with its end excluded."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], finite, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def draw_band(xs: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> str:
    """The area between least and most, there along the one and back along the other."""
    there, back = pairs(xs, highs), pairs(xs[::-1], lows[::-1])
    return "M" + "L".join([*there, *back]) + "Z"


def pairs(xs: np.ndarray, ys: np.ndarray) -> list[str]:
    """Points as a path has them."""
    return [f"{x} {y}" for x, y in zip(xs.astype(int).tolist(), np.nan_to_num(ys).astype(int).tolist(), strict=True)]


def list_points(points: Thinned) -> dict[str, list[float | None]]:
    """What the script looks up: x and the values there, four digits each."""
    found = {"x": [round(x) for x in points.x.tolist()], "y": [round_off(y) for y in points.y.tolist()]}
    if points.joined:
        found |= {
            "low": [round_off(y) for y in points.low.tolist()],
            "high": [round_off(y) for y in points.high.tolist()],
        }
    return found


def round_off(value: float) -> float | None:
    """Four digits; None for no value, which JSON has no word for."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
