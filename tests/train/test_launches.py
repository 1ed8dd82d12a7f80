"""A launched process as a whole: a signal to its group, and an error in its loop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.launches import finish
from support.paths import REPOSITORY
from trainer.model.checkpoint import find_newest, read_train_state


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_and_stops(tiny_settings: list[str], tmp_path: Path, number: int) -> None:
    """Ctrl-C in a terminal and a job's end reach the loader's workers too; they must not die before the save."""
    words = [*tiny_settings, f"run.output_dir={tmp_path}", "run.name=run", "schedule.max_steps=500",
             "data.loader_threads=2"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "tests/support/launch_driver.py", *words], cwd=REPOSITORY, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, number)
    assert "the same command resumes there" in finish(process, 75)
    newest = find_newest(tmp_path / "run")
    assert newest is not None and 3 <= read_train_state(newest)["step"] < 500


def test_an_error_in_the_loop_ends_the_process_and_its_workers(tiny_settings: list[str], tmp_path: Path) -> None:
    """A process that waited for workers which ignore its signals would hold its GPU and its folder for ever."""
    script = """
import sys
from trainer.train import loop
from trainer.config.load import load_config

def fail(run, made, ending):
    raise RuntimeError("out of memory")

loop.save = fail
loop.train(load_config([], sys.argv[1:]))
"""
    words = [*tiny_settings, f"run.output_dir={tmp_path}", "run.name=run", "schedule.max_steps=50",
             "checkpoint.every_steps=2", "data.loader_threads=2"]  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=REPOSITORY, text=True, capture_output=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert process.returncode == 1 and "out of memory" in process.stderr
