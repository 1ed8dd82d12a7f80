"""A lock that another process holds: a process never stands in its own way."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOLD = """
import sys
from pathlib import Path
from trainer.core.locks import hold_lock
with hold_lock(Path(sys.argv[1]), "held", shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another_process(path: Path, shared: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Hold ``path`` in a process of its own until the end of the block."""
    command = [sys.executable, "-c", HOLD, str(path), "shared" if shared else "alone"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()
