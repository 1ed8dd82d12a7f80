"""Metrics in memory and as curves: which lines count, nothing is read twice, spikes stay visible."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.metrics import read_metrics
from trainer.report.charts import (
    MAX_COLUMNS_DRAWN,
    Axis,
    Series,
    draw_chart,
    find_range,
    linear_ticks,
    log_ticks,
    thin,
)
from trainer.report.curves import Curves, choose_window, smooth
from trainer.report.pages import describe_seconds, figure, short_figure

LOSS = "train/loss"


def text(step: int, attempt: int = 1, **more: Any) -> str:
    return json.dumps({"step": step, "attempt": attempt, "time": 100.0 * attempt + step, **more}) + "\n"


def read_all(path: Path, firsts: dict[int, int] | None = None) -> Curves:
    curves = Curves(firsts)
    curves.read(path)
    return curves


def test_the_last_attempt_counts_and_what_it_did_not_begin_with_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(text(step, **{LOSS: float(step)}) for step in (10, 20, 30, 40)))
    path.open("a").write(text(30, 2, **{LOSS: 300.0}))
    curves = read_all(path, {1: 0, 2: 25})
    assert list(curves.steps) == [10, 20, 30] and list(curves.attempts) == [1, 1, 2] and curves.lost == 2
    assert curves.column(LOSS).tolist() == [10.0, 20.0, 300.0]
    known = read_metrics(path)  # which keeps what no later attempt made again
    assert {step: known[step][LOSS] for step in curves.steps} == dict(
        zip(curves.steps, curves.column(LOSS), strict=True)
    )
    assert list(read_all(path).steps) == [10, 20, 30]  # without run.json, by the lines alone
    assert list(read_all(path, {1: 0, 2: 25, 3: 12}).steps) == [10]  # a third began, and has no line yet


def test_a_file_is_read_once_and_then_what_was_added(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    curves = Curves()
    curves.read(path)
    assert list(curves.steps) == [] and curves.names == [] and curves.last(LOSS) is None
    lines = [text(step, **{LOSS: float(step)}) for step in range(1, 6)]
    with path.open("w") as file:
        for number, line in enumerate(lines):
            half = len(line) // 2
            file.write(line[:half])
            file.flush()
            curves.read(path)
            assert len(curves.steps) == number  # a line that is not whole yet
            file.write(line[half:])
            file.flush()
            curves.read(path)
    assert list(curves.steps) == [1, 2, 3, 4, 5] and curves.column(LOSS).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert curves.damaged == 0 and curves.read_bytes == path.stat().st_size


def test_damaged_lines_are_counted_and_stop_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    damaged = [b'{"step": 4, "att', b"5", b"null", b"[" * 100_000, b"\xff\xfe\x00", b'{"step": 3}', b'{"step": "1"}',
               b'{"step": 1e400, "attempt": 1, "time": 1}', b'{"step": -1, "attempt": 1, "time": 1}',
               b'{"step": true, "attempt": 1, "time": 1}', b'{"step": 2, "attempt": 1, "time": "now"}',
               b'{"step": 1' + b"0" * 400 + b', "attempt": 1, "time": 1}']  # fmt: skip
    path.write_bytes(b"\n".join([text(1, **{LOSS: 1.0}).encode().strip(), *damaged, b"", text(2).encode()]))
    curves = read_all(path)
    assert list(curves.steps) == [1, 2] and curves.damaged == len(damaged)
    assert sorted(read_metrics(path)) == [1, 2]


def test_values_that_are_no_numbers_are_gaps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    odd = ["null", "NaN", "Infinity", '"x"', "true", "1" + "0" * 400, "[1]"]
    lines = [f'{{"step": {step}, "attempt": 1, "time": 1, "a": {value}}}\n' for step, value in enumerate(odd, start=1)]
    path.write_text("".join(lines) + text(8, a=2, b=3) + text(8, c=4))
    curves = read_all(path)
    assert np.isnan(curves.column("a")[:7]).all() and curves.column("a")[7] == 2.0
    assert curves.names == ["a", "b", "c"] and curves.last("c") == 4.0  # a step of two lines
    assert np.isnan(curves.column("b")[:7]).all() and np.isnan(curves.column("none")).all()


def test_pace_and_time_leave_pauses_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(text(step) for step in range(1, 11)))  # a second each
    curves = read_all(path, {1: 0, 2: 10})
    assert curves.pace(100) is None  # of the second attempt
    path.open("a").write("".join(text(step, 2, time=1000.0 + 3 * step) for step in range(11, 41)))
    curves.read(path)
    assert curves.pace(100) == (3.0, 29) and curves.pace(5) == (3.0, 5)
    assert curves.seconds({1: 90.0, 2: 1000.0}) == (110.0 - 90.0) + (1120.0 - 1000.0)


def test_smoothing_is_the_mean_around_each_step() -> None:
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.integers(1, 9, 400)).astype(float)
    y = np.where(rng.random(400) < 0.2, np.nan, rng.normal(size=400))
    y[100:140] = np.nan
    window = 30.0
    for place, value in enumerate(smooth(x, y, window)):
        near = y[np.abs(x - x[place]) <= window / 2]
        near = near[np.isfinite(near)]
        assert (math.isnan(value) and not len(near)) or value == pytest.approx(near.mean())
    assert np.isnan(smooth(x, y, window)[115:125]).all()
    assert choose_window(np.arange(3.0)) is None and choose_window(np.arange(130_000.0)) == 3000


@pytest.mark.parametrize("lines", [MAX_COLUMNS_DRAWN + 1, 13_000, 130_000])
def test_thinning_keeps_every_spike(lines: int) -> None:
    rng = np.random.default_rng(1)
    x, y = np.arange(1.0, lines + 1), rng.normal(0.1, 0.01, lines)
    spikes = rng.choice(lines, 20, replace=False)
    y[spikes] = np.linspace(1, 3, 20)
    y[lines // 3] = np.nan
    axis = Axis(0.0, float(lines))
    thinned = thin(x, y, axis)
    assert len(thinned.x) <= MAX_COLUMNS_DRAWN and thinned.joined
    for place in spikes.tolist():
        column = int(np.argmin(np.abs(thinned.x - x[place])))
        assert thinned.high[max(0, column - 1) : column + 2].max() >= y[place]
    assert np.nanmax(thinned.high) == np.nanmax(y) and np.nanmin(thinned.low) == np.nanmin(y)
    known = np.isfinite(thinned.y)
    assert known.sum() >= len(known) - 1
    assert (thinned.low <= thinned.y)[known].all() and (thinned.y <= thinned.high)[known].all()
    few = thin(x[:MAX_COLUMNS_DRAWN], y[:MAX_COLUMNS_DRAWN], axis)
    assert not few.joined and np.array_equal(few.y, y[:MAX_COLUMNS_DRAWN], equal_nan=True)


def test_a_spike_beyond_the_axis_is_named_and_reaches_the_edge() -> None:
    x = np.arange(1.0, 5001.0)
    y = 0.1 + 0.01 * np.sin(x)
    y[2345] = 9.0
    chart = draw_chart("a", [Series("a", x, y)], Axis(0.0, 5000.0))
    assert "cut off: greatest 9 at step 2,346" in chart.note
    assert max(tick.at for tick in chart.y_ticks) <= 100 and float(chart.y_ticks[-1].text) < 0.2
    heights = [int(pair.split()[1]) for pair in chart.curves[0].band.strip("MZ").replace("ZM", "L").split("L")]
    assert min(heights) == 0  # the upper edge
    assert "cut off" not in draw_chart("a", [Series("a", x[:50], y[2300:2350])], Axis(0.0, 50.0)).note  # of few values


def test_gaps_break_the_line_and_lonely_values_are_dots() -> None:
    x = np.arange(100.0)
    y = np.ones(100)
    y[[10, 50, 52]] = np.nan
    (curve,) = draw_chart("a", [Series("a", x, y)], Axis(0.0, 99.0)).curves
    assert curve.line.count("M") == 3 and curve.dots.count("M") == 1 and "nan" not in curve.line
    data = draw_chart("a", [Series("a", x, y)], Axis(0.0, 99.0)).data
    assert json.loads(json.dumps(data, allow_nan=False))["series"][0]["y"][50] is None
    few = draw_chart("a", [Series("a", x[:3], y[:3])], Axis(0.0, 3.0))
    assert few.curves[0].dots.count("M") == 3 and len(few.y_ticks) >= 2
    assert draw_chart("a", [Series("a", x, y * np.nan)], Axis(0.0, 99.0)).curves == []


@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.08, 0.0801), (-3e5, 7e9), (0.0, 132_499.0), (1e-9, 3e-9)])
def test_ticks_are_round_and_within(ends: tuple[float, float]) -> None:
    ticks = linear_ticks(*ends)
    assert 2 <= len(ticks) <= 7 and all(ends[0] - 1e-12 <= tick <= ends[1] * (1 + 1e-9) for tick in ticks)
    assert all(float(f"{b - a:.1g}") == pytest.approx(b - a, rel=1e-6) for a, b in itertools.pairwise(ticks))


def test_axes() -> None:
    assert log_ticks(0.3, 70.0) == [0.5, 1, 2, 5, 10, 20, 50] or log_ticks(0.3, 70.0) == [1, 10]
    assert find_range(np.array([2.0, 2.0]), log=False, zero=False) == (1.8, 2.2)
    assert find_range(np.zeros(3), log=False, zero=True) == (0.0, 1.0)
    assert find_range(np.array([-1.0]), log=True, zero=False) == (1.0, 10.0)
    axis = Axis(100.0, 300.0, epochs=[(100.0, 1.0), (300.0, 2.0)])
    assert axis.place(200.0) == 0.5 and axis.epoch(150.0) == 1.25


def test_numbers_and_times_for_people() -> None:
    shown = [figure(value) for value in (0.0812345, 7.5e-6, 65536.0, 0.0, None, math.nan, 16_777_216.0, -2.5)]
    assert shown == ["0.08123", "7.5e-6", "65,536", "0", "-", "-", "16,777,216", "-2.5"]
    assert [short_figure(value) for value in (65_500.0, 1e7, 5000.0, 0.1)] == ["65.5k", "10M", "5,000", "0.1"]
    times = [describe_seconds(value) for value in (0.42, 9.96, 59.7, 60, 3599, 3600, 12_000, 187_200, 86_399)]
    assert times == ["0.4 s", "10.0 s", "1 min", "1 min", "59 min 59 s", "1 h", "3 h 20 min", "2 d 4 h", "1 d"]


@pytest.mark.parametrize("time", ["1e999", "1" + 400 * "0", "NaN", "true", '"now"', "-1"])
def test_a_damaged_time_is_a_damaged_line(tmp_path: Path, time: str) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [
        f'{{"step": {step}, "attempt": 0, "time": {value}, "train/loss": 1.0}}'
        for step, value in ((1, 5), (2, time), (3, 6))
    ]
    file.write_text("\n".join(lines) + "\n")
    assert list(read_metrics(file)) == [1, 3]
