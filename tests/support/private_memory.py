"""What a piece of work takes of the process's own memory, at its peak; pages of mapped files are not counted.

Run with the name of a piece of work, it does that alone and prints the bytes: a test's own process has freed memory
that would be taken again unseen.
"""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MB = 10**6


def private_bytes() -> int:
    """The resident memory of this process that no file stands behind."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Peak:
    """The most that was seen above the beginning, in bytes."""

    def __init__(self) -> None:
        self.begin, self.bytes = private_bytes(), 0

    def look(self) -> None:
        self.bytes = max(self.bytes, private_bytes() - self.begin)


@contextmanager
def watch_memory() -> Iterator[Peak]:
    """Look every few milliseconds: what is held for long is seen."""
    peak, done = Peak(), threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            peak.look()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak.look()


def measure(work: Callable[..., object], *words: str) -> int:
    """What ``work``, a function of a module under ``tests``, takes in its own process: the bytes that it prints."""
    call = f"import sys; from {work.__module__} import {work.__name__} as work; print(work(*sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", call, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])
