"""P2. A run that is killed and resumed has the bits of one that was never stopped: on 1, 2 and 3 processes.

Real launches with torchrun and gloo, across the border of an epoch; tests/train/test_resume.py has one and two threads.
"""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from support.fork_server import ForkServer, start_together
from support.launches import LENGTH, STAGES, finish, kill_after, launch
from support.metrics import read_metrics
from support.watching import outcome_of, wait_until
from trainer.model.checkpoint import find_newest, read_train_state


def hashes(folder: Path) -> dict[int, dict[str, Any]]:
    states = [read_train_state(path) for path in sorted((folder / "checkpoints").glob("step-*"))]
    return {state["step"]: state["files"] for state in states}


def check_launches(settings: list[str], runs: Path, stages: list[str], processes: int) -> dict[str, list[float]]:
    """Straight runs of the stages, then each killed twice and resumed; returns the losses by stage."""
    for stage in stages:
        words = [*settings, f"run.output_dir={runs}", *LENGTH, *STAGES[stage]]
        finish(launch(processes, [*words, f"run.name=straight{stage}"]))
        folder = runs / f"killed{stage}"
        run = [*words, f"run.name=killed{stage}"]
        for step in (2, 6):
            kill_after(launch(processes, run), folder, step)
            assert outcome_of(folder) is None  # no rank came to save and stop in order
        assert read_train_state(folder / "checkpoints" / "step-00000006")["epoch"] == 2
        finish(launch(processes, run))
        assert hashes(folder) == hashes(runs / f"straight{stage}"), f"stage {stage}, {processes} processes"
        newest = find_newest(folder)
        assert newest is not None and read_train_state(newest)["num_processes"] == processes
    return {
        stage: [line["train/loss"] for _, line in sorted(read_metrics(runs / f"straight{stage}/metrics.jsonl").items())]
        for stage in stages
    }


def test_two_processes_killed_and_resumed(server: ForkServer, tiny_settings: list[str], tmp_path: Path) -> None:
    def go(name: str) -> list[int]:
        return start_together(server, [*tiny_settings, f"run.output_dir={tmp_path}", *LENGTH, *STAGES["2"],
                                       f"run.name={name}"], tmp_path)  # fmt: skip

    assert [server.wait(pid) for pid in go("straight")] == [0, 0]
    pids, folder = go("killed"), tmp_path / "killed"
    wait_until(lambda: (folder / "checkpoints" / "step-00000006").exists(), "the second epoch")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert [server.wait(pid) for pid in pids] == [-signal.SIGKILL] * 2 and outcome_of(folder) is None
    assert [server.wait(pid) for pid in go("killed")] == [0, 0]
    assert hashes(folder) == hashes(tmp_path / "straight") and len(hashes(folder)) == 8


@pytest.mark.faults
def test_one_two_and_three_processes_killed_twice_in_all_stages(tiny_settings: list[str], tmp_path: Path) -> None:
    losses = {n: check_launches(tiny_settings, tmp_path / str(n), list(STAGES), n) for n in (1, 2, 3)}
    # the same samples come in the same steps: the first losses agree to rounding, later ones drift apart with it
    for stage in STAGES:
        for number in (2, 3):
            assert losses[number][stage][0] == pytest.approx(losses[1][stage][0], rel=1e-5)
            assert losses[number][stage] == pytest.approx(losses[1][stage], rel=2e-2)
