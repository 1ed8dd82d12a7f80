"""Why a run stops before its end, agreed on by all ranks: a signal, its time limit, or the death of its launcher.

Each rank asks itself at the beginning of every step, and within samples and the wait for data; then all agree, on the
host, so that no step is launched that others do not make. What is asked for late in a step ends the run after it.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from trainer.config.durations import parse_duration
from trainer.core.console import format_duration, log
from trainer.core.errors import UserError
from trainer.core.processes import Launcher, find_launcher, seconds_since_start
from trainer.train.pace import Pace

STOPPED = 75  # the exit code of a run that can be resumed: EX_TEMPFAIL of sysexits.h
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
TIME, ORPHAN, FAILED = 1, 2, 3  # what ranks agree on, beside the signals' numbers above these
ABOVE = 100
JOB_END = "SLURM_JOB_END_TIME"  # seconds since 1970, set by SLURM
ENDING = 15.0  # seconds from a save to the end of the process: the page, the trackers
SAVING = 100e6  # bytes a second, until a save has been measured
WAIT = timedelta(hours=2)  # for the slowest rank: one may be hashing tens of gigabytes


class StopAsked(Exception):
    """Raised within what is given up at once, such as samples."""


@dataclass(frozen=True)
class Deadline:
    """When the process has to be gone."""

    at: float  # of time.monotonic()
    says: str  # in words


class Stops:
    """What this rank was asked, and what all of them agreed on."""

    def __init__(self, deadline: Deadline | None, launcher: Launcher | None, group: Any) -> None:
        self.deadline, self.launcher, self.group, self.pace = deadline, launcher, group, Pace()
        self.signal: int | None = None
        self.reason: str | None = None  # once all have agreed
        self.failed: Callable[[], bool] = lambda: False  # whether this rank can save no more: the save itself says why
        self.late = False  # whether it was time: batches and samples may have been given up for it
        self.save_seconds = 0.0  # of a save, as long as none has been measured

    def asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.code() > 0

    def code(self) -> int:
        """Why this rank was asked to stop, as a number; 0: it was not."""
        if self.failed():
            return FAILED
        orphan = self.signal in (None, signal.SIGTERM) and self.launcher is not None and not self.launcher.lives
        if orphan:  # which comes with SIGTERM, and explains it
            return ORPHAN
        if self.signal is not None:
            return ABOVE + self.signal
        self.late = self.late or (self.deadline is not None and time.monotonic() + self.ahead() >= self.deadline.at)
        return TIME if self.late else 0

    def ahead(self) -> float:
        """Seconds that it takes to stop: the step and the save under way, one more save and the end, with a margin."""
        save = self.pace.longest("checkpoint", self.save_seconds)
        return 1.5 * (save + self.pace.rest_of_save(save) + 2 * self.pace.longest("step")) + ENDING

    def agree(self) -> bool:
        """Whether some rank was asked to stop. All ranks ask at the same time, before a step."""
        self.pace.begin_step()
        code = self.code()
        if self.group is not None:
            codes = torch.tensor([code])
            torch.distributed.all_reduce(codes, torch.distributed.ReduceOp.MAX, group=self.group)
            code = int(codes)
        if code:
            self.reason = self.describe(code)
            log.info("stopping by %s, with a checkpoint", self.reason)
        return code > 0

    def describe(self, code: int) -> str:
        """A reason in words."""
        if code == TIME:
            return self.deadline.says if self.deadline is not None else "the time limit of another rank"
        if code == FAILED:
            return "a save that failed"
        if code == ORPHAN:
            gone = f"{self.launcher.name}, process {self.launcher.pid}" if self.launcher else "another rank's"
            return f"its launcher is gone ({gone})"
        return signal.Signals(code - ABOVE).name

    def expect_saves(self, size: int) -> None:
        """The bytes of a checkpoint, from which the time of a save is guessed until one is made.

        Raises:
            UserError: where the time that is left is too short for any step.
        """
        self.save_seconds = size / SAVING
        if self.deadline is not None and (left := self.deadline.at - time.monotonic()) <= self.ahead():
            raise UserError(
                f"{self.deadline.says} leaves {format_duration(max(0.0, left))}, and a save with the end of the run is "
                f"expected to take {format_duration(self.ahead())}: no step could be made"
            )
        if self.deadline is not None:
            log.info("note: it saves and stops by itself ahead of %s, in %s", self.deadline.says, format_duration(left))

    def raise_if_asked(self) -> None:
        """Give up what can be made again.

        Raises:
            StopAsked: where this rank was asked to stop.
        """
        if self.asked():
            raise StopAsked


def find_deadline(time_limit: str | None) -> Deadline | None:
    """The earlier one of the limit, counted from the beginning of this process, and the end of the SLURM job."""
    now, found = time.monotonic(), []
    if time_limit is not None:
        seconds = parse_duration(time_limit)
        assert seconds is not None  # a rule of the config
        found.append(Deadline(now + seconds - seconds_since_start(), f"run.time_limit {time_limit}"))
    if (text := os.environ.get(JOB_END, "")).isdecimal():
        found.append(Deadline(now + int(text) - time.time(), "the end of the SLURM job"))
    return min(found, key=lambda deadline: deadline.at, default=None)


@contextmanager
def stop_requests(time_limit: str | None) -> Iterator[Stops]:
    """SIGTERM, Ctrl-C, SIGUSR1 and SIGHUP ask for a checkpoint and a stop; a second Ctrl-C ends the process at once.

    SIGTERM may come again, from a launcher that passes on what this process already got, and changes nothing; nor does
    SIGHUP where it was ignored, under nohup. All ranks enter this together.
    """
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    group = torch.distributed.new_group(backend="gloo", timeout=WAIT) if several else None
    stops = Stops(find_deadline(time_limit), find_launcher(), group)
    terminals = [number for number in (0, 1, 2) if is_terminal(number)]

    def ask(number: int, _: Any) -> None:
        if number == signal.SIGINT and stops.signal is not None:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            leave(terminals)
        stops.signal = stops.signal or number

    if threading.current_thread() is not threading.main_thread():
        yield stops
        return
    with handling(ask):
        yield stops
    if stops.reason is not None and stops.launcher is not None:
        # it ends the other ranks as soon as one is gone, and rank 0 still has something to say
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def handling(ask: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside, signals are answered by this."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: old for number, old in before.items() if (number, old) != (signal.SIGHUP, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def is_terminal(descriptor: int) -> bool:
    """Whether a standard stream is one."""
    try:
        return os.isatty(descriptor)
    except OSError:
        return False


def leave(terminals: list[int]) -> None:
    """Write no more to terminals that are gone: it would be an error before the save."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in terminals:
            if not is_terminal(number):  # any more
                os.dup2(nowhere, number)
        os.close(nowhere)
