"""How a command speaks. stderr: progress, notes, warnings, errors. stdout: its result, for people or for a program.

What is said on the way goes through ``log``: INFO is a note, WARNING what looks wrong. Without a command around it, as
in tests, nothing but warnings is shown. Of several processes only the main one speaks.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

log = logging.getLogger("trainer")

QUIET_HELP = "show nothing but warnings and errors, and on stdout the paths of what was made, one a line"
SHORT = 1.0  # seconds; what takes less needs neither a bar nor its time said
JSON_HELP = (
    "print one JSON object on stdout at the end (paths, counts, seconds, the next commands), and all else on stderr; "
    'what is refused is {"error": ...}, with exit code 2, and so is an error of the program itself, with 1'
)


@dataclass(frozen=True)
class NextStep:
    """What a user may do after a command."""

    to: str  # such as "train"
    command: str  # as it is typed


@dataclass(frozen=True)
class Result:
    """What a command ends with."""

    said: str  # for people
    paths: Sequence[Path] = ()  # what was made, or what was looked at
    facts: Mapping[str, Any] = field(default_factory=dict)  # for programs, JSON values
    next: Sequence[NextStep] = ()
    code: int = 0  # with which the process ends


@dataclass(frozen=True)
class Output:
    """How a command was asked to speak."""

    quiet: bool = False
    json: bool = False


class WrongWords(Exception):
    """What a parser refuses, where a program reads the answer."""


class CommandParser(argparse.ArgumentParser):
    """The parser of a command, with ``--quiet`` and ``--json``; what it refuses is JSON where that was asked for.

    Help is a result, and so on stdout however the command speaks.
    """

    def __init__(self, description: str, **more: Any) -> None:
        super().__init__(description=description, **more)
        add_output_options(self)

    def print_help(self, file: Any = None) -> None:
        if file is None:
            print_answer(self.format_help())
        else:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        message += suggest_value(message, sys.argv[1:])
        if read_output().json:
            raise WrongWords(message)
        super().error(message)


def suggest_value(message: str, words: Sequence[str]) -> str:
    """The end of argparse's message about an option without a value, where one follows that begins with a dash."""
    option = re.match(r"argument (?:-\w/)?(--[\w-]+).*expected (one|at least one) argument", message)
    if option is None or option[1] not in words:
        return ""
    value = next(iter(words[words.index(option[1]) + 1 :]), "")
    is_path = Path(value).exists()
    if not value.startswith("-") or value in ("-h", "--help") or (value.startswith("--") and not is_path):
        return ""
    return f": {option[1]}={shlex.quote(f'./{value}' if is_path else value)} for a value that begins with a dash"


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """``--quiet`` and ``--json``."""
    group = parser.add_argument_group("output")
    group.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    group.add_argument("--json", action="store_true", help=JSON_HELP)


def read_output() -> Output:
    """What of this process's words concerns its output; the command itself refuses what is wrong with them."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    add_output_options(parser)
    try:
        known, _ = parser.parse_known_args()
    except argparse.ArgumentError:
        return Output()
    return Output(known.quiet, known.json)


def is_main_process() -> bool:
    """Whether this process is the one that speaks, of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


class ScreenHandler(logging.Handler):
    """Lines on stderr, above the bars that stand there."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # no one reads it, or the terminal is gone: no reason to end the work
            tqdm.write(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def speaking(output: Output) -> Iterator[None]:
    """Inside, ``log`` speaks as it was asked to, and where stdout is a program's nothing else is printed there."""
    before, handler = (log.level, log.propagate), ScreenHandler()
    log.setLevel(logging.INFO if is_main_process() and not output.quiet else logging.WARNING)
    if not is_main_process():
        log.setLevel(logging.ERROR)
    log.propagate = False
    log.addHandler(handler)
    for_a_program = output.quiet or output.json
    try:
        with contextlib.redirect_stdout(sys.stderr) if for_a_program else contextlib.nullcontext():
            yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before


def print_result(result: Result, output: Output, seconds: float) -> None:
    """Print what a command ends with; the main process's, alone."""
    if not is_main_process():
        return
    if output.json:
        listed = [vars(step) for step in result.next]
        paths = [str(path) for path in result.paths]
        print_json({"paths": paths, **result.facts, "seconds": round(seconds, 3), "next": listed})
    elif output.quiet:
        print("\n".join(map(str, result.paths)) or result.said)
    else:
        lines = [result.said, *([f"took {format_duration(seconds)}"] if result.paths and seconds >= SHORT else [])]
        print("\n".join(lines + [f"\nto {step.to}:\n  {step.command}" for step in result.next]))


def print_answer(text: str) -> None:
    """A text that was asked for in place of the command's work: on stdout, also where that is kept for the result."""
    print(text.rstrip("\n"), file=sys.__stdout__ if sys.stdout is sys.stderr else None)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout, of the main process."""
    if is_main_process():
        print(json.dumps(value, ensure_ascii=False))


def format_duration(seconds: float) -> str:
    """A time for people: hours, minutes, seconds, as in ``0:05:10`` or ``27:03:00``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def format_table(rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """Rows as a table of plain text; with ``right`` all columns but the first are aligned there."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    forms = [f"{'>' if right and place else '<'}{width}" for place, width in enumerate(widths)]
    return "\n".join("  ".join(map(format, row, forms)).rstrip() for row in rows)
