"""A run's page: how far it is, its curves, its samples by prompt, and what makes it what it is.

The training loop has it rewritten as the run goes on, so that nothing here may take long: what was read is kept.
"""

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainer.core.disk import format_bytes
from trainer.core.layout import CONFIG_FILE, METRICS_FILE, PAGE_FILE, RUN_FILE, SAMPLES_FOLDER, find_record
from trainer.model.checkpoint import find_newest, measure_checkpoint, step_of
from trainer.report.charts import Axis, Chart, Scale, Series, draw_chart
from trainer.report.config_values import Difference, find_differences, find_recipe, flatten_config
from trainer.report.curves import Curves, choose_window, smooth
from trainer.report.pages import describe_seconds, link_from, render
from trainer.report.sheets import Sheet, list_drawings, shelve, show_strips

RUN_GENERATOR = "anime-base-trainer train"
PACE_LINES = 100  # of metrics, from which the time left is estimated
EPOCH_POINTS = 40
MAX_MARKS = 30  # attempts that are drawn: more would hide the curves
LOSS, EPOCH, SAMPLES_SEEN = "train/loss", "progress/epoch", "progress/samples_seen"
RATE, MEMORY_GB, SKIPPED = "perf/images_per_second", "perf/memory_gb", "train/skipped_steps"
LOSS_NOTE = "mean since the line of metrics before"
CHARTS: dict[str, tuple[str, Scale, str]] = {  # metric -> title, scale, note
    "train/grad_norm": ("Gradient norm", "linear", "over all trained parts, before clipping"),
    "train/loss_scale": ("Loss scale", "log", ""),
    SKIPPED: ("Steps that loss scaling skipped", "zero", "all so far"),
    "data/substituted": ("Bad samples that were substituted", "zero", "all so far"),
    RATE: ("Images per second", "zero", "without checkpoints and samples"),
    MEMORY_GB: ("Memory", "zero", "GB: the GPU's peak, or what the process has on the CPU"),
    "perf/mfu": ("Model FLOPs utilisation", "zero", "share of the device's peak"),
    "perf/checkpoint_seconds": ("Checkpoints", "zero", "seconds each"),
    "perf/sample_seconds": ("Samples", "zero", "seconds each time"),
}
WITHOUT_VALUE = {  # metric -> what it is and why it has none
    "perf/mfu": "model FLOPs utilisation (the peak of this device in this precision is not known)",
    "perf/checkpoint_seconds": "how long a checkpoint takes (none is made yet)",
    "perf/sample_seconds": "how long samples take (none are drawn yet)",
    "train/loss_scale": "loss scale (there is one in fp16 only)",
    SKIPPED: "steps that loss scaling skipped (there are some in fp16 only)",
}
STATE_ON_PAGE = re.compile(r'data-state="(\w+)" data-made="(\d+)"')
UNDRAWN = {"train/loss_last", EPOCH, SAMPLES_SEEN}  # a part of the loss's mean, and axes


@dataclass(frozen=True)
class RunState:
    """How a run stands when its page is written."""

    kind: Literal["running", "finished", "stopped", "failed"]
    message: str = ""


@dataclass(frozen=True)
class RunView:
    """All that a page is made of."""

    page: Path
    written: dict[str, Any]  # the config, interpolations as the user wrote them
    records: dict[str, Any]  # run.json
    curves: Curves
    sheets: Sequence[Sheet]
    unreadable: Sequence[str]  # names of samples that are no images
    made: int  # steps
    last: int
    state: RunState
    written_at: float  # seconds since 1970
    warnings: Sequence[str]
    resume: str  # commands
    export: str
    onward: Sequence[str]  # what comes after an export; empty where the last checkpoint has none
    every_seconds: float  # after which the page of a running run is written anew
    shards: Path | None  # where the set lies, if that may be said


