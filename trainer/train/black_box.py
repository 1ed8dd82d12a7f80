"""The black box: the last steps of an attempt on the disk, whatever ends it; model/step_records.py reads it.

A thread writes what the training thread hands it, which is on the host already: no step waits for a disk, and nothing
is read of the device. Where the disk does not keep up, or cannot be written to, lines are lost and training goes on.
"""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any

from trainer.config.run_names import name_run
from trainer.core.commands import command
from trainer.core.console import log
from trainer.core.layout import BLACK_BOX_FOLDER, attempt_name, steps_name
from trainer.data.loader import Batch
from trainer.model.run_records import read_run
from trainer.model.step_records import list_black_boxes
from trainer.train.launch import RunInputs
from trainer.train.run import run_path
from trainer.train.step import StepResult

STEPS = 50  # in a file; with the file before it there are at least as many, and less than twice
WAITING = 200  # lines that may wait for the disk
CLOSING = 10.0  # seconds that the end of a run waits for it
KEEP_ENDED, KEEP_FAILED = 3, 20  # attempts that ended well; and that did not


class BlackBox:
    """One rank's."""

    def __init__(self, run: Path, attempt: int, rank: int, world: int, first: int = 0) -> None:
        self.run, self.folder = run, run / BLACK_BOX_FOLDER / attempt_name(attempt)
        self.attempt, self.rank, self.world = attempt, rank, world
        self.step, self.keys = first, list[str]()  # of the step under way
        self.asked = self.read_at = time.monotonic()  # for batches; and when numbers were read last
        self.lines: Queue[dict[str, Any] | None] = Queue(WAITING)
        self.thread = Thread(target=self.write_all, name="black box", daemon=True)

    def __enter__(self) -> "BlackBox":
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write what is left; where the run ends in an error, say what is there."""
        with contextlib.suppress(Full):
            self.lines.put(None, timeout=CLOSING)
            self.thread.join(CLOSING)
        if kind is not None and self.folder.is_dir():
            log.info("note: %s", self.describe())

    def describe(self) -> str:
        """Where it is, and how to read it."""
        shown = command("scripts/explain_step.py", "--black-box", name_run(self.run))
        return f"what the last steps saw and gave lies in {self.folder}: {shown}"

    def ask(self) -> None:
        """The batches of a step are asked for."""
        self.asked = time.monotonic()

    def begin(self, step: int, batches: Sequence[Batch]) -> None:
        """A step is about to be made of these."""
        self.step, self.keys = step, [key for batch in batches for key in batch.keys]
        self.put({
            "step": step, "attempt": self.attempt, "rank": self.rank, "world": self.world, "time": time.time(),
            "waited": time.monotonic() - self.asked, "batches": [len(batch.keys) for batch in batches],
            "keys": self.keys, "captions": [caption for batch in batches for caption in batch.captions],
        })  # fmt: skip

    def note(self, result: StepResult) -> None:
        """The numbers of a step."""
        now = time.monotonic()
        self.put({
            "step": result.step, "loss": float(result.loss), "losses": result.losses.tolist(),
            "grad_norm": float(result.grad_norm), "withheld": result.bad, "loss_scale": result.loss_scale,
            "skipped": result.skipped, "seconds": now - self.read_at,
        })  # fmt: skip
        self.read_at = now

    def put(self, line: dict[str, Any]) -> None:
        """Hand a line to the thread; it is lost where too many wait."""
        with contextlib.suppress(Full):
            self.lines.put_nowait(line)

    def write_all(self) -> None:
        """The thread."""
        failed, steps = False, 0
        file = self.folder / steps_name(self.rank)
        while (line := self.lines.get()) is not None:
            try:
                if "keys" in line:
                    if steps == STEPS:
                        steps = 0
                        file.replace(self.folder / steps_name(self.rank, older=True))
                    steps += 1
                self.folder.mkdir(parents=True, exist_ok=True)
                text = json.dumps(spell_numbers(line), ensure_ascii=False, allow_nan=False).encode()
                with file.open("ab", buffering=0) as out:
                    out.write(b"\n" * failed + text + b"\n")
                failed = False
            except Exception as error:
                if not failed:
                    log.warning("warning: the black box is not written, training goes on: %r", error)
                failed = True


def open_black_box(inputs: RunInputs, attempt: int) -> BlackBox:
    """This rank's for an attempt, whose number the main process knows."""
    run, processes = run_path(inputs.config), inputs.processes
    if processes.is_main:
        tidy_black_boxes(run)
    return BlackBox(run, processes.share(attempt), processes.rank, processes.world, inputs.first)


def spell_numbers(line: dict[str, Any]) -> dict[str, Any]:
    """With text in place of numbers that JSON has not, which are those that somebody looks for."""

    def number(value: Any) -> Any:
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    numbers = {name: number(value) for name, value in line.items()}
    return numbers | ({"losses": [number(each) for each in line["losses"]]} if "losses" in line else {})


def tidy_black_boxes(run: Path) -> None:
    """At an attempt's beginning: name what the last one left that ended without a word, and remove old ones."""
    found = dict(list_black_boxes(run))
    states = {entry["attempt"]: entry.get("outcome", {}).get("state") for entry in read_run(run)["attempts"]}
    ended = [attempt for attempt in found if states.get(attempt) in ("finished", "stopped")]
    failed = [attempt for attempt in found if attempt not in ended]
    if failed and failed[-1] == max(found) and states.get(failed[-1]) is None:
        last = failed[-1]
        log.info("note: attempt %s was killed; what its last steps saw lies in %s", last, found[last])
    for attempt in (*ended[:-KEEP_ENDED], *failed[:-KEEP_FAILED]):
        shutil.rmtree(found[attempt], ignore_errors=True)
