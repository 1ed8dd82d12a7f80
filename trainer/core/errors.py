"""UserError: the user's problem in one message. Only it becomes exit code 2 without a traceback."""

import contextlib
import errno
import json
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from trainer.core.console import (
    Output,
    Result,
    WrongWords,
    is_main_process,
    print_json,
    print_result,
    read_output,
    speaking,
)
from trainer.core.libraries import silence_libraries

FULL = (errno.ENOSPC, errno.EDQUOT)  # what the system says of a full disk, or a quota
CLOSED_PIPE = 141  # what a shell shows for a command that SIGPIPE ended


class UserError(Exception):
    """What is wrong, where (file, key, step or sample), and what to do about it."""


def shorten(text: str, limit: int = 300) -> str:
    """The beginning of a text from elsewhere, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[:limit] + " ..."


def run_command(main: Callable[[], object], resume: str = "") -> None:
    """Run a script's main and print its result; a UserError is printed to stderr and ends it with exit code 2.

    ``--quiet`` and ``--json`` say how it speaks, see core/console.py. A result may have an exit code of its own. Ctrl-C
    ends it with 130 and ``resume``: what
    starting it again does. A reader that has gone, as in ``script | head``, ends it without a word.
    """
    output, began = read_output(), time.monotonic()
    silence_libraries(quiet=output.quiet)
    try:
        with speaking(output):
            result = main()
        if isinstance(result, Result):
            print_result(result, output, time.monotonic() - began)
            if result.code:
                report_failure(result.said)
                sys.exit(result.code)
    except (UserError, WrongWords) as error:
        fail(str(error), output, 2)
    except KeyboardInterrupt:
        fail(f"interrupted{': ' if resume else ''}{resume}", output, 130)
    except BrokenPipeError as error:
        if not any(reader_has_gone(number) for number in (1, 2)):
            print_unexpected(error, output)  # of a worker or of the network
            raise
        sys.exit(CLOSED_PIPE)
    except OSError as error:
        if error.errno not in FULL:
            print_unexpected(error, output)
            raise
        place = f" while {error.filename} was written" if error.filename else ""
        fail(f"the disk is full{place}: make room and start again", output, 2)
    except Exception as error:
        print_unexpected(error, output)
        raise
    finally:
        drop_unread_output()


def fail(message: str, output: Output, code: int) -> NoReturn:
    """Say what is wrong, and end the process."""
    rank = os.environ.get("RANK", "0")
    begins = "" if code == 130 else "error: " if is_main_process() else f"error on rank {rank}: "
    if is_main_process() or code != 130:
        print_error(begins + message)
    if output.json:
        print_json({"error": message})
    if code != 130:
        report_failure(message)
    sys.exit(code)


def print_unexpected(error: Exception, output: Output) -> None:
    """For a program, what a traceback on stderr is about to end with; the exit code is Python's own, 1."""
    if output.json:
        print_json({"error": f"{type(error).__name__}: {error}"})


def report_failure(message: str) -> None:
    """What torchrun shows of a process that did not end with 0, in the form of torch's elastic errors."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(report), encoding="utf-8")


def print_error(message: str) -> None:
    """A message on stderr, if anyone reads it."""
    with contextlib.suppress(BrokenPipeError):
        print(message, file=sys.stderr)


def reader_has_gone(descriptor: int) -> bool:
    """Whether the other end of a pipe is closed."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def drop_unread_output() -> None:
    """Write what is still buffered; where no one reads, drop it, or the interpreter complains of it at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
