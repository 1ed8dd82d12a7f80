"""The ranks beside this one: which processes they are, and a way to tell them something when no collective comes back.

That way is the store by which they met, which torchrun and accelerate launch keep in a process of their own. Whatever
is wrong with it, it keeps nobody waiting.
"""

import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed.distributed_c10d import _get_default_store

from trainer.core.distributed import Processes
from trainer.core.processes import start_ticks

ANSWER = 5.0  # seconds for one question
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Peer:
    """A rank's process."""

    rank: int
    host: str
    pid: int
    started: str | None  # clock ticks since the machine's start; None where that is not known

    @property
    def is_gone(self) -> bool:
        """Whether it lies here that it has ended; of another machine's nothing is known."""
        here = self.host == socket.gethostname() and self.started is not None
        return here and start_ticks(self.pid) != self.started

    def kill(self) -> None:
        """End a process of this machine that may be stopped, or hang with Python's lock held."""
        if self.host == socket.gethostname() and self.started is not None and start_ticks(self.pid) == self.started:
            os.kill(self.pid, signal.SIGKILL)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def meet_peers(processes: Processes) -> list[Peer]:
    """All ranks' processes, by rank."""
    pid = os.getpid()
    return processes.gather(Peer(processes.rank, socket.gethostname(), pid, start_ticks(pid)))


def within(seconds: float, work: Callable[[], Answer]) -> Answer | None:
    """What this gives, unless it takes longer, or fails: then None. It may go on in its thread."""
    answers: list[Answer] = []

    def run() -> None:
        try:
            answers.append(work())
        except Exception:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


class Board:
    """Where ranks leave word for each other. One that does not answer is not asked again."""

    def __init__(self, name: str, processes: Processes) -> None:
        self.name = name
        self.store: Any = None
        if processes.world > 1:
            self.store = _get_default_store().clone()  # type: ignore[attr-defined]  # of its own: another thread may be waiting in the other one
            self.store.set_timeout(timedelta(seconds=ANSWER))

    def ask(self, work: Callable[[Any], Answer]) -> Answer | None:
        """What the store says; None where it says nothing."""
        store = self.store
        if store is None:
            return None
        answer = within(ANSWER, lambda: work(store))
        if answer is None:
            self.store = None
        return answer

    def leave(self, rank: int, word: dict[str, Any]) -> None:
        """A word of this rank, and for all that there is one."""
        text = json.dumps(word)

        def write(store: Any) -> bool:
            store.set(f"{self.name}/{rank}", text)
            store.set(f"{self.name}/any", "1")
            return True

        self.ask(write)

    def has_word(self) -> bool:
        """Whether any rank has left one."""
        return bool(self.ask(lambda store: store.check([f"{self.name}/any"])))

    def read(self, rank: int) -> dict[str, Any] | None:
        """The word of a rank; None where it has left none."""
        key = f"{self.name}/{rank}"
        text = self.ask(lambda store: store.get(key) if store.check([key]) else b"null")
        return json.loads(text) if text is not None else None