def render_run(view: RunView) -> str:
    """The page as HTML."""
    curves, values = view.curves, flatten_config(view.written)
    recipe, recipe_values = find_recipe(values)
    differences = find_differences([recipe_values, values])
    axis, window = step_axis(curves, attempts_of(view.records), view.made), choose_window(curves.x)
    charts = list_charts(curves, axis, window)
    drawings = list_drawings([view.sheets])
    report = view.shards / PAGE_FILE if view.shards else None
    return render(
        "run.html",
        view=view, values=values, generator=RUN_GENERATOR, axis=axis, window=window,
        recipe=recipe, deciding=pick_differences(differences, True), others=pick_differences(differences, False),
        charts=charts, facts=list_facts(view, window), left=describe_left(view),
        valueless=list_valueless(view, values),
        strips=show_strips(view.sheets, drawings),
        data={
            "charts": [chart.data for chart in charts],
            "shelves": [shelve(view.sheets, drawings, f"{SAMPLES_FOLDER}/")],
            "steps": [sheet.step for sheet in view.sheets],
        },
        attempts=attempts_of(view.records), checkpoint=describe_checkpoint(view.page.parent),
        files=[name for name in (METRICS_FILE, CONFIG_FILE, RUN_FILE) if (view.page.parent / name).is_file()],
        report=link_from(view.page, report) if report is not None and report.is_file() else None,
    )  # fmt: skip


