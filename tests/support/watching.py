"""Watching a run from outside, by what it writes."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wait_until(seen: Callable[[], object], what: str, seconds: float = 120.0) -> None:
    """Look until something is there."""
    deadline = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < deadline, f"not seen in {seconds} s: {what}"
        time.sleep(0.02)


def steps_logged(folder: Path) -> int:
    """Lines of a run's metrics."""
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def outcome_of(folder: Path) -> dict[str, Any] | None:
    """How the last attempt ended, by run.json."""
    return json.loads((folder / "run.json").read_text())["attempts"][-1].get("outcome")
