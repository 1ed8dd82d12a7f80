"""Full disks: what does not fit is refused before it is written; a disk that fills up meanwhile is reported."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.core.errors import FULL, UserError


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
    return FullDisk(f"{what} could not be written: the disk is full.{size} {have}. Make room there and start again")
