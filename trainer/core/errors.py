"""UserError: the user's problem, told in one message. Only it becomes exit code 2 without a traceback."""

import errno
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """What is wrong, where (file, key, step or sample), and what to do about it."""


def run_command(main: Callable[[], None]) -> None:
    """Run a script's main; a UserError is printed to stderr and ends the process with exit code 2."""
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f" while {error.filename} was written" if error.filename else ""
        print(f"error: the disk is full{place}: make room and start again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
