"""This process and the one that started it: who they are, and that a process does not outlive its launcher.

What other processes are is read from /proc, so that elsewhere than on Linux nothing of it is known.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.core.errors import UserError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAUNCHED = "TORCHELASTIC_RUN_ID"  # in the environment of what torchrun, or accelerate launch of several, started
POLL_SECONDS = 0.01  # between looks at another process
ANCESTORS = 4  # between a rank and its launcher there may be scripts


@dataclass(frozen=True)
class Launcher:
    """What started this process as a rank, and ends with it."""

    name: str  # as it is typed
    pid: int
    started: str  # clock ticks since the machine's start: a pid is used again
    words: tuple[str, ...]  # its command line after the name

    @property
    def lives(self) -> bool:
        """Whether it is still there."""
        return start_ticks(self.pid) == self.started


def read_stat(pid: int | str) -> list[str]:
    """Fields 3 and following of /proc/PID/stat; none where there is no such process, or no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the second is a name that may hold anything


def start_ticks(pid: int | str) -> str | None:
    """When a process began, in clock ticks since the machine's start; None where it is gone, or waits to be reaped."""
    stat = read_stat(pid)
    return stat[19] if stat and stat[0] not in "ZX" else None


def seconds_since_start() -> float:
    """Seconds that this process has lived; 0 where that is not known."""
    ticks = start_ticks("self")
    if ticks is None:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK"))


def read_words(pid: int) -> list[str]:
    """A process's command line; empty where it is not readable."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")[:-1]
    except OSError:
        return []


def recognise_launcher(words: list[str]) -> tuple[str, tuple[str, ...]] | None:
    """The name of a launcher and the words after it, from a command line; None where it is none."""
    program, *after = skip_python(words) or [""]
    name = Path(program).name
    if name in ("torchrun", "torch.distributed.run", "torch.distributed.launch"):
        return "torchrun", tuple(after)
    if name in ("accelerate-launch", "accelerate.commands.launch"):
        return "accelerate launch", tuple(after)
    if name in ("accelerate", "accelerate.commands.accelerate_cli") and after[:1] == ["launch"]:
        return "accelerate launch", tuple(after[1:])
    return None


def skip_python(words: list[str]) -> list[str]:
    """A command line from its script, or its module, on."""
    if not words or not Path(words[0]).name.startswith("python"):
        return words
    rest = words[1:]
    while rest and rest[0].startswith("-") and rest[0] != "-m":
        rest = rest[2 if rest[0] in ("-X", "-W") else 1 :]
    return rest[1:] if rest[:1] == ["-m"] else rest


def find_launcher() -> Launcher | None:
    """The launcher among the processes above this one."""
    pid = os.getppid()
    for _ in range(ANCESTORS):
        started, stat = start_ticks(pid), read_stat(pid)
        if started is None or pid <= 0:
            return None
        if (found := recognise_launcher(read_words(pid))) is not None:
            return Launcher(found[0], pid, started, found[1])
        pid = int(stat[1])
    return None


def follow_launcher() -> None:
    """Have this process sent SIGTERM when its launcher dies: a rank alone holds its GPU and its folder for nothing.

    Call it first thing: until handlers are installed, SIGTERM ends it at once, and there is nothing to save. Only a
    launcher counts: what a shell started in the background goes on after the shell.

    Raises:
        UserError: where the launcher is gone already.
    """
    if sys.platform != "linux":
        return
    parent, launcher = os.getppid(), find_launcher()
    if launcher is not None and launcher.pid == parent:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # also when only the thread ends that started this
    orphan = launcher is None and LAUNCHED in os.environ and os.getppid() == 1
    if orphan or (launcher is not None and not launcher.lives):
        raise UserError("the launcher of this process is gone: it ends too")


def list_descendants(pid: int) -> list[int]:
    """What a process started, and what that started, as far as it is there."""
    stats = {int(path.name): read_stat(path.name) for path in Path("/proc").glob("[0-9]*")}
    found = [pid]
    for parent in found:
        found += [child for child, stat in stats.items() if stat[1:2] == [str(parent)]]
    return found[1:]


def kill_family(process: subprocess.Popen[Any]) -> None:
    """SIGKILL to a process and all its descendants, none of which is there any more afterwards.

    torchrun starts its ranks in sessions of their own, and a rank whose launcher is gone saves and stops in order.
    """
    process.send_signal(signal.SIGSTOP)  # it starts nothing meanwhile, and ends no rank in its own way
    started = {pid: start_ticks(pid) for pid in list_descendants(process.pid)}
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait()
    while any(ticks is not None and start_ticks(pid) == ticks for pid, ticks in started.items()):
        time.sleep(POLL_SECONDS)


def describe_process() -> dict[str, str | int]:
    """This process as another one, on another machine, can know it."""
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - seconds_since_start()))
    what = Path(sys.argv[0]).name if sys.argv else ""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started, "what": what or "python"}
