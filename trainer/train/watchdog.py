"""A thread that sees when this rank does not go on, says where all ranks are, names the one that is missing, and ends
the job: a rank that hangs, was stopped or died silently keeps all others waiting in a collective.

Only what takes far too long ends a run: a step its ``run.step_timeout``, saves and samples limits of their own. It
never waits long itself, for a disk or for another rank, so that the end comes within a minute of the limit.
"""

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from trainer.config.durations import parse_duration
from trainer.config.environment import hide_environment
from trainer.core.console import format_duration
from trainer.core.errors import UserError, print_error, report_failure
from trainer.core.files import write_json
from trainer.core.processes import POLL_SECONDS
from trainer.train.black_box import BlackBox
from trainer.train.launch import RunInputs
from trainer.train.outcome import describe_error, note_outcome
from trainer.train.pace import Pace
from trainer.train.peers import Board, Peer, meet_peers, within
from trainer.train.run import run_path
from trainer.train.stops import Stops

LOOK = 1.0  # seconds between looks at this rank, and ...
ASK = 5  # ... looks between questions to the others
PAUSE = 10.0  # seconds between two looks: then this process itself was stopped, as by Ctrl-Z, and nothing hangs
LEAST, TIMES = 300.0, 10.0  # seconds of a step's limit, and medians of the steps so far
ENOUGH_STEPS = 3  # steps after which their median counts
UNMEASURED = 1800.0  # seconds for what has not been measured: the first steps (compilation), saves and samples
REPORTS = 15.0  # seconds that ranks wait for each other's reports
WRITING = 8.0  # seconds for what is written then
GOING = 3.0  # seconds that a killed rank takes to be gone after its connections
OF_COLLECTIVES = re.compile("gloo|nccl|connection|peer|socket", re.IGNORECASE)  # errors of collectives


