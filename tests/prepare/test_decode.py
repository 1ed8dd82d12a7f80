"""Images looked at in processes of their own: in order, and whatever one of them does to its process."""

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


def fatal(name: str, do: Callable[[], object]) -> Callable[[Task], Outcome]:
    """``look``, but for the images of this name, which end their process."""
    real = decoders_module.look

    def look(task: Task) -> Outcome:
        if task.key in name.split():
            do()
        return real(task)

    return look


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize(("how", "pause"), [("exit", 0), ("kill", 0), ("kill", 0.02)])
def test_an_image_that_kills_its_process_is_set_aside(
    tasks: list[Task], processes: int, how: str, pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the consumer is busy with something else, as the VAE is."""
    # a module's function is pickled by its name: the forked process finds the same one there
    end = (lambda: os._exit(1)) if how == "exit" else (lambda: os.kill(os.getpid(), signal.SIGKILL))
    look = fatal("4 5 29", end)
    look.__module__, look.__qualname__ = decoders_module.__name__, "look"
    monkeypatch.setattr(decoders_module, "look", look)
    outcomes = []
    with decoders(processes) as pool:
        for outcome in pool.look_at(tasks):
            outcomes.append(outcome)
            time.sleep(pause)
    dead = {number for number, outcome in enumerate(outcomes) if isinstance(outcome, Reject)}
    assert dead == {4, 5, 29}
    assert {outcomes[number].reason for number in dead} == {"killed_decoder"}  # type: ignore[union-attr]
    expected = [sha256_file(task.place.path) for task in tasks]
    assert [text for number, text in enumerate(hashes(outcomes)) if number not in dead] == [
        text for number, text in enumerate(expected) if number not in dead
    ]


def test_the_processes_end_with_their_parent(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from trainer.prepare.decode import decoders\n"
        "with decoders(2) as pool:\n"
        "    list(pool.look_at([]))\n"
        "    children = [pool.pool.submit(__import__('os').getpid).result() for _ in range(2)]\n"
        "    print(*[p for p in pool.pool._processes], flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdout is not None
    children = [int(word) for word in process.stdout.readline().split()]
    assert len(children) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(is_running(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(child) for child in children)


def is_running(process: int) -> bool:
    """Whether there is such a process, not counting one that is dead and waits to be buried."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
