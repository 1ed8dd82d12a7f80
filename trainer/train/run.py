"""A run's folder: ``output_dir/name`` with config.yaml, run.json, metrics.jsonl, samples, checkpoints, export.

And what it says: what its work took in hours and hardware.
"""

import datetime
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trainer.config.schema import Config
from trainer.core.files import write_json, write_text
from trainer.core.layout import CONFIG_FILE, METRICS_FILE, RUN_FILE, RUN_LOCK_FILE
from trainer.core.locks import hold_lock
from trainer.model.run_records import read_metrics, read_run


def run_path(config: Config) -> Path:
    """Where a run writes."""
    return Path(config.run.output_dir) / config.run.name


def lock_run(path: Path, is_main_process: bool) -> AbstractContextManager[None]:
    """Hold the folder for the main process of one run.

    Raises:
        UserError: when another process trains into it.
    """
    if not is_main_process:
        return nullcontext()
    path.mkdir(parents=True, exist_ok=True)
    busy = f"{path} is in use by another process; wait for it, or choose another run.name"
    return hold_lock(path / RUN_LOCK_FILE, busy)


def begin_attempt(config: Config, facts: dict[str, Any], tracker_run_id: str | None, **noted: Any) -> tuple[int, str]:
    """Write config.yaml and run.json for a run that is about to train; (attempt from 1, the trackers' run id).

    The config is written with its interpolations as the user wrote them, so that no secret gets into a file.
    ``tracker_run_id`` is the resumed checkpoint's; ``noted`` is what else is written down of the attempt: its
    first_step, last_step (of the whole run), processes, device and software. Only the main process calls this.
    """
    path = run_path(config)
    run = read_run(path)
    attempt = len(run["attempts"]) + 1
    entry = {
        "attempt": attempt,
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "working_folder": str(Path.cwd()),  # relative paths in the config begin there
        **noted,
    }
    run |= {"tracker_run_id": tracker_run_id or run["tracker_run_id"]}
    write_text(path / CONFIG_FILE, OmegaConf.to_yaml(config.written))
    write_json(path / RUN_FILE, {**run, **facts, "attempts": [*run["attempts"], entry]})
    return attempt, run["tracker_run_id"]


@dataclass(frozen=True)
class RunWork:
    """What a run took, as far as it is recorded."""

    started_at: str | None = None  # ISO 8601, of the first attempt
    hours: float | None = None  # wall-clock
    hardware: tuple[str, ...] = ()  # such as "2 x NVIDIA A100-SXM4-80GB"; several where attempts differed


def read_work(run_folder: Path, step: int) -> RunWork:
    """The work that ``step`` completed steps took.

    Of each attempt only the time counts whose steps are part of the result: from its start to its last line that no
    later attempt made again. So lost steps do not count, and neither do pauses between attempts. Which lines those are
    follows from where the later attempts began: they may have written lines at other steps.
    """
    attempts = {entry["attempt"]: entry for entry in read_run(run_folder)["attempts"] if entry["first_step"] < step}
    last = {
        number: min([step, *(entry["first_step"] for later, entry in attempts.items() if later > number)])
        for number in attempts
    }
    metrics = run_folder / METRICS_FILE
    lines = read_metrics(metrics) if metrics.is_file() else {}
    ends: dict[int, float] = {}
    for line in lines.values():
        if line["step"] <= last.get(line["attempt"], -1):
            ends[line["attempt"]] = max(line["time"], ends.get(line["attempt"], 0.0))
    used = [attempts[number] for number in sorted(ends)]
    if not used:
        return RunWork()
    begins = {entry["attempt"]: datetime.datetime.fromisoformat(entry["started_at"]) for entry in used}
    seconds = sum(ends[number] - begin.timestamp() for number, begin in begins.items())
    hardware = dict.fromkeys(f"{entry['processes']} x {entry['device']}" for entry in used)
    return RunWork(used[0]["started_at"], round(seconds / 3600, 3), tuple(hardware))


def locate_from_run(run_folder: Path | None, reference: str) -> str:
    """A path of a run's config as it is found from here: as it is written, else from the folder in which training ran.

    A hub id, and a path that lies in neither place, stay as they are.
    """
    given = Path(reference).expanduser()
    if run_folder is None or given.exists() or given.is_absolute():
        return reference
    ran_in = [entry["working_folder"] for entry in read_run(run_folder)["attempts"] if "working_folder" in entry]
    there = [Path(folder) / given for folder in reversed(ran_in)]
    return next((str(path) for path in there if path.exists()), reference)
