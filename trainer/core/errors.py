"""UserError: the user's problem in one message. Only it becomes exit code 2 without a traceback."""

import contextlib
import errno
import os
import select
import sys
from collections.abc import Callable

FULL = (errno.ENOSPC, errno.EDQUOT)  # what the system says of a full disk, or a quota
CLOSED_PIPE = 141  # what a shell shows for a command that SIGPIPE ended


class UserError(Exception):
    """What is wrong, where (file, key, step or sample), and what to do about it."""


def shorten(text: str, limit: int = 300) -> str:
    """The beginning of a text from elsewhere, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[:limit] + " ..."


def run_command(main: Callable[[], object]) -> None:
    """Run a script's main; a UserError is printed to stderr and ends the process with exit code 2.

    A reader that has gone, as in ``script | head``, ends it without a word.
    """
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print_error(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        print_error("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        if not any(reader_has_gone(number) for number in (1, 2)):
            raise  # of a worker or of the network
        sys.exit(CLOSED_PIPE)
    except OSError as error:
        if error.errno not in FULL:
            raise
        place = f" while {error.filename} was written" if error.filename else ""
        print_error(f"error: the disk is full{place}: make room and start again")
        sys.exit(2)
    finally:
        drop_unread_output()


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
