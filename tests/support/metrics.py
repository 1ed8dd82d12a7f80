"""What a log says of each step."""

from pathlib import Path
from typing import Any

from trainer.model.run_records import parse_metrics


def read_metrics(path: Path) -> dict[int, dict[str, Any]]:
    """Step -> its metrics of the last attempt, from one line or several."""
    lines: dict[int, dict[str, Any]] = {}
    for line in filter(None, map(parse_metrics, path.read_bytes().splitlines())):
        before = lines.get(line["step"], line)
        if line["attempt"] >= before["attempt"]:
            lines[line["step"]] = before | line if line["attempt"] == before["attempt"] else line
    return lines
