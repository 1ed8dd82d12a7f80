"""A run's folder: ``output_dir/name`` with config.yaml, run.json, metrics.jsonl, samples, checkpoints, export."""

import datetime
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trainer.config.schema import Config
from trainer.core.console import log
from trainer.core.disk import bearing_disk
from trainer.core.errors import UserError
from trainer.core.files import set_aside, write_json, write_text
from trainer.core.layout import CONFIG_FILE, METRICS_FILE, RUN_CHANGE_FILE, RUN_FILE, RUN_LOCK_FILE
from trainer.core.locks import hold_lock, take_turns
from trainer.model.run_records import last_attempt, read_run

MOST_SECONDS = 5.0  # that a change of run.json waits for another one


def run_path(config: Config) -> Path:
    """Where a run writes."""
    return Path(config.run.output_dir) / config.run.name


def is_due(made: int, every: int | None, last: int) -> bool:
    """Whether what a run does every so many steps, and after its last, is done after ``made`` of them."""
    return every is not None and (made % every == 0 or made == last)


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


@dataclass(frozen=True)
class Attempt:
    """A start of a run: the first one, or one that goes on from a checkpoint."""

    number: int  # from 1
    tracker_run_id: str
    started_at: str  # ISO 8601


def begin_attempt(
    config: Config, facts: dict[str, Any], tracker_run_id: str | None, after: int, **noted: Any
) -> Attempt:
    """Write config.yaml and run.json for a run that is about to train.

    The config is written with its interpolations as the user wrote them, so that no secret gets into a file.
    ``tracker_run_id`` is the resumed checkpoint's, ``after`` the attempt that made it; ``noted`` is what else is
    written down of the attempt: its first_step, last_step (of the whole run), processes, device and software. Only the
    main process calls this. A run.json that is damaged is set aside.
    """
    path = run_path(config)
    run = read_or_begin(path)
    before = [entry["attempt"] for entry in run["attempts"]] + [after]
    if not run["attempts"]:  # its lines count as an older attempt's
        before.append(last_attempt(path / METRICS_FILE))
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    tracker_run_id = tracker_run_id or run["tracker_run_id"]
    attempt = Attempt(max(before) + 1, tracker_run_id, started_at)
    entry = {
        "attempt": attempt.number,
        "started_at": started_at,
        "working_folder": str(Path.cwd()),  # relative paths in the config begin there
        **noted,
    }
    run |= {"tracker_run_id": tracker_run_id}
    write_text(path / CONFIG_FILE, OmegaConf.to_yaml(config.written))
    write_json(path / RUN_FILE, {**run, **facts, "attempts": [*run["attempts"], entry]})
    return attempt


def read_or_begin(path: Path) -> dict[str, Any]:
    """run.json; where it is damaged, the beginning of one, and the old one is set aside."""
    try:
        return read_run(path)
    except UserError as error:
        aside = set_aside(path / RUN_FILE, "damaged")
        log.warning("warning: %s. It lies in %s now, and a new one is begun; nothing of the training depends on it",
                    error, aside)  # fmt: skip
        return read_run(path)


def changing_run(path: Path) -> AbstractContextManager[None]:
    """Around a change of run.json, which a thread that saves and any rank that fails may make at the same time.

    Who has waited long goes on: it explains a run, and nothing depends on it.
    """
    return take_turns(path / RUN_CHANGE_FILE, MOST_SECONDS)


def note_saved(path: Path, step: int, seconds: float) -> None:
    """Write down of the last attempt which step it saved last, and how long it took until then."""
    with bearing_disk("run.json lacks the step, training goes on"), changing_run(path):
        run = read_or_begin(path)
        if run["attempts"]:
            *before, attempt = run["attempts"]
            saved = {**attempt, "saved_step": step, "seconds": round(seconds, 3)}
            write_json(path / RUN_FILE, {**run, "attempts": [*before, saved]})


def locate_from_run(run_folder: Path | None, reference: str) -> str:
    """A path of a run's config as it is found from here: as it is written, else from the folder in which training ran.

    A hub id, and a path that lies in neither place, stay as they are.
    """
    given = Path(reference).expanduser()
    if run_folder is None or given.exists() or given.is_absolute():
        return reference
    try:
        attempts = read_run(run_folder)["attempts"]
    except UserError as error:
        log.warning("warning: %s: where the run trained is not known", error)
        return reference
    ran_in = [entry["working_folder"] for entry in attempts if "working_folder" in entry]
    there = [Path(folder) / given for folder in reversed(ran_in)]
    return next((str(path) for path in there if path.exists()), reference)
