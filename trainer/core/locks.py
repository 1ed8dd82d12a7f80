"""The one lock: a file that a process holds for as long as it lives, on network file systems too.

POSIX locks rather than flock, which forked children inherit: after a SIGKILL such a lock outlives its owner for as long
as they do. A process that opens and closes the same file a second time loses its lock.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.core.errors import UserError


def is_held(path: Path) -> bool:
    """Whether another process holds a file alone; not to be asked by a process that holds it."""
    try:
        with path.open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # no such file, or a file system without locks
        return False
    return False


@contextmanager
def hold_lock(path: Path, held: str, shared: bool = False) -> Iterator[None]:
    """Hold a file, which is made where it is not there; a shared lock goes with others of its kind.

    Raises:
        UserError: with the message ``held``, where another process has it; and where the file system has no locks.
    """
    with path.open("ab+") as file:
        try:
            fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either
            raise UserError(held) from error
        except OSError as error:
            raise UserError(f"{path} cannot be locked ({error.strerror}): its file system must have locks") from error
        yield