def attempts_of(records: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The attempts of a run as it recorded them, each with the seconds since 1970 when it began."""
    return [
        {**entry, "began": datetime.datetime.fromisoformat(entry["started_at"]).timestamp()}
        for entry in records.get("attempts", [])
    ]


def first_steps(records: Mapping[str, Any]) -> dict[int, int]:
    """Attempt -> completed steps with which it began."""
    return {entry["attempt"]: entry["first_step"] for entry in records.get("attempts", [])}


def step_axis(curves: Curves, attempts: Sequence[Mapping[str, Any]], made: int) -> Axis:
    """All charts' horizontal axis: the steps of the run so far, its epochs, and where attempts began."""
    low = attempts[0]["first_step"] if attempts else 0
    high = max([low + 1, *(curves.steps[-1:] or [made])])
    begun = [entry for entry in attempts[1:] if low < entry["first_step"] <= high][-MAX_MARKS:]
    marks = [(float(entry["first_step"]), f"{entry['attempt']}") for entry in begun]
    return Axis(float(low), float(high), "step", list_epochs(curves, low), marks)


def list_epochs(curves: Curves, low: int) -> list[tuple[float, float]]:
    """Some steps with their epochs, between which the epoch grows evenly; a run begins with none made."""
    x, epochs = curves.x, curves.column(EPOCH)
    known = np.flatnonzero(np.isfinite(epochs))
    if not len(known):
        return []
    chosen = known[np.unique(np.linspace(0, len(known) - 1, EPOCH_POINTS).astype(np.int64))]
    begin = [(0.0, 0.0)] if low == 0 and x[chosen[0]] > 0 else []
    return [*begin, *((float(x[place]), round(float(epochs[place]), 4)) for place in chosen)]


def list_charts(curves: Curves, axis: Axis, window: float | None) -> list[Chart]:
    """What is drawn: loss and rates first, then what is known by name, then what others measured."""
    x, names = curves.x, curves.names
    charts = []
    if LOSS in names:
        loss = curves.column(LOSS)
        series = [Series("loss", x, loss, kind="raw" if window else "line")]
        if window:
            series.append(Series(f"mean over {window:,.0f} steps", x, smooth(x, loss, window)))
        charts.append(draw_chart("Loss", series, axis, note=LOSS_NOTE))
    rates = [name for name in names if name.startswith("lr/") and np.nanmax(curves.column(name)) > 0]
    if rates:
        series = [Series(name.removeprefix("lr/"), x, curves.column(name), place) for place, name in enumerate(rates)]
        charts.append(draw_chart("Learning rates", series, axis, "zero"))
    known = [name for name in CHARTS if name in names]
    own = [name for name in names if name not in CHARTS and name not in UNDRAWN | {LOSS} and name[:3] != "lr/"]
    for name in [*known, *own]:
        title, scale, note = CHARTS.get(name, (name, "linear", ""))
        charts.append(
            draw_chart(title, [Series(name.partition("/")[2] or name, x, curves.column(name))], axis, scale, note)
        )
    return charts


def list_facts(view: RunView, window: float | None) -> list[tuple[str, str]]:
    """The numbers at the top: value and what it is."""
    curves, attempts = view.curves, attempts_of(view.records)
    loss = curves.column(LOSS)
    if window and len(loss):
        loss = smooth(curves.x, loss, window)
    found = loss[np.isfinite(loss)]
    epoch, seen, speed = (curves.last(name) for name in (EPOCH, SAMPLES_SEEN, RATE))
    seconds = curves.seconds({entry["attempt"]: entry["began"] for entry in attempts})
    skipped, memory = curves.last(SKIPPED), curves.last(MEMORY_GB)
    facts = [
        (f"{found[-1]:.4f}", f"loss, mean over {window:,.0f} steps" if window else "loss")
        if len(found)
        else describe_first_loss(view),
        (f"{epoch:.2f}", "epochs") if epoch is not None else None,
        (f"{seen:,.0f}", "images seen") if seen is not None else None,
        (f"{speed:.4g}", "images per second") if speed is not None else None,
        (f"{memory:.1f} GB", "memory") if memory is not None else None,
        (f"{skipped:,.0f}", "steps skipped by loss scaling") if skipped is not None else None,
        (describe_seconds(seconds), "of training, pauses left out") if seconds else None,
        (f"{len(attempts)}", "attempts") if len(attempts) > 1 else None,
    ]
    return [fact for fact in facts if fact is not None]


def list_valueless(view: RunView, values: Mapping[str, Any]) -> list[str]:
    """Metrics without any value yet, in words.

    The last checkpoint and the last samples are made after the last line, and are no metric that is missing.
    """
    made = {
        "perf/checkpoint_seconds": find_newest(view.page.parent) is not None,
        "perf/sample_seconds": bool(view.sheets)
        or not values["sampling.every_steps"]
        or not values["sampling.prompts"],
    }
    names = [name for name in view.curves.columns if name not in view.curves.names and not made.get(name)]
    return [WITHOUT_VALUE.get(name, CHARTS[name][0].lower() if name in CHARTS else name) for name in names]


def describe_first_loss(view: RunView) -> tuple[str, str] | None:
    """When the loss comes, before a running run's first line of metrics."""
    every = flatten_config(view.written)["logging.every_steps"]
    if view.state.kind != "running" or not isinstance(every, int):
        return None
    return f"after step {min(view.last, every * (view.made // every + 1)):,}", "loss: first value, logging.every_steps"


def read_page_state(page: Path) -> tuple[str, int] | None:
    """The state and the steps made that a run's page says; None where there is no such page."""
    text = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    match = STATE_ON_PAGE.search(text)
    return (match[1], int(match[2])) if match and f'content="{RUN_GENERATOR}"' in text else None


def describe_left(view: RunView) -> str:
    """The time left and what it is estimated from."""
    if view.state.kind != "running":
        return ""
    pace = view.curves.pace(PACE_LINES)
    if pace is None:
        return "The time left is not known before this attempt has two lines of metrics."
    seconds, steps = pace
    left = describe_seconds(seconds * (view.last - view.made))
    return (
        f"About {left} left, at {describe_seconds(seconds)} a step: the pace of the last {steps:,} steps, with "
        "checkpoints and samples."
    )


def describe_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint: where, of which step, how large, when; None before the first."""
    newest = find_newest(folder)
    record = find_record(newest) if newest else None
    if newest is None or record is None:
        return None
    return {
        "link": link_from(folder / CONFIG_FILE, newest), "name": newest.name, "step": step_of(newest),
        "size": format_bytes(measure_checkpoint(newest)), "time": record.stat().st_mtime,
    }  # fmt: skip


def pick_differences(differences: Sequence[Difference], decides: bool) -> list[Difference]:
    """Those that decide what is trained, or the others."""
    return [difference for difference in differences if difference.decides == decides]
