"""How an attempt ended: it stands in run.json, with step and time. An attempt without an outcome was killed."""

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.config.environment import hide_environment
from trainer.core.console import log
from trainer.core.errors import UserError
from trainer.core.files import write_json
from trainer.core.layout import RUN_FILE
from trainer.model.run_records import read_run
from trainer.train.run import changing_run
from trainer.train.stops import Stops


@contextmanager
def noting_outcome(
    folder: Path, *, is_main: bool, last: int, written: dict[str, Any], stops: Stops, made: Callable[[], int]
) -> Iterator[None]:
    """Around the steps: how they end is noted by the main process, and an error by the first rank that has one."""
    try:
        yield
    except BaseException as error:
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else describe_error(error)
        note_outcome(folder, "failed", hide_environment(why, written), made())
        raise
    if is_main:
        state = "finished" if made() >= last else "stopped"
        note_outcome(folder, state, None if state == "finished" else stops.reason, made())


def describe_error(error: BaseException) -> str:
    """A user's problem is its message; any other error has its kind before it."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".removesuffix(": ")


def note_outcome(folder: Path, state: str, why: str | None, step: int) -> None:
    """Write the outcome of the last attempt, unless it has one: of several ranks that fail the first knows why."""
    try:
        ended_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        outcome = {"state": state, "why": why, "step": step, "ended_at": ended_at}
        with changing_run(folder):
            run = read_run(folder)
            if not run["attempts"] or "outcome" in run["attempts"][-1]:
                return
            *before, attempt = run["attempts"]
            write_json(folder / RUN_FILE, {**run, "attempts": [*before, {**attempt, "outcome": outcome}]})
    except Exception as error:  # it explains an end, and must not change one
        log.warning("warning: how this attempt ended is not written to %s: %r", folder / RUN_FILE, error)
