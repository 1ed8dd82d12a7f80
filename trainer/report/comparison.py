"""Runs side by side: curves over each other, what their configs, data and code differ in, samples by prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.yaml_text import read_yaml
from trainer.core.console import format_table, log
from trainer.core.errors import UserError
from trainer.core.layout import CONFIG_FILE, METRICS_FILE, RUN_FILE, RUN_LOCK_FILE, RUN_PAGE_FILE, SAMPLES_FOLDER
from trainer.core.locks import is_held
from trainer.core.progress import format_count
from trainer.model.checkpoint import find_newest, step_of
from trainer.model.run_records import read_run
from trainer.report.charts import MAX_COLOURS, Axis, Chart, Series, draw_chart
from trainer.report.config_values import Values, find_differences, flatten_config
from trainer.report.curves import Curves, choose_window, smooth
from trainer.report.pages import describe_seconds, figure, link_from, render
from trainer.report.run_page import (
    CHARTS,
    EPOCH,
    LOSS,
    MEMORY_GB,
    RATE,
    SAMPLES_SEEN,
    SKIPPED,
    UNDRAWN,
    attempts_of,
    first_steps,
    read_page_state,
)
from trainer.report.sheets import Sheet, Sheets, list_drawings, shelve, show_strips

COMPARISON_GENERATOR = "anime-base-trainer compare_runs"
NOT_KNOWN = "-"
GONE = "ended without a word"  # killed, or its machine was
WHY_NONE = "-: no value: no line of metrics yet (one comes every logging.every_steps), or it was not measured"


@dataclass(frozen=True)
class ComparedRun:
    """What a run's folder holds."""

    folder: Path
    label: str  # its name, or its path where several have that name
    values: Values  # of its config
    records: dict[str, Any]
    curves: Curves
    sheets: list[Sheet]

    @property
    def made(self) -> int:
        """Steps, by what lies there: metrics come only every few steps, and the run's page oftener."""
        newest, page = find_newest(self.folder), read_page_state(self.folder / RUN_PAGE_FILE)
        return max([0, *self.curves.steps[-1:], *([step_of(newest)] if newest else []), *([page[1]] if page else [])])

    @property
    def last(self) -> int | None:
        """The step with which the run is to end; not recorded by version 0.2."""
        entries = reversed(attempts_of(self.records))
        return next((entry["last_step"] for entry in entries if "last_step" in entry), None)

    @property
    def state(self) -> str:
        """Whether it goes on, by its lock, or how it ended, by its page."""
        page = read_page_state(self.folder / RUN_PAGE_FILE)
        if is_held(self.folder / RUN_LOCK_FILE):
            return "running"
        if self.last is not None and self.made >= self.last:
            return "finished"
        if page is None or page[0] == "finished":
            return NOT_KNOWN if self.last is None else "not finished"
        return {"running": GONE}.get(page[0], page[0])

    @property
    def samples_seen(self) -> np.ndarray:
        """By line of metrics."""
        return self.curves.column(SAMPLES_SEEN)


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """The runs of some folders.

    Raises:
        UserError: for one run alone, the same twice, too many, or a folder that is no run with metrics.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"a run is named twice: {', '.join(map(str, folders))}")
    if not 2 <= len(folders) <= MAX_COLOURS:
        raise UserError(f"name 2 to {MAX_COLOURS} runs, not {len(folders)}")
    names = [folder.resolve().name for folder in folders]
    labels = [str(path) if names.count(name) > 1 else name for path, name in zip(folders, names, strict=True)]
    return [read_compared(folder, label) for folder, label in zip(folders, labels, strict=True)]


def read_compared(folder: Path, label: str) -> ComparedRun:
    """One run.

    Raises:
        UserError: naming what is missing or damaged.
    """
    for name in (RUN_FILE, CONFIG_FILE, METRICS_FILE):
        if not (folder / name).is_file():
            what = "has not trained yet" if (folder / RUN_FILE).is_file() else "is not the folder of a run"
            raise UserError(f"{folder} {what}: it has no {name}")
    values = flatten_config(read_yaml(folder / CONFIG_FILE))
    try:
        records = read_run(folder)
        curves = Curves(first_steps(records))
        attempts_of(records)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / RUN_FILE} is damaged: {error!r}") from error
    curves.read(folder / METRICS_FILE)
    if curves.damaged:
        log.info("note: %s of %s were passed over",
                 format_count(curves.damaged, "damaged line"), folder / METRICS_FILE)  # fmt: skip
    return ComparedRun(folder, label, values, records, curves, Sheets(folder).read(*expected_samples(values)))


def expected_samples(values: Values) -> tuple[list[str], tuple[int, int]]:
    """The prompts and the size of images that a config asks for; none where it does not say so outright."""
    prompts, side = values["sampling.prompts"], values["buckets.base_resolution"]
    width, height = values["sampling.width"] or side, values["sampling.height"] or side
    if not isinstance(prompts, list) or not isinstance(width, int) or not isinstance(height, int):
        return [], (0, 0)
    return prompts, (width, height)


def render_comparison(runs: Sequence[ComparedRun], page: Path) -> str:
    """The page as HTML; its links are relative to where it will lie."""
    window = max((choose_window(run.curves.x) or 0.0 for run in runs), default=0.0) or None
    by_steps = compare_curves(runs, window, by_samples=False)
    by_samples = compare_curves(runs, window, by_samples=True)
    sheets, figures = [run.sheets for run in runs], list_figures(runs, window)
    drawings = list_drawings(sheets)
    prefixes = [link_from(page, run.folder / SAMPLES_FOLDER) + "/" for run in runs]
    return render(
        "comparison.html",
        generator=COMPARISON_GENERATOR, runs=runs, labels=[run.label for run in runs], window=window,
        pages=[link_from(page, run.folder / RUN_PAGE_FILE) if (run.folder / RUN_PAGE_FILE).is_file() else None
               for run in runs],
        by_steps=by_steps, by_samples=by_samples, figures=figures, origins=list_origins(runs),
        why_none=WHY_NONE if any(NOT_KNOWN in values for values in figures.values()) else "",
        differences=find_differences([run.values for run in runs]), drawings=drawings, prefixes=prefixes,
        strips=[{strip.number: strip for strip in show_strips(own, drawings)} for own in sheets],
        data={
            "charts": [chart.data for chart in (*by_steps, *by_samples)],
            "shelves": [shelve(own, drawings, prefix) for own, prefix in zip(sheets, prefixes, strict=True)],
            "steps": sorted({sheet.step for own in sheets for sheet in own}),
        },
    )  # fmt: skip


def compare_curves(runs: Sequence[ComparedRun], window: float | None, by_samples: bool) -> list[Chart]:
    """Every metric of all runs over each other, over steps or over the samples that the weights had seen."""
    xs = [run.samples_seen if by_samples else run.curves.x for run in runs]
    known = [np.isfinite(x) for x in xs]
    ends = [float(x[at].max()) for x, at in zip(xs, known, strict=True) if at.any()]
    starts = [float(x[at].min()) for x, at in zip(xs, known, strict=True) if at.any()]
    if not ends:
        return []
    low = 0.0 if min(starts) < max(ends) / 4 else min(starts)  # forks may all begin late
    axis = Axis(low, max(*ends, low + 1), "sample" if by_samples else "step")
    charts = []
    for name in dict.fromkeys(name for run in runs for name in run.curves.names):
        if name in UNDRAWN or name[:3] == "lr/":
            continue
        title, scale, note = CHARTS.get(name, (name, "linear", ""))
        if name == LOSS:
            title, note = "Loss", f"mean over {window:,.0f} steps" if window else ""
        series = compare_metric(runs, name, xs, window if name == LOSS else None)
        charts.append(draw_chart(title, series, axis, scale, note))
    rates = dict.fromkeys(name for run in runs for name in run.curves.names if name[:3] == "lr/")
    for name in rates:
        if any(np.nanmax(run.curves.column(name), initial=0.0) > 0 for run in runs):
            title = f"Learning rate, {name.removeprefix('lr/')}"
            charts.append(draw_chart(title, compare_metric(runs, name, xs, None), axis, "zero"))
    return charts


def compare_metric(
    runs: Sequence[ComparedRun], name: str, xs: Sequence[np.ndarray], window: float | None
) -> list[Series]:
    """One metric of each run; smoothed over steps if a window is given."""
    series = []
    for place, (run, x) in enumerate(zip(runs, xs, strict=True)):
        y = run.curves.column(name)
        if window and len(y):
            y = smooth(run.curves.x, y, window)
        known = np.isfinite(x)
        series.append(Series(run.label, x[known], y[known], place))
    return series


def list_figures(runs: Sequence[ComparedRun], window: float | None) -> dict[str, list[str]]:
    """What came out, name -> a value for each run."""
    rows: dict[str, list[str]] = {}
    for run in runs:
        curves, attempts = run.curves, attempts_of(run.records)
        loss = curves.column(LOSS)
        if window and len(loss):
            loss = smooth(curves.x, loss, window)
        finite, memory = loss[np.isfinite(loss)], curves.column(MEMORY_GB)
        speed, seconds = curves.column(RATE), curves.seconds({entry["attempt"]: entry["began"] for entry in attempts})
        values = {
            "state": run.state,
            "steps": f"{run.made:,}"
            + (f" of {run.last:,}" if run.last is not None else "")
            + (", last known" if run.state in ("running", GONE) else ""),
            "epochs": figure(curves.last(EPOCH)),
            "samples seen": NOT_KNOWN if (seen := curves.last(SAMPLES_SEEN)) is None else f"{seen:,.0f}",
            f"loss at the end{f', mean over {window:,.0f} steps' if window else ''}": last_of(finite),
            "lowest loss, likewise": figure(float(finite.min())) if len(finite) else NOT_KNOWN,
            "gradient norm, median": median_of(curves.column("train/grad_norm")),
            "skipped by loss scaling": NOT_KNOWN if (skipped := curves.last(SKIPPED)) is None else f"{skipped:,.0f}",
            "images per second, median": median_of(speed),
            "memory, most": f"{np.nanmax(memory):.1f} GB" if np.isfinite(memory).any() else NOT_KNOWN,
            "training time": describe_seconds(seconds) if seconds else NOT_KNOWN,
            "attempts": f"{len(attempts):,}",
        }
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
    return rows


def last_of(values: np.ndarray) -> str:
    """The newest of finite values."""
    return figure(float(values[-1])) if len(values) else NOT_KNOWN


def median_of(values: np.ndarray) -> str:
    """The median of the finite values."""
    return figure(float(np.nanmedian(values))) if np.isfinite(values).any() else NOT_KNOWN


def list_origins(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """From what each run was made: name -> a value for each."""
    rows: dict[str, list[str]] = {}
    for run in runs:
        base = run.records.get("base")
        base = base if isinstance(base, dict) else {}
        newest = (attempts_of(run.records) or [{}])[-1]
        code = newest.get("code") or {}
        commit = f", commit {code['commit'][:12]}" if code.get("commit") else ""
        values = {
            "images": run.records.get("images"),
            "index fingerprint": run.records.get("index_fingerprint"),
            "base": base.get("reference"),
            "base's commit": base.get("revision"),
            "base's SHA-256": base.get("sha256"),
            "VAE SHA-256": run.records.get("vae_sha256"),
            "tokenizers SHA-256": run.records.get("tokenizers_sha256"),
            "code": f"{code.get('version', '')}{commit}{', with changes' if code.get('dirty') else ''}" or None,
            "hardware": f"{newest['processes']} x {newest['device']}" if "device" in newest else None,
        }
        for name, value in values.items():
            shown = f"{value:,}" if isinstance(value, int) else value
            rows.setdefault(name, []).append(NOT_KNOWN if shown is None else str(shown))
    return {name: shown for name, shown in rows.items() if set(shown) != {NOT_KNOWN}}


def summarise_runs(runs: Sequence[ComparedRun]) -> str:
    """The short table for the terminal: final figures, and in what the runs differ."""
    window = max((choose_window(run.curves.x) or 0.0 for run in runs), default=0.0) or None
    rows = {"": [run.label for run in runs], **list_figures(runs, window)}
    rows |= {name: values for name, values in list_origins(runs).items() if len(set(values)) > 1}
    differences = find_differences([run.values for run in runs])
    rows |= {one.key: one.values for one in differences if one.decides}
    table = format_table([(name, *map(shorten_cell, values)) for name, values in rows.items()], right=True)
    rest = sum(not one.decides for one in differences)
    more = [WHY_NONE] if any(NOT_KNOWN in values for values in rows.values()) else []
    return "\n".join([table, *more, *([f"{rest} other settings differ, see the page"] if rest else [])])


def shorten_cell(value: str, most: int = 32) -> str:
    """A value in the terminal's table."""
    line = "".join(letter if letter.isprintable() else " " for letter in value)
    return line if len(line) <= most else line[: most - 3] + "..."
