"""Full disks: what does not fit is refused before it is written; a disk that fills up meanwhile is reported.

Other troubles of a disk, such as one that turned read-only, are told apart from errors of the program.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.core.console import log
from trainer.core.errors import FULL, UserError

# read-only, a device that fails, a server that forgot the file or does not answer, a limit of file sizes
AGAIN = " and start again"
TROUBLES = (errno.EROFS, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EFBIG)


class FullDisk(UserError):
    """What could not be written, its size, and the free space."""


def free_bytes(path: Path) -> int:
    """Free space on the file system of a folder that is there, or will be."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def format_bytes(size: float) -> str:
    """A size for people: ``40.6 GB``, decimal as disks are sold."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full; safetensors says so in words only."""
    if isinstance(error, OSError | FullDisk):
        return isinstance(error, FullDisk) or error.errno in FULL
    return any(f"os error {number}" in str(error) for number in FULL)


def is_disk_trouble(error: BaseException) -> bool:
    """Whether an error is the disk's: full, read-only, gone for a while. What was to be written may be tried again."""
    return is_full(error) or (isinstance(error, OSError) and error.errno in TROUBLES)


@contextmanager
def bearing_disk(result: str) -> Iterator[None]:
    """Around what a program can go on without: a disk's trouble is a warning that ends with its ``result``."""
    try:
        yield
    except Exception as error:
        if not is_disk_trouble(error):
            raise
        log.warning("warning: %s; %s", say_trouble(error), result)


def say_trouble(error: Exception) -> str:
    """A disk's trouble in words, where nobody starts again because of it."""
    return str(error).removesuffix(AGAIN)


@contextmanager
def disk_space(folder: Path, what: str, needed: int = 0) -> Iterator[None]:
    """Around the writing of ``what`` into ``folder``; ``needed`` is its size in bytes, 0 where it is not known.

    What was written in part must be removed inside, so that the message names the free space as it is afterwards.

    Raises:
        FullDisk: before anything is written where it does not fit; and instead of the system's error where it did not.
    """
    if needed > free_bytes(folder):
        raise explain_full_disk(folder, what, needed)
    try:
        yield
    except Exception as error:
        if not is_full(error) or (isinstance(error, FullDisk) and not needed):
            raise
        raise explain_full_disk(folder, what, needed) from error


def explain_full_disk(folder: Path, what: str, needed: int) -> FullDisk:
    """The message."""
    size = f" It needs {format_bytes(needed)}," if needed else ""
    have = f"{format_bytes(free_bytes(folder))} are free in {folder}"
    return FullDisk(f"{what} could not be written: the disk is full.{size} {have}. Make room there{AGAIN}")
