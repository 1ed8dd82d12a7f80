"""What the watchdog allows, and whom it names; real hangs are in tests/promises/test_hung_rank.py."""

import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.core.processes import start_ticks
from trainer.train.pace import Pace
from trainer.train.peers import Peer, within
from trainer.train.stops import Stops
from trainer.train.watchdog import Watchdog, describe_threads, find_limit, name_missing, write_stacks

PEERS = [Peer(rank, "elsewhere", 100 + rank, "1") for rank in range(3)]


def pace_of(step: float, steps: int = 5, checkpoint: float | None = None) -> Pace:
    pace = Pace()
    for _ in range(steps):
        pace.note("step", step)
    if checkpoint is not None:
        pace.note("checkpoint", checkpoint)
    return pace


@pytest.mark.parametrize(
    ("pace", "kind", "timeout", "limit"),
    [
        (pace_of(1.0), "step", None, 300),  # at least 5 minutes
        (pace_of(90.0), "step", None, 900),
        (pace_of(90.0), "step", 40, 40),
        (pace_of(1.0, steps=2), "step", None, 1800),  # the first steps may compile
        (pace_of(1.0, steps=2), "step", 40, 1800),
        (pace_of(1.0, steps=2), "step", 7200, 7200),
        (pace_of(1.0), "start", 40, 1800),
        (pace_of(1.0), "sample", 40, 1800),
        (pace_of(1.0), "checkpoint", 40, 4000),  # as a save is expected to take
        (pace_of(1.0, checkpoint=600.0), "checkpoint", 40, 6000),
        (pace_of(1.0, checkpoint=1.0), "checkpoint", 40, 1800),
    ],
)
def test_limits(pace: Pace, kind: str, timeout: float | None, limit: float) -> None:
    assert find_limit(pace, kind, timeout, save_seconds=400.0) == limit


def report(rank: int, mark: int, doing: str) -> dict[str, Any]:
    return {"rank": rank, "host": "h", "pid": 7 + rank, "mark": mark, "at": doing}


def test_who_is_named() -> None:
    everywhere = {rank: report(rank, 30, "a mean") for rank in range(3)}
    assert name_missing(everywhere, []) == "all ranks are at a mean"
    assert name_missing({0: report(0, 30, "a mean")}, []) == "it is at a mean"
    said = name_missing(everywhere | {1: report(1, 29, "a forward")}, [])
    assert said == "rank 1 (process 8 on h) did not arrive: it is at a forward; the others wait at a mean"
    said = name_missing({rank: everywhere[rank] for rank in (0, 2)}, [PEERS[1]])
    assert "rank 1 (process 101 on elsewhere) does not answer" in said and said.endswith("the others wait at a mean")


def test_a_peer_is_gone_only_where_that_is_seen() -> None:
    host, own = socket.gethostname(), os.getpid()
    assert not Peer(0, host, own, start_ticks(own)).is_gone
    assert Peer(0, host, own, "1").is_gone  # another process has its number now
    assert not Peer(0, "elsewhere", own, "1").is_gone and not Peer(0, host, own, None).is_gone
    Peer(0, host, own, "1").kill()  # and is left alone


def test_marks_and_what_goes_on() -> None:
    pace = Pace()
    with pace.timed("sample"):
        before = pace.last
        time.sleep(0.01)
        pace.go_on()
        assert (pace.last.number, pace.last.kind) == (before.number, "sample") and pace.last.since > before.since
    assert (pace.last.number, pace.last.kind) == (before.number + 1, "step")


def test_nothing_is_waited_for_long() -> None:
    assert within(5, lambda: 7) == 7 and within(5, lambda: 1 / 0) is None
    begun, ended = time.monotonic(), threading.Event()
    assert within(0.05, lambda: ended.wait(30)) is None and time.monotonic() - begun < 20
    ended.set()


def test_stacks_are_written(tmp_path: Path) -> None:
    write_stacks(tmp_path / "box" / "stacks.txt", describe_threads())
    assert "test_stacks_are_written" in (tmp_path / "box" / "stacks.txt").read_text()


def make_watchdog(tmp_path: Path, stops: Stops, peers: list[Peer]) -> Watchdog:
    box: Any = SimpleNamespace(rank=0, folder=tmp_path, step=3, keys=["a"])
    board: Any = SimpleNamespace(has_word=lambda: False)
    return Watchdog(tmp_path, None, stops, box, peers, board, print, lambda text: text.replace("hunter2", "${HIDDEN}"))


def test_what_the_start_took_is_no_hang(tmp_path: Path) -> None:
    """Reading a checkpoint from a slow disk may take longer than anything that comes after it."""
    stops = Stops(None, None, None)
    stops.pace.last = replace(stops.pace.last, since=time.monotonic() - 10_000)
    with make_watchdog(tmp_path, stops, PEERS[:1]):
        assert time.monotonic() - stops.pace.last.since < 60


def test_the_words_of_an_end_hide_what_the_environment_holds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hunter2"), make_watchdog(tmp_path, Stops(None, None, None), PEERS[:2]):
        raise ValueError("no shards in hunter2")
    said = (tmp_path / "rank-00000.end.json").read_text()
    assert "no shards in ${HIDDEN}" in said and "hunter2" not in said
