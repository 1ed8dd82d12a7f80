"""P8. A rank that hangs, is stopped or dies ends the whole job soon, and the black box says which one it was.

Not promised: that a rank ends which the system itself cannot end, as in a read of a dead network file system; that
a process alone sees a hang within which Python's lock is held.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.fork_server import ForkServer, start_together
from support.paths import REPOSITORY
from support.watching import outcome_of, steps_logged, wait_until

Count = Callable[[str, bool], None]
TIMEOUT = 6
LONG = ["run.name=run", "schedule.max_steps=5000", "checkpoint.every_steps=5000", f"run.step_timeout={TIMEOUT}s",
        "data.loader_threads=1"]  # fmt: skip


@pytest.fixture
def words(tiny_settings: list[str], tmp_path: Path) -> list[str]:
    return [*tiny_settings, f"run.output_dir={tmp_path}", *LONG]


def box_of(folder: Path) -> Path:
    return folder / "black_box" / "attempt-0001"


def check_hang(folder: Path, rank: int) -> dict[str, Any]:
    """What is written names the rank that is missing, in the black box and in run.json."""
    found = json.loads((box_of(folder) / "hang.json").read_text())
    outcome = outcome_of(folder)
    assert f"rank {rank} (process " in found["said"] and f"rank {1 - rank} (" not in found["said"], found["said"]
    assert outcome is not None and (outcome["state"], outcome["why"]) == ("failed", found["said"])
    own = found["ranks"][1 - rank]
    assert own["step"] >= 3 and own["keys"] and own["at"] and own["seconds"] >= TIMEOUT - 2
    stacks = (box_of(folder) / f"rank-{1 - rank:05d}.stacks.txt").read_text()
    assert "thread MainThread" in stacks and "loop.py" in stacks and "thread loader" in stacks
    return found


def test_a_rank_that_sleeps_is_named(server: ForkServer, words: list[str], tmp_path: Path, count_try: Count) -> None:
    folder = tmp_path / "run"
    pids = start_together(server, words, tmp_path, {1: ["sleep_in_step", 8]})
    wait_until(lambda: steps_logged(folder) >= 3, "three steps")
    begun = time.monotonic()
    codes = [server.wait(pid, TIMEOUT + 60) for pid in pids]
    held = codes == [1, 1] and time.monotonic() - begun < TIMEOUT + 60
    count_try("a rank that sleeps: both end within a minute of the timeout", held)
    assert held, (tmp_path / "output-0").read_text()
    found = check_hang(folder, 1)
    assert "did not arrive: it is at" in found["said"] and "forward" in found["ranks"][1]["at"]
    assert "compute_or_sleep" in (box_of(folder) / "rank-00001.stacks.txt").read_text()
    assert "the same command resumes" in (tmp_path / "output-0").read_text()
    assert "did not arrive: it is at" in (folder / "index.html").read_text()  # and not "running" for good


def test_a_rank_that_dies_is_named(server: ForkServer, words: list[str], tmp_path: Path, count_try: Count) -> None:
    folder = tmp_path / "run"
    pids = start_together(server, words, tmp_path, {})
    wait_until(lambda: steps_logged(folder) >= 3, "three steps")
    os.kill(pids[1], signal.SIGKILL)
    begun = time.monotonic()
    codes = [server.wait(pid, TIMEOUT + 60) for pid in pids]
    held = codes[0] in (1, 2) and time.monotonic() - begun < TIMEOUT + 60
    count_try("a rank that is killed: the other ends within a minute of the timeout", held)
    assert held, (tmp_path / "output-0").read_text()
    end = json.loads((box_of(folder) / "rank-00000.end.json").read_text())
    assert [peer["rank"] for peer in end["gone"]] == [1] and end["gone"][0]["pid"] == pids[1]
    assert f"rank 1 (process {pids[1]} on " in (tmp_path / "output-0").read_text()
    assert f"process {pids[1]}" in outcome_of(folder)["why"]  # type: ignore[index]


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_is_named_and_killed(
    server: ForkServer, words: list[str], tmp_path: Path, rank: int, count_try: Count
) -> None:
    """Without a launcher; where rank 0 is stopped, nobody answers at the store either."""
    folder = tmp_path / "run"
    pids = start_together(server, words, tmp_path, {})
    wait_until(lambda: steps_logged(folder) >= 4, "four steps")
    os.kill(pids[rank], signal.SIGSTOP)
    begun = time.monotonic()
    codes = [server.wait(pid, TIMEOUT + 60) for pid in (pids[1 - rank], pids[rank])]
    held = codes == [1, -signal.SIGKILL] and time.monotonic() - begun < TIMEOUT + 60
    count_try("a rank that is stopped: both end within a minute of the timeout", held)
    assert held, (tmp_path / f"output-{1 - rank}").read_text()
    assert "does not answer" in check_hang(folder, rank)["said"]


@pytest.mark.faults
def test_a_process_alone_that_hangs_ends(
    server: ForkServer, words: list[str], tmp_path: Path, count_try: Count
) -> None:
    """Data that never come: what waits is in the stacks."""
    folder, output = tmp_path / "run", tmp_path / "output"
    pid = server.start(words, output, fault=["stall_data", 21])
    code = server.wait(pid, 120)
    held = code == 1 and "it is at the wait for its batches" in output.read_text()
    count_try("a process that waits for data ends", held)
    assert held, output.read_text()
    assert "read_or_stall" in (box_of(folder) / "rank-00000.stacks.txt").read_text()
    assert outcome_of(folder)["state"] == "failed"  # type: ignore[index]


@pytest.mark.faults
def test_a_run_that_was_paused_goes_on(server: ForkServer, words: list[str], tmp_path: Path, count_try: Count) -> None:
    """Ctrl-Z and fg: for longer than the timeout all of it stood still, and nothing hangs."""
    folder = tmp_path / "run"
    pids = start_together(server, [*words, "schedule.max_steps=40"], tmp_path, {})
    wait_until(lambda: steps_logged(folder) >= 4, "four steps")
    for sent in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, sent)
        if sent == signal.SIGSTOP:
            time.sleep(3 * TIMEOUT)
    codes = [server.wait(pid) for pid in pids]
    count_try("a run that was paused as a whole goes on", codes == [0, 0])
    assert codes == [0, 0], (tmp_path / "output-0").read_text()


# --- under torchrun, which waits for ranks that cannot end: 600 seconds, as the documentation advises


def launch(words: list[str], output: Path, **environment: str) -> subprocess.Popen[bytes]:
    shared = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    shared |= {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
    with output.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
             "tests/support/launch_driver.py", *words],
            cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=shared,
        )  # fmt: skip


def pid_of(launcher: int, rank: int) -> int:
    """The process of a rank, by its environment."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"no rank {rank}")


@pytest.mark.faults
@pytest.mark.parametrize("sent", ["SIGSTOP", "SIGKILL"])
@pytest.mark.parametrize("rank", [0, 1])
def test_under_torchrun_both_end(
    tiny_settings: list[str], tmp_path: Path, sent: str, rank: int, count_try: Count
) -> None:
    folder, output = tmp_path / "run", tmp_path / "output"
    process = launch([*tiny_settings, f"run.output_dir={tmp_path}", *LONG], output)
    wait_until(lambda: steps_logged(folder) >= 4, "four steps")
    pids = [pid_of(process.pid, 0), pid_of(process.pid, 1)]
    os.kill(pids[rank], getattr(signal, sent))
    begun = time.monotonic()
    code = process.wait(TIMEOUT + 90)
    took = time.monotonic() - begun
    held = code == 1 and took < TIMEOUT + 60 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    count_try(f"{sent} of a rank under torchrun: both end within a minute of the timeout", held)
    assert held, (took, output.read_text())
    if sent == "SIGSTOP":
        check_hang(folder, rank)
    else:
        end = json.loads((box_of(folder) / f"rank-{1 - rank:05d}.end.json").read_text())
        assert [peer["rank"] for peer in end["gone"]] == [rank]
