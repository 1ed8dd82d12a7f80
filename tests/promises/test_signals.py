"""P6. A signal, a time limit or a lost launcher: the run saves, stops, says why, and the same command resumes it."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.fork_server import ForkServer
from support.paths import REPOSITORY
from support.watching import outcome_of, steps_logged, wait_until
from trainer.model.checkpoint import find_newest, step_of

Count = Callable[[str, bool], None]
# one of each kind is quick enough for make test
NAMES = ["SIGTERM", *(pytest.param(name, marks=pytest.mark.faults) for name in ("SIGINT", "SIGUSR1", "SIGHUP"))]
LONG = ["run.name=run", "schedule.max_steps=5000", "checkpoint.every_steps=5000", "data.loader_threads=1"]
SAMPLES = ["sampling.every_steps=2", "sampling.prompts=[a cat]", "sampling.num_inference_steps=1000",
           "sampling.width=64", "sampling.height=64"]  # fmt: skip


@pytest.fixture
def words(tiny_settings: list[str], tmp_path: Path) -> list[str]:
    return [*tiny_settings, f"run.output_dir={tmp_path}", *LONG]


def saved_step(folder: Path) -> int:
    newest = find_newest(folder)
    return step_of(newest) if newest is not None else 0


def check_stopped(folder: Path, code: int, why: str, output: Path) -> None:
    """The exit code, the outcome and the checkpoint agree."""
    outcome, said = outcome_of(folder), output.read_text()
    assert code == 75, said
    assert outcome is not None and outcome["state"] == "stopped" and outcome["why"].startswith(why), said
    assert outcome["step"] == saved_step(folder) > 0 and "the same command resumes there" in said
    assert not list(folder.glob("checkpoints/.tmp-*"))


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_between_steps(
    server: ForkServer, words: list[str], tmp_path: Path, name: str, count_try: Count
) -> None:
    folder, output = tmp_path / "run", tmp_path / "output"
    pid = server.start(words, output)
    wait_until(lambda: steps_logged(folder) >= 3, "three steps")
    os.kill(pid, getattr(signal, name))
    check_stopped(folder, server.wait(pid), name, output)
    count_try(f"{name} between steps", True)
    first = saved_step(folder)
    again = [*words, f"schedule.max_steps={first + 1}"]
    assert server.wait(server.start(again, output)) == 0, output.read_text()
    assert saved_step(folder) == first + 1 and outcome_of(folder)["state"] == "finished"  # type: ignore[index]


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_during_samples(
    server: ForkServer, words: list[str], tmp_path: Path, name: str, count_try: Count
) -> None:
    """A thousand denoising steps are not waited for; the same command draws the picture first of all."""
    folder, output, drawing = tmp_path / "run", tmp_path / "output", tmp_path / "drawing"
    pid = server.start([*words, *SAMPLES], output, fault=["note_samples", str(drawing)])
    wait_until(drawing.exists, "samples that are drawn")
    os.kill(pid, getattr(signal, name))
    check_stopped(folder, server.wait(pid), name, output)
    assert outcome_of(folder)["step"] == 2 and not list(folder.glob("samples/*.png"))  # type: ignore[index]
    count_try(f"{name} during samples", True)
    again = [*words, *SAMPLES, "sampling.num_inference_steps=2", "schedule.max_steps=3"]
    assert server.wait(server.start(again, output)) == 0, output.read_text()
    assert [path.name for path in sorted(folder.glob("samples/*.png"))] == ["step-00000002.png", "step-00000003.png"]


@pytest.mark.parametrize("threads", [1, pytest.param(3, marks=pytest.mark.faults)])
@pytest.mark.parametrize("name", NAMES)
def test_a_signal_while_data_do_not_come(
    server: ForkServer, words: list[str], tmp_path: Path, name: str, threads: int, count_try: Count
) -> None:
    """A hung file system: the steps that are made are saved, and nothing waits for the rest."""
    folder, output = tmp_path / "run", tmp_path / "output"
    pid = server.start([*words, f"data.loader_threads={threads}"], output, fault=["stall_data", 17])
    wait_until(lambda: steps_logged(folder) >= 3, "three steps")
    time.sleep(0.5)
    os.kill(pid, getattr(signal, name))
    check_stopped(folder, server.wait(pid), name, output)
    assert saved_step(folder) in (3, 4)
    count_try(f"{name} while data do not come", True)


@pytest.mark.faults
def test_under_nohup_a_lost_terminal_changes_nothing(server: ForkServer, words: list[str], tmp_path: Path) -> None:
    folder, output = tmp_path / "run", tmp_path / "output"
    pid = server.start([*words, "schedule.max_steps=20"], output, ignored=["SIGHUP"])
    wait_until(lambda: steps_logged(folder) >= 3, "three steps")
    os.kill(pid, signal.SIGHUP)
    assert server.wait(pid) == 0, output.read_text()
    assert saved_step(folder) == 20 and outcome_of(folder)["state"] == "finished"  # type: ignore[index]


@pytest.mark.faults
def test_a_time_limit_saves_ahead_of_it(server: ForkServer, words: list[str], tmp_path: Path) -> None:
    """The server is older than its runs: a limit counts from a process's own beginning."""
    folder, output = tmp_path / "run", tmp_path / "output"
    begun = time.monotonic()
    code = server.wait(server.start([*words, "run.time_limit=25s"], output))
    assert time.monotonic() - begun < 25
    check_stopped(folder, code, "run.time_limit 25s", output)
    assert "ahead of run.time_limit 25s" in output.read_text()


