"""What a run writes down of itself, read again: run.json, and metrics.jsonl, of which damaged lines are passed over."""

import datetime
import json
import secrets
from pathlib import Path
from typing import Any

from trainer.core.errors import UserError
from trainer.core.layout import RUN_FILE, RUN_NAME

TAIL = 1 << 16  # bytes at the end of a log
MAX_COUNT = 2**53  # up to here a float holds every whole number


def read_run(path: Path) -> dict[str, Any]:
    """run.json, or the beginning of one.

    Raises:
        UserError: where it is damaged.
    """
    file = path / RUN_FILE
    begun = {"attempts": [], "tracker_run_id": secrets.token_hex(6)}
    if not file.exists():
        return begun
    try:
        run = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: it cannot be read ({error})") from error
    if not isinstance(run, dict) or not isinstance(run.get("attempts", []), list):
        raise UserError(f"{file} is damaged: it is not what a run writes down")
    if not all(map(is_attempt, run.get("attempts", []))):
        raise UserError(f"{file} is damaged: an entry of its attempts is not what a run writes down")
    return begun | run


def is_attempt(entry: Any) -> bool:
    """Whether an entry of run.json has what all attempts have."""
    if not isinstance(entry, dict) or not is_count(entry.get("attempt")) or not is_count(entry.get("first_step")):
        return False
    try:
        datetime.datetime.fromisoformat(entry.get("started_at", "2000-01-01"))
    except (ValueError, TypeError):
        return False
    return True


def last_attempt(metrics: Path) -> int:
    """The attempt that wrote the end of a log; 0 where there is none, or nothing of it can be read."""
    if not metrics.is_file():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL))
        found = [line["attempt"] for text in file if (line := parse_metrics(text)) is not None]
    return max(found, default=0)


def parse_metrics(text: str | bytes) -> dict[str, Any] | None:
    """One line of metrics.jsonl, which has at least a step, an attempt and a time; None where it is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    whole = is_count(line.get("step")) and is_count(line.get("attempt"))
    return line if whole and is_time(line.get("time")) else None


def is_time(value: Any) -> bool:
    """Whether a value can be seconds since 1970."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MAX_COUNT


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 on, and none that only a damaged line can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_COUNT


def is_run_name(value: Any) -> bool:
    """Whether a value of a record can name a run, and so a file."""
    return isinstance(value, str) and RUN_NAME.fullmatch(value) is not None


def is_config(value: Any) -> bool:
    """Whether a value of a record is a config as it was written."""
    return isinstance(value, dict) and all(isinstance(section, dict) for section in value.values())


def is_base(value: Any) -> bool:
    """Whether a value of a record says which base it was."""
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("reference", "sha256"))
