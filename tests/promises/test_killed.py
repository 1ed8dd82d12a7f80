"""P1. A run that is killed at any instant loses nothing that was saved, and the same command goes on bit by bit."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.fork_server import ForkServer
from support.watching import steps_logged, wait_until
from trainer.model.checkpoint import list_checkpoints, read_train_state, step_of, verify_checkpoint
from trainer.model.run_records import read_run

Count = Callable[[str, bool], None]
SAVES = ["checkpoint.every_steps=1", "checkpoint.keep_last=2", "data.loader_threads=1"]
STARTING, STEPPING = 2.0, 0.5  # seconds after its start, or after some steps, within which a run is killed
STEPS = 5  # at most, before it is killed


def kill_at_random(server: ForkServer, words: list[str], folder: Path, output: Path, rng: np.random.Generator) -> None:
    """Start a run and kill it: a third of them while they begin, the others while they train, save and prune."""
    before = steps_logged(folder)
    pid = server.start([*words, "run.name=killed", "schedule.max_steps=100000"], output)
    try:
        if rng.random() < 1 / 3:
            time.sleep(rng.uniform(0, STARTING))
        else:
            steps = int(rng.integers(2, STEPS + 1))
            wait_until(lambda: steps_logged(folder) >= before + steps, f"{steps} steps")
            time.sleep(rng.uniform(0, STEPPING))
    finally:
        os.kill(pid, signal.SIGKILL)
    assert server.wait(pid) == -signal.SIGKILL, output.read_text()


def check_whole(folder: Path) -> list[int]:
    """All that is called a checkpoint is one; their steps. What else a run writes down can be read too."""
    found = list_checkpoints(folder / "checkpoints")
    for path in found:
        verify_checkpoint(path)
    if folder.is_dir():
        read_run(folder)
    return [step_of(path) for path in found]


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.faults)])
def test_killed_at_any_instant(
    server: ForkServer, tiny_settings: list[str], tmp_path: Path, count_try: Count, kills: int
) -> None:
    words, rng = [*tiny_settings, *SAVES, f"run.output_dir={tmp_path}"], np.random.default_rng(kills)
    folder, output = tmp_path / "killed", tmp_path / "output"
    newest = 0
    for _ in range(kills):
        kill_at_random(server, words, folder, output, rng)
        steps = check_whole(folder)
        held = max(steps, default=0) >= newest and (not newest or len(steps) >= 1)
        count_try("SIGKILL at any instant: what was saved is there, and whole", held)
        assert held, (newest, steps)
        newest = max(steps, default=0)
    assert newest > 0
    for name in ("killed", "straight"):
        last = [*words, f"run.name={name}", f"schedule.max_steps={newest + 2}"]
        assert server.wait(server.start(last, output), 300.0) == 0, output.read_text()
    states = [
        read_train_state(tmp_path / f"{name}/checkpoints/step-{newest + 2:08d}") for name in ("killed", "straight")
    ]
    same = states[0]["files"] == states[1]["files"]
    count_try(f"the bits of a straight run after {kills} kills", same)
    assert same
    assert not [path for path in folder.rglob(".tmp-*") if path.is_dir()]
