"""The black box, read: what the last steps of a run's attempts saw and gave, rank by rank.

A rank writes two lines of JSON a step: what it sees, before the step, and what came of it, when its numbers are read.
A line that a killed process left torn is passed over.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.core.layout import BLACK_BOX_FOLDER, steps_name
from trainer.model.run_records import is_count


@dataclass(frozen=True)
class StepRecord:
    """One step of one rank in one attempt. What came of it is None where the attempt ended before that was read."""

    attempt: int
    step: int  # completed steps before it
    rank: int
    world: int  # how many processes there were
    time: float  # seconds since 1970, when its batches were there
    waited: float  # seconds for its batches
    batches: list[int]  # samples of each of this rank's micro-batches
    keys: list[str]  # of this rank's samples, in the order of its micro-batches
    captions: list[str]  # as they were drawn
    loss: float | None = None  # mean over the global batch, of all ranks
    losses: list[float] | None = None  # of this rank's samples
    grad_norm: float | None = None  # before clipping, of all ranks
    withheld: bool | None = None  # loss or gradients were not finite, and the weights are as before
    loss_scale: float | None = None  # after the step, in fp16
    skipped: bool | None = None  # loss scaling skipped the update
    seconds: float | None = None  # since the numbers of the step before were read, with what was done between


def read_black_box(run_folder: Path) -> list[StepRecord]:
    """What is recorded of a run's last attempts, at least 50 steps of each, by attempt, step and rank.

    A step that a later attempt made again occurs once for each.
    """
    found: list[StepRecord] = []
    for _, folder in list_black_boxes(run_folder):
        ranks = {int(file.name.split(".")[0][5:]) for file in folder.glob("rank-[0-9][0-9][0-9][0-9][0-9].*jsonl")}
        for rank in ranks:
            found += read_rank([folder / steps_name(rank, older) for older in (True, False)])
    return sorted(found, key=lambda record: (record.attempt, record.step, record.rank))


def list_black_boxes(run_folder: Path) -> list[tuple[int, Path]]:
    """The attempts of a run that have one, with its folder, the oldest first."""
    folders = (run_folder / BLACK_BOX_FOLDER).glob("attempt-*")
    return sorted((int(path.name[8:]), path) for path in folders if path.name[8:].isdecimal())


def read_rank(files: list[Path]) -> list[StepRecord]:
    """The steps of one rank in one attempt, from its files, the older one first."""
    begun: dict[int, dict[str, Any]] = {}
    for line in (line for file in files if file.is_file() for line in iterate_recorded(file)):
        if "keys" in line:
            begun[line["step"]] = line
        elif line["step"] in begun:
            begun[line["step"]] |= line
    return list(filter(None, map(make_record, begun.values())))


def iterate_recorded(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file."""
    with file.open("rb") as lines:
        for text in lines:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and is_count(line.get("step")):
                yield line


def make_record(line: dict[str, Any]) -> StepRecord | None:
    """A step from its lines; None where a damaged file says something else. NaN and infinity stand in it as text."""
    try:
        numbers: dict[str, Any] = {name: float(line[name]) for name in ("loss", "grad_norm") if name in line}
        if "losses" in line:
            numbers["losses"] = [float(value) for value in line["losses"]]
        return StepRecord(**{**line, **numbers})
    except (TypeError, ValueError):
        return None
