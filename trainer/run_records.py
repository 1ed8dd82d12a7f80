"""What a run's records say of its work: hours and hardware, from run.json and metrics.jsonl."""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.metrics import read_metrics
from trainer.run_folder import read_run


@dataclass(frozen=True)
class Work:
    """What a run took, as far as it is recorded."""

    started_at: str | None = None  # ISO 8601, of the first attempt
    hours: float | None = None  # wall-clock
    hardware: tuple[str, ...] = ()  # such as "2 x NVIDIA A100-SXM4-80GB"; several where attempts differed


def read_work(run_folder: Path, step: int) -> Work:
    """The work behind ``step`` completed steps.

    Of each attempt only the time counts whose steps are part of the result: from its start to its last line that no
    later attempt made again. So lost steps do not count, and neither do pauses between attempts. Which lines those are
    is told by where the later attempts began: they may have written lines at other steps.
    """
    attempts = {entry["attempt"]: entry for entry in read_run(run_folder)["attempts"] if entry["first_step"] < step}
    last = {
        number: min([step, *(entry["first_step"] for later, entry in attempts.items() if later > number)])
        for number in attempts
    }
    metrics = run_folder / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.is_file() else {}
    ends: dict[int, float] = {}
    for line in lines.values():
        if line["step"] <= last.get(line["attempt"], -1):
            ends[line["attempt"]] = max(line["time"], ends.get(line["attempt"], 0.0))
    used = [attempts[number] for number in sorted(ends)]
    if not used:
        return Work()
    seconds = sum(ends[entry["attempt"]] - begin_of(entry) for entry in used)
    hardware = dict.fromkeys(f"{entry['processes']} x {entry['device']}" for entry in used)
    return Work(used[0]["started_at"], round(seconds / 3600, 3), tuple(hardware))


def begin_of(attempt: dict[str, Any]) -> float:
    """When an attempt began, in seconds since 1970."""
    return datetime.datetime.fromisoformat(attempt["started_at"]).timestamp()
