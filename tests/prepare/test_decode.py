"""Images looked at in processes of their own: in order, and whatever one of them does to its process."""

import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.fatal_place import ExitingPath, KilledPath
from support.posts_on_disk import BUCKETS, REPOSITORY, draw
from trainer.config.schema import BucketsConfig
from trainer.core.files import sha256_file
from trainer.data.post import ImagePlace
from trainer.data.sources.records import Reject
from trainer.prepare import decode as decoders_module
from trainer.prepare.decode import Decoded, Filtered, Outcome, Task, Unchanged, decoders


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    paths = [tmp_path / f"{number}.png" for number in range(30)]
    for number, path in enumerate(paths):
        draw(path, number)
    return [Task(path.stem, "here", ImagePlace(path), None, None, BucketsConfig(**BUCKETS)) for path in paths]


def look_at(tasks: list[Task], processes: int) -> list[Outcome]:
    with decoders(processes) as pool:
        return list(pool.look_at(tasks))


def hashes(outcomes: list[Outcome]) -> list[str]:
    return [outcome.content_hash if isinstance(outcome, Decoded) else repr(outcome) for outcome in outcomes]


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_in_order_whatever_the_number_of_processes(tasks: list[Task], processes: int) -> None:
    outcomes = look_at(tasks, processes)
    assert hashes(outcomes) == [sha256_file(task.place.path) for task in tasks]
    alone = look_at(tasks, 0)
    for outcome, expected in zip(outcomes, alone, strict=True):
        assert isinstance(outcome, Decoded) and isinstance(expected, Decoded)
        assert outcome.fit == expected.fit and np.array_equal(outcome.pixels, expected.pixels)


def test_what_an_image_can_be(tasks: list[Task], tmp_path: Path) -> None:
    same = Task("0", "here", ImagePlace(tmp_path / "0.png"), sha256_file(tmp_path / "0.png"), None, tasks[0].buckets)
    small = Task("1", "here", ImagePlace(tmp_path / "1.png"), "another", 61, tasks[0].buckets)
    missing = Task("x", "line 7", ImagePlace(tmp_path / "x.png"), None, None, tasks[0].buckets)
    assert look_at([same, small, missing], 1)[:2] == [Unchanged(), Filtered("min_side")]
    (reject,) = look_at([missing], 0)
    assert isinstance(reject, Reject) and (reject.key, reject.origin, reject.reason) == ("x", "line 7", "missing")
    (kept,) = look_at([Task("1", "here", ImagePlace(tmp_path / "1.png"), "another", 60, tasks[0].buckets)], 0)
    assert isinstance(kept, Decoded) and kept.size == (60, 90)


def test_an_image_that_is_too_large_is_set_aside_without_a_warning(
    tasks: list[Task], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Image.new("1", (10_000, 9_000)).save(tmp_path / "bomb.png")
    bomb = Task("bomb", "here", ImagePlace(tmp_path / "bomb.png"), None, None, tasks[0].buckets)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: os.write(2, str(message).encode())  # type: ignore[assignment]
        for processes in (0, 1):
            (reject,) = look_at([bomb], processes)
            assert isinstance(reject, Reject) and reject.reason == "bomb"
        assert capfd.readouterr().err == ""
        decoders_module.look(bomb)
        assert "could be decompression bomb" in capfd.readouterr().err


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize(("kind", "pause"), [(ExitingPath, 0), (KilledPath, 0), (KilledPath, 0.02)])
def test_an_image_that_kills_its_process_is_set_aside(
    tasks: list[Task], processes: int, kind: type[Path], pause: float
) -> None:
    """Also while the consumer is busy with something else, as the VAE is."""
    expected = [sha256_file(task.place.path) for task in tasks]
    for number in (4, 5, 29):
        tasks[number] = replace(tasks[number], place=ImagePlace(kind(tasks[number].place.path)))
    outcomes = []
    with decoders(processes) as pool:
        for outcome in pool.look_at(tasks):
            outcomes.append(outcome)
            time.sleep(pause)
    dead = {number for number, outcome in enumerate(outcomes) if isinstance(outcome, Reject)}
    assert dead == {4, 5, 29}
    assert {outcomes[number].reason for number in dead} == {"killed_decoder"}  # type: ignore[union-attr]
    assert [text for number, text in enumerate(hashes(outcomes)) if number not in dead] == [
        text for number, text in enumerate(expected) if number not in dead
    ]


def start_program(*lines: str) -> subprocess.Popen[str]:
    """A program of its own with two decoders, named ``pool``, and all of Python's warnings."""
    begin = [
        "import os, time",
        "from pathlib import Path",
        "from trainer.prepare.decode import decoders",
        "with decoders(2) as pool:",
    ]
    program = "\n".join([*begin, *(f"    {line}" for line in lines)])
    command = [sys.executable, "-W", "always", "-c", program]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_the_processes_end_with_their_parent() -> None:
    process = start_program(
        "list(pool.look_at([]))",
        "busy = [pool.pool.submit(time.sleep, 0.5) for _ in range(2)]",
        "print(*[each for each in pool.pool._processes], flush=True)",
        "time.sleep(60)",
    )
    assert process.stdout is not None
    children = [int(word) for word in process.stdout.readline().split()]
    assert len(children) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while any(is_running(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(child) for child in children)


def test_the_processes_are_forked_from_one_without_threads() -> None:
    """A fork of a process that has threads may wait for ever; Python warns of it from 3.12 on."""
    process = start_program(
        "import threading",
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "forked_from = pool.pool.submit(os.getppid).result()",
        "print(*(len(os.listdir(f'/proc/{each}/task')) > 1 for each in (os.getpid(), forked_from)))",
    )
    assert process.communicate() == ("True False\n", "")


def test_the_processes_do_not_load_pytorch() -> None:
    """It would cost each of them seconds and hundreds of megabytes."""
    process = start_program(
        "import torch",
        "child = pool.pool.submit(os.getpid).result()",
        "print(*('libtorch' in Path(f'/proc/{each}/maps').read_text() for each in (os.getpid(), child)))",
    )
    assert process.communicate() == ("True False\n", "")


def test_the_script_that_the_processes_run_again_does_not_import_pytorch() -> None:
    again = "import runpy, sys; runpy.run_path('scripts/build_shards.py', run_name='__mp_main__'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    modules = done.stdout.split()
    assert "trainer.config.load" in modules and "torch" not in modules


def is_running(process: int) -> bool:
    """Whether there is such a process, not counting one that is dead and waits to be buried."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
