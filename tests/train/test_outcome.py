"""How an attempt ended stands in run.json, whoever else changes it; whole runs are in tests/promises."""

import threading
from pathlib import Path

import pytest

from support.ranks import fork, wait_for
from support.run_on_disk import write_run
from support.watching import wait_until
from trainer.core.files import write_json
from trainer.model.run_records import read_run
from trainer.train import run
from trainer.train.outcome import note_outcome
from trainer.train.run import changing_run, note_saved


def save_slowly(folder: Path) -> None:
    """As the main process's saver does, which is in the middle of it when another rank fails."""
    with changing_run(folder):
        known = read_run(folder)
        (folder / "read").touch()
        wait_until(lambda: (folder / "failed").exists(), "the other rank's failure")
        *before, attempt = known["attempts"]
        write_json(folder / "run.json", {**known, "attempts": [*before, {**attempt, "saved_step": 7}]})


def test_a_rank_that_fails_while_another_notes_a_save_loses_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [])
    child = fork(lambda: save_slowly(folder))
    wait_until(lambda: (folder / "read").exists(), "the save")
    threading.Timer(0.3, (folder / "failed").touch).start()
    note_outcome(folder, "failed", "no disk", 7)
    wait_for([child])
    attempt = read_run(folder)["attempts"][-1]
    assert attempt["saved_step"] == 7 and attempt["outcome"]["why"] == "no disk"
    note_saved(folder, 8, 1.0)
    note_outcome(folder, "finished", None, 8)  # the first who knew counts
    attempt = read_run(folder)["attempts"][-1]
    assert attempt["saved_step"] == 8 and attempt["outcome"]["why"] == "no disk"


def test_who_cannot_have_the_lock_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped may hold it."""
    folder = write_run(tmp_path / "run", [])
    monkeypatch.setattr(run, "MOST_SECONDS", 0.1)

    def hold() -> None:
        with changing_run(folder):
            (folder / "held").touch()
            wait_until(lambda: (folder / "noted").exists(), "the other one")

    child = fork(hold)
    wait_until(lambda: (folder / "held").exists(), "the lock")
    note_outcome(folder, "failed", "no disk", 7)
    assert read_run(folder)["attempts"][-1]["outcome"]["why"] == "no disk"
    (folder / "noted").touch()
    wait_for([child])
