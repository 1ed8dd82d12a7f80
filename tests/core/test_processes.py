"""Launchers are recognised by their command lines, and a process knows how long it has lived."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.paths import REPOSITORY
from trainer.core.processes import (
    Launcher,
    kill_family,
    list_descendants,
    recognise_launcher,
    seconds_since_start,
    start_ticks,
)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("python /env/bin/torchrun --nproc_per_node 2 train.py", ("torchrun", ("--nproc_per_node", "2", "train.py"))),
        ("python -m torch.distributed.run train.py", ("torchrun", ("train.py",))),
        ("python3 /env/bin/accelerate launch --cpu train.py", ("accelerate launch", ("--cpu", "train.py"))),
        ("python -u -m accelerate.commands.launch train.py", ("accelerate launch", ("train.py",))),
        ("/env/bin/accelerate-launch train.py", ("accelerate launch", ("train.py",))),
        ("python /env/bin/accelerate config", None),
        ("bash run.sh torchrun", None),
        ("python train.py torchrun.yaml a b torchrun", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_launcher_is_recognised(line: str, found: tuple[str, tuple[str, ...]] | None) -> None:
    assert recognise_launcher(line.split()) == found


def test_a_pid_that_is_used_again_is_another_process() -> None:
    started = start_ticks(os.getpid())
    assert started is not None
    assert Launcher("torchrun", os.getpid(), started, ()).lives
    assert not Launcher("torchrun", os.getpid(), str(int(started) - 1), ()).lives
    child = subprocess.Popen(["true"])
    while start_ticks(child.pid) is not None:  # it ends, and waits to be reaped
        time.sleep(0.01)
    child.wait()


FAMILY = """
import subprocess, sys, time
one = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"]
between = "import subprocess, sys; subprocess.run(sys.argv[1:], start_new_session=True)"
subprocess.Popen([sys.executable, "-c", between, *one], start_new_session=True)
subprocess.run(one)
"""


def test_a_killed_family_is_gone_whatever_sessions_it_is_in() -> None:
    """As torchrun's ranks, and the loaders of those."""
    process = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == [b"here\n"] * 2
    family = {pid: start_ticks(pid) for pid in list_descendants(process.pid)}
    assert len(family) == 3 and None not in family.values()
    kill_family(process)
    assert process.returncode == -signal.SIGKILL
    assert all(start_ticks(pid) != ticks for pid, ticks in family.items())


def test_a_process_knows_its_age() -> None:
    assert 0 < seconds_since_start() < 86_400


ORPHAN = """
import os, sys, time
sys.argv = ["torchrun"]
if os.fork() == 0:
    deadline = time.monotonic() + 30
    while os.getppid() != 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    from trainer.core.processes import follow_launcher
    try:
        follow_launcher()
    except Exception as error:
        open(sys.argv[0], "w").write(str(error))
"""


def test_one_whose_launcher_is_gone_before_it_looks_ends(tmp_path: Path) -> None:
    script, said = tmp_path / "script.py", tmp_path / "said"
    script.write_text(ORPHAN.replace('["torchrun"]', repr([str(said)])))
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "1", "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, str(script)], env=environment, check=True)
    deadline = time.monotonic() + 60
    while not (said.exists() and said.read_text()):
        assert time.monotonic() < deadline, "the orphan said nothing"
        time.sleep(0.02)
    assert "the launcher of this process is gone" in said.read_text()
