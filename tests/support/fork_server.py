"""Real training processes without their imports: a server has imported everything, and forks one for each run.

Run as a script it is the server: it reads a JSON object a line (``words`` of a config, ``output`` a file,
``environment``, ``ignored`` signals, ``fault`` a function of support.faults; or ``wait`` for a process) and answers
each with a line.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.paths import REPOSITORY
from support.ranks import free_port


class ForkServer:
    """Starts runs and waits for them."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, **message: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(message), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, words: Sequence[str], output: Path, **more: Any) -> int:
        """A process that trains, in a session of its own; its id."""
        return int(self.ask(words=list(words), output=str(output), **more))

    def wait(self, pid: int, seconds: float = 120.0) -> int:
        """The exit code of a process; what is still there after this time is killed, and gives -SIGKILL."""
        return int(self.ask(wait=pid, seconds=seconds))


def start_together(
    server: ForkServer, words: Sequence[str], folder: Path, faults: Mapping[int, list[Any]] | None = None
) -> list[int]:
    """Two ranks without a launcher, rank 0 of which keeps the store by which they meet; ``faults`` by rank."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    given = {rank: {"fault": fault} for rank, fault in (faults or {}).items()}
    return [
        server.start(
            words, folder / f"output-{rank}", environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **given.get(rank, {}),
        )
        for rank in (0, 1)
    ]  # fmt: skip


@contextmanager
def serving() -> Iterator[ForkServer]:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment["PYTHONPATH"] = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    with subprocess.Popen(
        [sys.executable, "-m", "support.fork_server"], cwd=REPOSITORY, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env=environment,
    ) as process:  # fmt: skip
        yield ForkServer(process)
        assert process.stdin is not None
        process.stdin.close()


def become_run(message: dict[str, Any]) -> None:
    """In the child: train as train.py does."""
    from support import faults
    from support.launch_driver import main
    from trainer.core.errors import run_command

    os.setsid()
    output = os.open(message["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    for name in message.get("ignored", ()):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.environ |= message.get("environment", {})
    sys.argv = ["train.py", *message["words"]]
    if fault := message.get("fault"):
        getattr(faults, fault[0])(*fault[1:])
    run_command(lambda: main(message["words"]))


def wait_for(pid: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline += 60
        time.sleep(0.02)


def serve() -> None:
    from support import faults, launch_driver  # noqa: F401
    from trainer.train import loop  # noqa: F401

    gc.freeze()
    for line in sys.stdin:
        message = json.loads(line)
        if "wait" in message:
            print(wait_for(message["wait"], message["seconds"]), flush=True)
            continue
        child = os.fork()
        if not child:
            code = 0
            try:
                become_run(message)
            except SystemExit as error:
                code = int(error.code or 0)
            except BaseException:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(child, flush=True)


if __name__ == "__main__":
    serve()
