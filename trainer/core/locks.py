"""The one lock: a file that a process holds for as long as it lives, on network file systems too.

POSIX locks rather than flock, which forked children inherit: after a SIGKILL such a lock outlives its owner for as long
as they do. A process that opens and closes the same file a second time loses its lock. The file says who holds it.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from trainer.core.console import log
from trainer.core.errors import UserError
from trainer.core.processes import POLL_SECONDS, describe_process

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # NFS without its daemon, FUSE, Lustre
BETWEEN_THREADS = threading.Lock()  # see take_turns
MOUNTS = Path("/proc/self/mountinfo")
# mount options by which locks hold on one machine only, where the others see the files too
LOCAL_ONLY = re.compile(r"\b(nolock|local_lock=(posix|all)|localflock)\b")


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
        UserError: with the message ``held`` and who it is, where another process has it; and where the file system has
            no locks.
    """
    with path.open("ab+") as file:
        try:
            fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either
            raise UserError(held + describe_holder(file)) from error
        except OSError as error:
            remedy = "choose a place whose file system has locks"
            if error.errno in NO_LOCKS:
                remedy += " (NFS: rpc.statd and lockd must run, or mount version 4; Lustre: mount with -o flock)"
            raise UserError(f"{path} cannot be locked ({error.strerror}): {remedy}") from error
        if shared:
            yield
            return
        if locks_are_local(path):
            log.warning(
                "warning: %s: locks of this mount hold on this machine only, so that nothing keeps a process of "
                "another machine out: start it on one machine at a time", path,
            )  # fmt: skip
        write_holder(file, json.dumps(describe_process()))
        try:
            yield
        finally:
            write_holder(file, "")


@contextmanager
def take_turns(path: Path, seconds: float) -> Iterator[None]:
    """Hold a file for a moment, among processes and the threads of this one; who has waited so long goes on without."""
    with BETWEEN_THREADS, path.open("ab") as file:  # a file's lock holds between processes, not threads
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(POLL_SECONDS)
        yield


def write_holder(file: IO[bytes], text: str) -> None:
    """Say in a lock's file who holds it; that it cannot be said takes nothing from the lock."""
    with contextlib.suppress(OSError):
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), text.encode())  # opened for appending: at its end


def describe_holder(file: IO[bytes]) -> str:
    """Who says in a lock's file that it holds it, in words after a message; older versions say nothing."""
    try:
        file.seek(0)
        holder = json.loads(file.read(4096))
        host, known = str(holder["host"]), f"{holder['what']}, process {holder['pid']} on {holder['host']}"
        known += f", since {holder['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if host == socket.gethostname():
        return f" (held by {known})"
    return f" (held by {known}; if that machine is gone for good, remove {file.name})"


def locks_are_local(path: Path) -> bool:
    """Whether others see this file, but not its locks: by the options of its mount, where /proc knows them."""
    try:
        lines = MOUNTS.read_text().splitlines()
        device = path.parent.stat().st_dev
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(line.split()[2] == number and LOCAL_ONLY.search(line.rpartition(" - ")[2]) for line in lines)
