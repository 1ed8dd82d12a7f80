"""The benchmark of both stages at full size still runs: here with the tiny model, and beside a run without a kill."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import REPOSITORY


@pytest.mark.slow
def test_both_stages_are_killed_resumed_and_exported(tiny_base: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "benchmarks/full_size.py",
        "--tiny",
        "--base",
        str(tiny_base),
        "--work",
        str(tmp_path / "work"),
    ]
    done = subprocess.run(
        words, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 9
    assert sum("as before the kill" in row for row in rows) == 2 and sum("; whole" in row for row in rows) == 2
    assert sum("the bytes of the resumed run's" in row for row in rows) == 1