class Watchdog:
    """One rank's."""

    def __init__(
        self,
        run: Path,
        step_timeout: str | None,
        stops: Stops,
        black_box: BlackBox,
        peers: Sequence[Peer],
        board: Board,
        show_end: Callable[[str], object],
        hide: Callable[[str], str],
    ) -> None:
        self.run, self.stops, self.pace, self.black_box, self.show_end = run, stops, stops.pace, black_box, show_end
        self.step_timeout = None if step_timeout is None else parse_duration(step_timeout)
        self.peers, self.board, self.own, self.hide = peers, board, peers[black_box.rank], hide
        self.ended, self.ending = threading.Event(), False
        self.thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.pace.go_on()  # a slow start is over
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Watch no more. An error of a collective is mostly another rank's end: say whose.

        Raises:
            UserError: in place of such an error, where a rank of this machine is gone.
        """
        if self.ending:  # the thread ends this process and says why; another rank's end came first
            self.thread.join()
        self.ended.set()
        if error is None or len(self.peers) == 1:
            return
        broken = isinstance(error, RuntimeError) and OF_COLLECTIVES.search(str(error)) is not None
        gone = self.find_gone(GOING if broken else 0.0)
        said = {**self.report(), "error": self.hide(describe_error(error)), "gone": [asdict(peer) for peer in gone]}
        within(WRITING, lambda: write_json(self.black_box.folder / f"rank-{self.own.rank:05d}.end.json", said))
        if gone and broken:
            are = "is" if len(gone) == 1 else "are"
            raise UserError(
                f"step {self.black_box.step}: {', '.join(map(str, gone))} {are} gone, and the others cannot go on: its "
                "own last words say why; where it has none it was killed, as by a system that is out of memory"
            ) from error

    def find_gone(self, seconds: float) -> list[Peer]:
        """The ranks of this machine that are gone; they are waited for: connections end before their process does."""
        deadline = time.monotonic() + seconds
        while not (gone := [peer for peer in self.peers if peer.is_gone]) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return gone

    def watch(self) -> None:
        """The thread."""
        looked, lost, count = time.monotonic(), 0.0, 0
        mark = self.pace.last
        while not self.ended.wait(LOOK):
            now, count = time.monotonic(), count + 1
            if self.pace.last is not mark:
                mark, lost = self.pace.last, 0.0
            if now - looked > PAUSE:
                lost += now - looked
            looked = now
            late = now - mark.since - lost > self.limit(mark.kind)
            if late or (count % ASK == 0 and self.board.has_word()):
                self.end_job(late)

    def limit(self, kind: str) -> float:
        """Seconds that a rank may be at one thing."""
        return find_limit(self.pace, kind, self.step_timeout, self.stops.save_seconds)

    def report(self) -> dict[str, Any]:
        """Where this rank is."""
        mark = self.pace.last
        return {
            "rank": self.own.rank, "host": self.own.host, "pid": self.own.pid, "step": self.black_box.step,
            "at": mark.doing, "mark": mark.number, "seconds": round(time.monotonic() - mark.since, 1),
            "keys": self.black_box.keys,
        }  # fmt: skip

    def end_job(self, late: bool) -> None:
        """Write down where all ranks are, and end them; it does not return."""
        self.ending = True
        report, folder = self.report(), self.black_box.folder
        text = f"{report}\n\n{describe_threads()}"
        within(WRITING, lambda: write_stacks(folder / f"rank-{self.own.rank:05d}.stacks.txt", text))
        self.board.leave(self.own.rank, report)
        reports = {self.own.rank: report} | self.gather_reports()
        missing = [peer for peer in self.peers if peer.rank not in reports]
        why = f"{describe_limit(self.pace.last.kind, self.limit(self.pace.last.kind))}: " if late else ""
        said = f"step {report['step']} does not go on; {why}{name_missing(reports, missing)}"
        if self.own.rank == min(reports):
            found = {"said": said, "ranks": [reports.get(peer.rank, asdict(peer)) for peer in self.peers]}
            within(WRITING, lambda: write_json(folder / "hang.json", found))
        within(WRITING, lambda: note_outcome(self.run, "failed", said, report["step"]))
        within(WRITING, lambda: self.show_end(said))
        if self.own.rank == min(reports):
            within(WRITING, lambda: self.say(said))
        for peer in missing:  # its launcher would wait for it, and it cannot end itself
            peer.kill()
        os._exit(1)

    def gather_reports(self) -> dict[int, dict[str, Any]]:
        """Of the other ranks, as far as they come."""
        found: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + REPORTS
        others = [peer.rank for peer in self.peers if peer.rank != self.own.rank]
        while len(found) < len(others) and time.monotonic() < deadline and self.board.store is not None:
            for rank in others:
                if rank not in found and (word := self.board.read(rank)) is not None:
                    found[rank] = word
            self.ended.wait(0.2)
        return found

    def say(self, said: str) -> None:
        """The end of the run, in words, also for the launcher."""
        resume = "The run ends here; the same command resumes from the last checkpoint"
        print_error(f"error: {said}. The stacks of all threads lie in {self.black_box.folder}. {resume}")
        report_failure(said)


def find_limit(pace: Pace, kind: str, step_timeout: float | None, save_seconds: float) -> float:
    """Seconds that one thing may take: what was measured of its kind, many times over."""
    if kind == "step" and len(pace.took.get("step", ())) >= ENOUGH_STEPS:
        return step_timeout if step_timeout is not None else max(LEAST, TIMES * pace.median("step"))
    if kind == "checkpoint":
        return max(UNMEASURED, TIMES * pace.longest("checkpoint", save_seconds))
    return max(UNMEASURED, TIMES * pace.longest(kind), step_timeout or 0.0)


def describe_limit(kind: str, limit: float) -> str:
    """Which limit it was."""
    field = " (run.step_timeout)" if kind == "step" else ""
    return f"nothing came for {format_duration(limit)}{field}"


def name_missing(reports: dict[int, dict[str, Any]], missing: Sequence[Peer]) -> str:
    """The ranks that did not arrive where the others wait, and where they are."""
    first, last = (
        min(reports.values(), key=lambda report: report["mark"]),
        max(reports.values(), key=lambda report: report["mark"]),
    )
    waiting = f"the others wait at {last['at']}" if len(reports) > 1 or missing else f"it is at {last['at']}"
    if missing:
        states = [
            f"{peer} {'is gone' if peer.is_gone else 'does not answer, as if it was stopped'}" for peer in missing
        ]
        return f"{'; '.join(states)}; {waiting}"
    if first["mark"] < last["mark"]:
        behind = [report for report in reports.values() if report["mark"] == first["mark"]]
        named = ", ".join(f"rank {report['rank']} (process {report['pid']} on {report['host']})" for report in behind)
        return f"{named} did not arrive: it is at {first['at']}; {waiting}"
    return f"all ranks are at {last['at']}" if len(reports) > 1 else waiting


def describe_threads() -> str:
    """The stacks of all threads of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = sorted(sys._current_frames().items(), key=lambda item: names.get(item[0], "") != "MainThread")
    return "\n".join(
        f"thread {names.get(number, number)}\n{''.join(traceback.format_stack(frame))}" for number, frame in stacks
    )


def write_stacks(file: Path, text: str) -> None:
    """Into the black box."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def open_watchdog(inputs: RunInputs, stops: Stops, black_box: BlackBox, show_end: Callable[[str], object]) -> Watchdog:
    """This rank's; all ranks open theirs together. ``show_end`` shows on the run's page why the job ended."""
    board = Board(f"watchdog/{black_box.attempt}", inputs.processes)
    peers, hide = meet_peers(inputs.processes), partial(hide_environment, written=inputs.config.written)
    return Watchdog(
        run_path(inputs.config), inputs.config.run.step_timeout, stops, black_box, peers, board, show_end, hide
    )