def test_a_limit_that_leaves_no_step_is_refused(server: ForkServer, words: list[str], tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert server.wait(server.start([*words, "run.time_limit=5s"], output)) == 2
    assert "no step could be made" in output.read_text()


@pytest.mark.faults
def test_the_end_of_a_slurm_job_is_known(server: ForkServer, words: list[str], tmp_path: Path) -> None:
    output = tmp_path / "output"
    pid = server.start(words, output, environment={"SLURM_JOB_END_TIME": str(int(time.time()) + 26)})
    check_stopped(tmp_path / "run", server.wait(pid), "the end of the SLURM job", output)


# --- launchers, for real


def launch(launcher: list[str], words: list[str], output: Path) -> subprocess.Popen[bytes]:
    """A launcher in a session of its own, whose ranks write to a file that outlives it."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
    with output.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *launcher, "tests/support/launch_driver.py", *words], cwd=REPOSITORY, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True, env=environment,
        )  # fmt: skip


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no"]  # fmt: skip


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.faults
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_a_killed_launcher_leaves_no_rank_behind(
    tiny_settings: list[str], tmp_path: Path, launcher: list[str], count_try: Count
) -> None:
    """Its ranks save and end, and the same command resumes: nothing holds the folder."""
    words = [*tiny_settings, f"run.output_dir={tmp_path}", *LONG]
    folder, output = tmp_path / "run", tmp_path / "output"
    process = launch(launcher, words, output)
    wait_until(lambda: steps_logged(folder) >= 3, "three steps")
    ranks = children(process.pid)
    assert len(ranks) == (2 if launcher is TORCHRUN else 1)
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(lives, ranks)), "the ranks' end", 60)
    count_try("launcher killed, ranks end", True)
    outcome = outcome_of(folder)
    assert outcome is not None and outcome["state"] == "stopped" and "launcher is gone" in outcome["why"]
    made = saved_step(folder)
    assert made == outcome["step"] > 0
    again = launch(launcher, [*words, f"schedule.max_steps={made + 1}"], output)
    assert again.wait(120) == 0, output.read_text()
    assert saved_step(folder) == made + 1


@pytest.mark.faults
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_launcher_passes_the_signal_on(tiny_settings: list[str], tmp_path: Path, name: str, count_try: Count) -> None:
    """The launcher makes 1 of the exit code; the outcome says what it was."""
    words = [*tiny_settings, f"run.output_dir={tmp_path}", *LONG]
    folder, output = tmp_path / "run", tmp_path / "output"
    handled = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    process = launch([*TORCHRUN, "--signals-to-handle", handled], words, output)
    wait_until(lambda: steps_logged(folder) >= 3, "three steps")
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == 1, output.read_text()
    outcome = outcome_of(folder)
    assert outcome is not None and outcome["state"] == "stopped" and outcome["why"] == name
    assert outcome["step"] == saved_step(folder) > 0
    count_try(f"{name} to torchrun", True)


@pytest.mark.faults
def test_a_lost_terminal_saves_and_stops(tiny_settings: list[str], tmp_path: Path, count_try: Count) -> None:
    """The window is closed: SIGHUP comes, and every write to the terminal is an error from then on."""
    words = [*tiny_settings, f"run.output_dir={tmp_path}", *LONG]
    folder = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(REPOSITORY)
        os.environ |= {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "ACCELERATE_USE_CPU": "true"}
        os.execv(sys.executable, [sys.executable, "tests/support/launch_driver.py", *words])
    os.set_blocking(terminal, False)

    def seen() -> bool:
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 65536)  # a terminal that nobody reads fills up
        return steps_logged(folder) >= 3

    wait_until(seen, "three steps")
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    outcome = outcome_of(folder)
    assert outcome is not None and (outcome["state"], outcome["why"]) == ("stopped", "SIGHUP")
    assert status == 75 and outcome["step"] == saved_step(folder) > 0
    count_try("terminal closed", True)
